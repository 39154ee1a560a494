"""The shapes that are timed, with the work of each; GPU cases are those of a 7B model."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from croc_kernels import MixedMask
from croc_kernels.assignment.families import FAMILIES, make_costs
from croc_kernels.testing import clustered_tokens

FIRST_IMAGE = 35  # tokens of the system prompt before the first image
IMAGE_TOKENS = 576  # CLIP ViT-L/14 at 336 pixels


@dataclass(frozen=True)
class Attention:
    """Mixed attention over ``num_images`` bidirectional images, or a visible ``prefix``.

    ``documents`` of equal length are packed into a row, each with its own images; the last
    ``padding`` tokens of a row are padding.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    num_images: int
    prefix: int = 0
    image_tokens: int = IMAGE_TOKENS
    documents: int = 1
    padding: int = 0

    def images(self) -> list[tuple[int, int]]:
        """(first, past-the-end) of a row's images, evenly spaced from FIRST_IMAGE on."""
        size = self.length // self.documents
        step = (size - self.padding - FIRST_IMAGE) // max(self.num_images, 1)
        firsts = [FIRST_IMAGE + i * step for i in range(self.num_images)]
        starts = [d * size + f for d in range(self.documents) for f in firsts]
        return [(f, f + self.image_tokens) for f in starts]

    def mask(self, device: torch.device) -> MixedMask:
        """The mask, on the device."""
        if self.prefix:
            lengths = torch.full((self.batch,), self.prefix, dtype=torch.int32, device=device)
            return MixedMask.prefix(lengths, self.length)
        rows = [(b, *image) for b in range(self.batch) for image in self.images()]
        spans = torch.tensor(rows, dtype=torch.int32, device=device)
        position = torch.arange(self.length, device=device).expand(self.batch, -1)
        padding = position < self.length - self.padding if self.padding else None
        documents = position // (self.length // self.documents) if self.documents > 1 else None
        return MixedMask.from_spans(spans, self.batch, self.length, padding, documents)

    def row_bounds(self) -> tuple[Tensor, Tensor]:
        """(L,) int64 first and past-the-end key of what each row sees, from the definition."""
        position = torch.arange(self.length)
        size = self.length // self.documents
        starts, ends = position // size * size, (position + 1).clamp(min=self.prefix)
        for first, past in self.images():
            ends[first:past] = past
        used = self.length - self.padding
        starts[used:], ends[used:] = 0, 0
        return starts, ends

    def pairs(self) -> int:
        """Visible (row, key) pairs of one head of one sample."""
        starts, ends = self.row_bounds()
        return int((ends - starts).sum())

    def forward_flops(self) -> float:
        """2 products of 2 FLOP per visible pair and component; masked pairs are not counted."""
        return 4.0 * self.pairs() * self.head_dim * self.heads * self.batch

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (B, H, L, D) views of (B, L, H, D), as a model's projections give them."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch, self.length, self.heads + 2 * self.kv_heads, self.head_dim)
        packed = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (x.transpose(1, 2) for x in packed.split(counts, dim=2))
        return q, k, v


@functools.lru_cache(maxsize=2)
def _tokens(batch: int, num_tokens: int, dim: int, device: torch.device) -> Tensor:
    """The rows of one case share them: at full size they take longer to draw than to match."""
    return clustered_tokens(batch, num_tokens, dim, device=device)


@dataclass(frozen=True)
class Matching:
    """Tokens of ``batch`` images matched to a pool; ``kind`` sets how hard the assignment is.

    ``init``: pool = randn against unit-norm clustered tokens (the start of training). ``trained``:
    pool rows near the tokens' clusters.
    """

    name: str
    batch: int
    num_tokens: int = 432
    pool_size: int = 2048
    dim: int = 4096
    kind: str = "init"

    def tokens(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, N, C) unit-norm tokens."""
        return _tokens(self.batch, self.num_tokens, self.dim, device).to(dtype)

    def pool(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(M, C) pool rows."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.pool_size, self.dim, generator=generator)
        if self.kind == "trained":
            tokens = self.tokens(torch.device("cpu"), torch.float32).flatten(0, 1)
            pick = torch.randint(len(tokens), (self.pool_size,), generator=generator)
            noise = tokens[pick] + 0.5 * noise / self.dim**0.5
        return noise.to(device, dtype)

    def cost_flops(self) -> float:
        """The product of tokens and pool."""
        return 2.0 * self.batch * self.num_tokens * self.pool_size * self.dim

    def cost_bytes(self, itemsize: int, with_matrix: bool) -> float:
        """Every input read once and the result written once."""
        rows = self.batch * self.num_tokens
        result = 4.0 * rows * self.pool_size if with_matrix else 8.0 * rows
        return (rows + self.pool_size) * self.dim * itemsize + result


@functools.cache
def _costs(family: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """Made once for all rows of a run, and for all batches: smaller ones begin the same."""
    alike = [
        case.batch
        for case in (*ASSIGNMENT_GPU, *ASSIGNMENT_CPU)
        if (case.family, case.rows, case.columns) == (family, rows, columns)
    ]
    return make_costs(family, max(alike), rows, columns, device=device)


@dataclass(frozen=True)
class Assignment:
    """Problems of a family of ``croc_kernels.assignment.families``."""

    family: str
    batch: int
    rows: int = 432
    columns: int = 2048

    @property
    def name(self) -> str:
        """``init-B4``, and with another number of rows ``init-2016-B4``."""
        rows = "" if self.rows == 432 else f"-{self.rows}"
        return f"{self.family}{rows}-B{self.batch}"

    def cost(self, device: torch.device) -> Tensor:
        """(B, N, M) float32 costs, contiguous; the first of the largest batch of the family."""
        return _costs(self.family, self.rows, self.columns, device)[: self.batch]


@dataclass(frozen=True)
class Replacement:
    """``batch`` sequences with one image each, 75 % of its tokens replaced by pool rows."""

    name: str
    batch: int
    length: int
    dim: int = 4096
    pool_size: int = 2048
    image_tokens: int = IMAGE_TOKENS

    @property
    def num_replaced(self) -> int:
        """Replaced tokens of one sequence: three quarters of its image, rounded up."""
        return -(-3 * self.image_tokens // 4)

    def where(self, device: torch.device) -> Tensor:
        """(B, L) bool, the same number of replaced tokens in every row."""
        generator = torch.Generator().manual_seed(3)
        where = torch.zeros(self.batch, self.length, dtype=torch.bool)
        for row in where:
            order = torch.randperm(self.image_tokens, generator=generator)
            row[FIRST_IMAGE + order[: self.num_replaced]] = True
        return where.to(device)

    def index(self, device: torch.device) -> Tensor:
        """(B, L) int64, the pool row of each replaced token, -1 elsewhere; no row twice."""
        generator = torch.Generator().manual_seed(4)
        rows = [torch.randperm(self.pool_size, generator=generator) for _ in range(self.batch)]
        where = self.where(torch.device("cpu"))
        index = torch.full(where.shape, -1)
        index[where] = torch.stack(rows)[:, : self.num_replaced].flatten()
        return index.to(device)


@dataclass(frozen=True)
class Training:
    """A LLaVA of Llama blocks, one image per sample, between a prompt and a caption."""

    name: str
    batch: int
    length: int
    layers: int
    dim: int = 4096
    image_tokens: int = IMAGE_TOKENS
    pool_size: int = 2048

    def flops(self) -> float:
        """6 per weight of the blocks and token; attention and the stage not counted."""
        weights = self.layers * (4 * self.dim**2 + 3 * self.dim * (self.dim * 43 // 16))
        return 6.0 * weights * self.batch * self.length


ATTENTION_GPU = (
    Attention("croc-1k", 4, 32, 32, 1024, 128, 1),
    Attention("croc-1k-prefix", 4, 32, 32, 1024, 128, 0, prefix=641),
    Attention("croc-2k", 4, 32, 32, 2048, 128, 1),
    Attention("croc-4k-multi", 4, 32, 32, 4096, 128, 4),
    Attention("croc-8k-multi", 2, 32, 32, 8192, 128, 8),
    Attention("gqa-8k-multi", 2, 32, 8, 8192, 128, 8),
    Attention("gemma3-4k", 4, 8, 4, 4096, 256, 8, image_tokens=256),
    Attention("hd64-8k", 2, 32, 32, 8192, 64, 8),
    Attention("croc-caption-800", 16, 32, 32, 800, 128, 1),  # 35 + 576 + a detailed caption
)
# Shapes where a fixed cost shows, and the lengths of Croc's own batches.
ATTENTION_LENGTHS = (
    Attention("B32-128", 32, 32, 32, 128, 128, 1, image_tokens=64),
    Attention("B32-256", 32, 32, 32, 256, 128, 1, image_tokens=144),
    Attention("B16-512", 16, 32, 32, 512, 128, 1, image_tokens=256),
    *(Attention(f"B{b}-{n}", b, 32, 32, n, 128, 1) for n in (640, 1200) for b in (1, 4, 16)),
    Attention("B4-640-padded", 4, 32, 32, 640, 128, 1, image_tokens=400, padding=160),
    Attention("B16-1200-padded", 16, 32, 32, 1200, 128, 1, padding=300),
    Attention("packed-16x640", 1, 32, 32, 10240, 128, 1, documents=16),
    Attention("packed-8x1024", 1, 32, 32, 8192, 128, 1, documents=8),
    Attention("B1-16k", 1, 32, 32, 16384, 128, 16),
    *(
        Attention(f"hd{dim}-B{batch}-{length}", batch, heads, keys, length, dim, 1, 0, tokens)
        for dim, heads, keys in ((64, 32, 32), (256, 8, 4))
        for batch, length, tokens in ((32, 128, 64), (16, 512, 256), (4, 1200, IMAGE_TOKENS))
    ),
)
ATTENTION_CPU = (
    Attention("tiny-256", 1, 4, 4, 256, 64, 1, image_tokens=144),
    Attention("tiny-800-prefix", 1, 4, 2, 800, 64, 0, prefix=611),
)
ATTENTION_LENGTHS_CPU = (
    Attention("B2-100-padded", 2, 2, 2, 100, 64, 1, image_tokens=36, padding=20),
    Attention("packed-2x100", 1, 2, 2, 200, 64, 1, image_tokens=36, documents=2),
)
COST_GPU = tuple(Matching(f"cost-B{b}", b) for b in (4, 32, 128))
COST_CPU = (Matching("cost-B1-C256", 1, dim=256),)
# How the solver holds where problems are hardest; from 1000 rows on and here peers are left out.
HARD = ("init_tight", "trained_tight", "trained_skew", "pictures", "lowrank", "product", "dup_rows")
ASSIGNMENT_HARD = (
    *(Assignment(f, 128) for f in HARD),
    *(Assignment(f, 8, 2016) for f in HARD),
)
ASSIGNMENT_GPU = (
    *(Assignment(f, b) for f in ("init", "trained", "uniform") for b in (4, 32, 128)),
    *(Assignment(f, 8) for f in FAMILIES if f not in ("init", "trained", "uniform")),
    *(Assignment(f, b, 547) for f in ("init", "trained") for b in (4, 32)),  # SigLIP 2
    *(Assignment(f, b, 1536) for f in ("init", "trained") for b in (4, 32)),  # Qwen
    *(Assignment(f, b, 2016) for f in ("init", "trained") for b in (4, 32)),
    *ASSIGNMENT_HARD,
)
ASSIGNMENT_CPU = (Assignment("init", 2), Assignment("trained", 2), Assignment("uniform", 4))
REPLACEMENT_GPU = (Replacement("croc-1k-B16", 16, 1024), Replacement("croc-2k-B32", 32, 2048))
REPLACEMENT_CPU = (Replacement("croc-800-B2-C512", 2, 800, dim=512),)
STEP_GPU = (Matching("step-init-B4", 4), Matching("step-trained-B32", 32, kind="trained"))
STEP_CPU = (Matching("step-trained-B1-C512", 1, kind="trained", dim=512),)
LAYER_GPU = (
    Matching("init-B4", 4, num_tokens=IMAGE_TOKENS),
    Matching("trained-B4", 4, num_tokens=IMAGE_TOKENS, kind="trained"),
    Matching("trained-B32", 32, num_tokens=IMAGE_TOKENS, kind="trained"),
)
LAYER_CPU = (Matching("trained-B1-C256", 1, num_tokens=IMAGE_TOKENS, kind="trained", dim=256),)
TRAINING_GPU = (Training("llava-7b-B4", 4, 1024, 32),)
TRAINING_CPU = (Training("tiny-B2", 2, 128, 2, dim=256, image_tokens=64, pool_size=128),)
