"""The shapes that are timed, with the work of each; GPU cases are those of a 7B model."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from croc_kernels import MixedMask
from croc_kernels.testing import clustered_tokens

FIRST_IMAGE = 35  # tokens of the system prompt before the first image
IMAGE_TOKENS = 576  # CLIP ViT-L/14 at 336 pixels


@dataclass(frozen=True)
class Attention:
    """Mixed attention over ``num_images`` bidirectional images, or a visible ``prefix``."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    num_images: int
    prefix: int = 0
    image_tokens: int = IMAGE_TOKENS

    def spans(self) -> list[tuple[int, int, int]]:
        """(sample, first, past-the-end) of every image, evenly spaced from FIRST_IMAGE on."""
        step = (self.length - FIRST_IMAGE) // max(self.num_images, 1)
        firsts = [FIRST_IMAGE + i * step for i in range(self.num_images)]
        return [(b, f, f + self.image_tokens) for b in range(self.batch) for f in firsts]

    def mask(self, device: torch.device) -> MixedMask:
        """The mask, on the device."""
        if self.prefix:
            lengths = torch.full((self.batch,), self.prefix, dtype=torch.int32, device=device)
            return MixedMask.prefix(lengths, self.length)
        spans = torch.tensor(self.spans(), dtype=torch.int32, device=device)
        return MixedMask.from_spans(spans, self.batch, self.length)

    def row_ends(self) -> Tensor:
        """(L,) int64 past-the-end of what each row sees, from the definition."""
        ends = torch.arange(1, self.length + 1).clamp(min=self.prefix)
        for _, first, past in self.spans()[: self.num_images]:
            ends[first:past] = past
        return ends

    def pairs(self) -> int:
        """Visible (row, key) pairs of one head of one sample."""
        return int(self.row_ends().sum())

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
    pool rows near the tokens' clusters. ``uniform``: random costs.
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

    def cost(self, device: torch.device) -> Tensor:
        """(B, N, M) float32 costs, contiguous."""
        if self.kind == "uniform":
            generator = torch.Generator().manual_seed(2)
            shape = (self.batch, self.num_tokens, self.pool_size)
            return torch.rand(shape, generator=generator).to(device)
        tokens = self.tokens(device, torch.float32)
        return torch.cdist(tokens, self.pool(device, torch.float32)[None]).contiguous()

    def cost_flops(self) -> float:
        """The product of tokens and pool."""
        return 2.0 * self.batch * self.num_tokens * self.pool_size * self.dim

    def cost_bytes(self, itemsize: int, with_matrix: bool) -> float:
        """Every input read once and the result written once."""
        rows = self.batch * self.num_tokens
        result = 4.0 * rows * self.pool_size if with_matrix else 8.0 * rows
        return (rows + self.pool_size) * self.dim * itemsize + result


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
ATTENTION_CPU = (
    Attention("tiny-256", 1, 4, 4, 256, 64, 1, image_tokens=144),
    Attention("tiny-800-prefix", 1, 4, 2, 800, 64, 0, prefix=611),
)
COST_GPU = tuple(Matching(f"cost-B{b}", b) for b in (4, 32, 128))
COST_CPU = (Matching("cost-B1-C256", 1, dim=256),)
ASSIGNMENT_GPU = tuple(
    Matching(f"{kind}-B{b}", b, kind=kind)
    for kind in ("init", "trained", "uniform")
    for b in (4, 32, 128)
)
ASSIGNMENT_CPU = (
    Matching("init-B2", 2, kind="init", dim=1024),
    Matching("trained-B2", 2, kind="trained", dim=1024),
    Matching("uniform-B4", 4, kind="uniform"),
)
REPLACEMENT_GPU = (Replacement("croc-1k-B16", 16, 1024), Replacement("croc-2k-B32", 32, 2048))
REPLACEMENT_CPU = (Replacement("croc-800-B2-C512", 2, 800, dim=512),)
STEP_GPU = (Matching("step-init-B4", 4), Matching("step-trained-B32", 32, kind="trained"))
STEP_CPU = (Matching("step-trained-B1-C512", 1, kind="trained", dim=512),)
