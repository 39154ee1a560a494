"""The Triton kernels of MixedMask against the PyTorch scans, bit by bit: on a GPU or interpreted.

test_token_cost_fresh.py runs this file with TRITON_INTERPRET=1. Blocks are small, so that running
values are carried from block to block.
"""

import itertools
import random

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, needs_kernels

from croc_kernels import ops
from croc_kernels.attention import intervals

KINDS = ("types", "spans", "prefix", "labels", "causal", "full")
pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    mask_kernel = pytest.importorskip("croc_kernels.attention.mask_kernel")
    monkeypatch.setattr(mask_kernel, "BLOCK", 16 if INTERPRETED else 256)
    monkeypatch.setattr(mask_kernel, "ELEMENTS_PER_WARP", 16 if INTERPRETED else 64)
    mask_columns = pytest.importorskip("croc_kernels.attention.mask_columns")
    monkeypatch.setattr(mask_columns, "KEYS", 16 if INTERPRETED else 128)


def lengths() -> tuple[int, ...]:
    return (1, 15, 16, 40) if INTERPRETED else (1, 2, 255, 256, 257, 1000)


def spans_of(rng: random.Random, batch: int, length: int, broken: bool) -> torch.Tensor:
    rows = [[0, 0, 0]]
    for b in range(batch):
        cuts = sorted(rng.sample(range(length + 1), min(length + 1, 6)))
        rows += [[b, f, p] for f, p in itertools.pairwise(cuts) if rng.random() < 0.7]
    if broken:
        rows += [[rng.randint(-1, batch), rng.randint(-2, length), rng.randint(-2, length + 2)]
                 for _ in range(4)]  # fmt: skip
    rng.shuffle(rows)
    return torch.tensor(rows)


def source_of(kind: str, rng: random.Random, batch: int, length: int, broken: bool) -> torch.Tensor:
    if kind == "types":
        return torch.rand(batch, (length + 3) // 4).repeat_interleave(4, 1)[:, :length] < 0.5
    if kind == "spans":
        return spans_of(rng, batch, length, broken)
    if kind == "prefix":
        return torch.randint(-1 if broken else 0, length + 1 + 2 * broken, (batch,))
    if kind == "labels":
        labels = torch.where(torch.rand(batch, length) < 3 / length, 7, -100)
        return torch.where(torch.arange(batch)[:, None] == 0, -100, labels)
    return torch.zeros(0, dtype=torch.bool)


def padding_of(rng: random.Random, batch: int, length: int, broken: bool) -> torch.Tensor:
    position = torch.arange(length)
    left, right = (torch.randint(0, length // 2 + 1, (batch, 1)) for _ in range(2))
    left, right = rng.choice([(left, 0), (0, right), (left, right)])
    mask = (position >= left) & (position < length - right)
    mask = mask & (torch.rand(batch, length) < 0.9) if broken else mask
    return mask.to(rng.choice([torch.bool, torch.int64, torch.float32]))


def rows_of(kind: str, seed: int, length: int) -> tuple:
    """Arguments of ``mask_rows``; in every other case some break the rules."""
    rng, broken = random.Random(seed), seed % 2 == 1
    torch.manual_seed(seed)
    packed = rng.random() < 0.3
    batch = 1 if packed else rng.randint(1, 3)
    source = source_of(kind, rng, batch, length, broken)
    mask = padding_of(rng, batch, length, broken) if rng.random() < 0.6 else None
    ids = cu_seqlens = None
    if packed:
        cu_seqlens = torch.randint(0, length + 1, (rng.randint(1, 5),)).sort().values
        cu_seqlens[0] = 0
        cu_seqlens = cu_seqlens.flip(0) if broken else cu_seqlens
    elif rng.random() < 0.5:
        ids = (torch.rand(batch, length) < 0.1).cumsum(1)
        ids = ids.flip(1) if broken else ids
    if cu_seqlens is not None and rng.random() < 0.5:
        cu_seqlens = cu_seqlens.int()
    window, exceed = rng.choice([0, 0, 1, 5]), rng.random() < 0.5
    return source, kind, mask, ids, cu_seqlens, batch, length, window, exceed, -100


def moved(arguments: tuple) -> tuple:
    return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)


@pytest.mark.parametrize("seed", range(4 if INTERPRETED else 12))
@pytest.mark.parametrize("kind", KINDS)
def test_mask_rows_kernel_equals_the_scans(kind: str, seed: int) -> None:
    for length in lengths():
        arguments = rows_of(kind, seed, length)
        got = ops.mask_rows(*moved(arguments))
        want = intervals.mask_rows(*arguments)
        for g, w, name in zip(got, want, ("start", "end", "faults", "span faults"), strict=True):
            assert g.dtype == torch.int32
            assert torch.equal(g.cpu(), w), (name, length)


@pytest.mark.parametrize("seed", range(4 if INTERPRETED else 12))
def test_mask_columns_kernel_equals_the_scans(seed: int) -> None:
    for length in lengths():
        kind = KINDS[seed % len(KINDS)]
        start, end, _, _ = intervals.mask_rows(*rows_of(kind, 2 * seed, length))
        rows = torch.randint(0, length, (1,)).item()
        start, end = start[:, rows:].contiguous(), end[:, rows:].contiguous()
        if seed % 3 == 0:
            # Rows that see nothing, in runs longer than a block, with bounds of their own choice.
            nothing = torch.rand(start.shape[0], (start.shape[1] + 39) // 40) < 0.6
            nothing = nothing.repeat_interleave(40, 1)[:, : start.shape[1]]
            end = torch.where(nothing, start, end)
            end = end.cummax(1).values
            start = torch.where(nothing, end, start).cummax(1).values.minimum(end)
        until = torch.randint(-1, length + 2, (*start.shape[:1], length))
        for visible_until in (None, until, until.int()):
            for holes in (False, True):
                arguments = (start, end, length, visible_until, holes)
                got = ops.mask_columns(*moved(arguments))
                want = intervals.mask_columns(*arguments)
                for g, w in zip(got, want, strict=True):
                    assert g.dtype == torch.int32
                    assert torch.equal(g.cpu(), w), (length, holes)


def test_mask_kernels_of_nothing() -> None:
    spans = torch.tensor([[0, 0, 0], [0, 0, 2]], device=DEVICE)
    rows = ops.mask_rows(spans, "spans", None, None, None, 2, 0, 0, False, 0)
    assert [tuple(x.shape) for x in rows] == [(2, 0), (2, 0), (2, 0), (2,)]
    assert rows[3].tolist() == [0, intervals.RANGE]
    columns = ops.mask_columns(rows[0], rows[1], 3, None, True)
    assert [x.tolist() for x in columns] == [[[0] * 3] * 2] * 3
