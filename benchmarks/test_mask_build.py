"""Building the mask of one step against FlexAttention's block mask and a dense one."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from croc_kernels import MixedMask

from . import cases, peers
from .timing import Ceiling, Work, measure


def _croc() -> Callable[[Tensor, int, int], object]:
    return MixedMask.from_spans


def _ends(spans: Tensor, batch: int, length: int) -> Tensor:
    """(B, L) past-the-end of what each row sees, in as few operations as there are spans to it."""
    position = torch.arange(length, device=spans.device)
    first, past = spans[:, 1, None], spans[:, 2, None]
    inside = (position >= first) & (position < past)  # (S, L)
    reach = torch.where(inside, past, 0).view(batch, -1, length).amax(1)
    return torch.maximum(reach, position + 1)


def _dense() -> Callable[[Tensor, int, int], object]:
    def build(spans: Tensor, batch: int, length: int) -> Tensor:
        key = torch.arange(length, device=spans.device)
        return (key < _ends(spans, batch, length)[..., None])[:, None]

    return build


def _block_mask(compiled: bool) -> Callable[[], Callable[[Tensor, int, int], object]]:
    def prepare() -> Callable[[Tensor, int, int], object]:
        from torch.nn.attention.flex_attention import create_block_mask

        make = torch.compile(create_block_mask) if compiled else create_block_mask

        def build(spans: Tensor, batch: int, length: int) -> object:
            ends = _ends(spans, batch, length)

            def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return j < ends[b, i]

            return make(visible, batch, None, length, length, device=spans.device)

        return build

    return prepare


CROC = peers.Peer("croc", _croc)
OTHERS = (
    peers.Peer("dense", _dense),
    peers.Peer("flex-block-mask", _block_mask(False)),
    peers.Peer("flex-block-mask-compiled", _block_mask(True), peers.needs_cuda),
)
CASES = ("croc-1k", "croc-4k-multi", "croc-8k-multi")
CASES_GPU = tuple(case for case in cases.ATTENTION_GPU if case.name in CASES)


@pytest.mark.cases(cuda=CASES_GPU, cpu=cases.ATTENTION_CPU[:1])
@pytest.mark.parametrize("peer", [CROC, *OTHERS], ids=lambda peer: peer.name)
def test_mask_build(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Attention,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    rows = [(b, *image) for b in range(case.batch) for image in case.images()]
    spans = torch.tensor(rows, dtype=torch.int32, device=device)
    build = peer.prepare()
    starts, ends = (x.to(device) for x in case.row_bounds())
    if peer is CROC:
        mask = build(spans, case.batch, case.length)
        assert (mask.start == starts).all()
        assert (mask.end == ends).all()
    else:
        assert (_ends(spans, case.batch, case.length) == ends).all()
    # Four integers per token are written; the spans are next to nothing.
    work = Work(bytes=16.0 * case.batch * case.length)
    measure(
        benchmark, lambda: build(spans, case.batch, case.length), device, ceiling, work,
        op="mask_build", case=case.name, provider=peer.name, direction="fwd",
    )  # fmt: skip


@dataclass(frozen=True)
class Build:
    """A constructor at a shape of training; every row of ``size`` tokens holds one image."""

    name: str
    kind: str
    batch: int
    length: int
    size: int

    def arguments(self, device: torch.device) -> tuple[Tensor, ...]:
        """Whether a token is visual, a mask of padding, documents, their borders, labels, spans."""
        position = torch.arange(self.length, device=device)
        within = position % self.size
        image = (within >= cases.FIRST_IMAGE) & (within < cases.FIRST_IMAGE + cases.IMAGE_TOKENS)
        padding = (position < self.length - 8).float()
        labels = torch.where(position < cases.FIRST_IMAGE + cases.IMAGE_TOKENS, -100, 7)
        rows = (image, padding, position // self.size, labels)
        borders = torch.arange(0, self.length + 1, self.size, device=device, dtype=torch.int32)
        firsts = [cases.FIRST_IMAGE + s for s in range(0, self.length, self.size)]
        spans = [[b, f, f + cases.IMAGE_TOKENS] for b in range(self.batch) for f in firsts]
        expanded = (x.expand(self.batch, -1).contiguous() for x in rows)
        return (*expanded, borders, torch.tensor(spans, dtype=torch.int32, device=device))

    def call(self, device: torch.device) -> Callable[[], MixedMask]:
        """What makes the mask."""
        visual, padding, ids, labels, borders, spans = self.arguments(device)
        lengths = torch.full((self.batch,), 641, dtype=torch.int32, device=device)
        make = MixedMask.from_token_types
        return {
            "types": lambda: make(visual),
            "padded": lambda: make(visual, padding),
            "documents": lambda: make(visual, padding, ids),
            "cu_seqlens": lambda: make(visual, cu_seqlens=borders),
            "window": lambda: make(
                visual, cu_seqlens=borders, sliding_window=1024, spans_exceed_window=True
            ),
            "spans": lambda: MixedMask.from_spans(spans, self.batch, self.length),
            "prefix": lambda: MixedMask.prefix(lengths, self.length),
            "labels": lambda: MixedMask.from_labels(labels, padding),
            "causal": lambda: MixedMask.causal(self.batch, self.length, device=device),
        }[self.kind]


BUILDS = tuple(
    Build(f"{kind}-{b}x{n}", kind, b, n, size)
    for b, n, size, kinds in (
        (4, 1024, 1024, ("types", "padded", "spans", "prefix", "labels", "causal")),
        (16, 1200, 1200, ("padded", "spans", "labels")),
        (2, 8192, 1024, ("types", "documents", "spans")),
        (1, 32768, 1024, ("types", "cu_seqlens", "window", "spans")),
    )
    for kind in kinds
)


@pytest.mark.cases(cuda=BUILDS, cpu=BUILDS[:2])
@pytest.mark.parametrize("peer", [CROC], ids=lambda peer: peer.name)
def test_mask_constructors(
    benchmark: object, device: torch.device, ceiling: Ceiling, case: Build, peer: peers.Peer
) -> None:
    call = case.call(device)
    mask, want = call(), case.call(torch.device("cpu"))()
    for name, value in vars(want).items():
        assert value is None or torch.equal(getattr(mask, name).cpu(), value), name
    work = Work(bytes=16.0 * case.batch * case.length)
    measure(
        benchmark, call, device, ceiling, work,
        op="mask_constructors", case=case.name, provider=peer.name, direction="fwd",
    )  # fmt: skip
