"""The Triton kernels in Triton's interpreter, fp16 and fp32 (bfloat16 products are wrong there).

Run by test_mixed_attention_kernels_in_the_interpreter in a process of its own, or by hand:
``TRITON_INTERPRET=1 pytest tests/test_mixed_attention_interpreter.py``. The interpreter's tiles are
32 x 32.
"""

import math
import os

import pytest
import torch
from mixed_attention_cases import (
    MASKS,
    VECTORS,
    as_views,
    check,
    every_second,
    expanded,
    gradients,
    inputs,
)

from croc_kernels.attention import config, hopper_backward
from croc_kernels.attention.api import mixed_attention
from croc_kernels.attention.mask import MixedMask

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "1", reason="needs TRITON_INTERPRET=1 from the start"
)


def run(mask, **options):
    return lambda *x: mixed_attention(*x, mask, return_lse=True, backend="triton", **options)


@pytest.mark.parametrize("name", MASKS)
def test_kernels_every_mask(name):
    mask = MASKS[name](2, 45, "cpu")
    q, k, v = inputs(mask, 2, 1, 16, torch.float32)
    check(run(mask, deterministic=True), q, k, v, mask, 0.25)


@pytest.mark.parametrize("name", ["visual", "packed", "window-old", "until"])
def test_kernels_with_atomic_sums(name):
    mask = MASKS[name](1, 71, "cpu")
    q, k, v = inputs(mask, 2, 1, 16, torch.float32)
    check(run(mask, deterministic=False), q, k, v, mask, 0.25)


@pytest.mark.parametrize("dim", config.HEAD_DIMS)
def test_kernels_every_head_dimension(dim):
    mask = MASKS["visual"](1, 40, "cpu")
    q, k, v = inputs(mask, 1, 1, dim, torch.float16)
    check(run(mask, deterministic=dim > 80), q, k, v, mask, 1 / math.sqrt(dim))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
def test_kernels_every_length(length):
    mask = MASKS["spans"](1, length, "cpu")
    check(run(mask), *inputs(mask, 1, 1, 16, torch.float16), mask, 0.25)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 80), (torch.float32, 16)])
def test_kernels_soft_cap(dtype, dim):
    mask = MASKS["left"](2, 40, "cpu")
    q, k, v = inputs(mask, 2, 2, dim, dtype)
    check(run(mask, scale=0.7, softcap=2.0), q, k, v, mask, 0.7, 2.0)


@pytest.mark.parametrize("group", [3, 4])
def test_kernels_shared_key_heads(group):
    mask = MASKS["cache"](1, 70, "cpu")
    check(run(mask), *inputs(mask, 2 * group, 2, 16, torch.float16), mask, 0.25)


@pytest.mark.parametrize("kind", ["large", "outlier", "equal"])
def test_kernels_hard_numbers(kind):
    """Scores that float32 holds exactly: the kernels compute them as q k' and as k q', which the
    BLAS of NumPy adds up in one order or in two, and a weight is e to their difference.
    """
    mask = MASKS["window"](1, 70, "cpu")
    q, k, v = (x.detach() for x in inputs(mask, 1, 1, 16, torch.float32))
    q, k = (q * 8).round() / 8, (k * 8).round() / 8
    if kind == "large":
        q, k = q * 100, k * 100
    elif kind == "outlier":
        k[:, :, 40] *= 1000
    else:
        q, k = torch.ones_like(q), torch.ones_like(k)
    check(run(mask, scale=1.0), q, k, v, mask, 1.0)


@pytest.mark.parametrize(
    "name", ["visual", "spans", "left", "right", "holes", "window-old", "until", "cache"]
)
def test_kernels_recover_the_mask_bit_for_bit(name):
    mask = MASKS[name](2, 64, "cpu")
    q, k = torch.zeros(2, 1, mask.num_queries, 64), torch.zeros(2, 1, 64, 64)
    v = torch.eye(64).expand(2, 1, 64, 64)
    out = mixed_attention(q, k, v, mask)
    assert torch.equal(out > 0, mask.to_dense())


@pytest.mark.parametrize(
    ("name", "deterministic"),
    [("left", True), ("right", True), ("holes", True), ("cache-holes", True), ("until", True),
     ("right", False), ("holes", False)],
)  # fmt: skip
def test_kernels_nan_in_unseen_places_reaches_nothing(name, deterministic):
    mask = MASKS[name](2, 40, "cpu")
    dense = mask.to_dense()
    q, k, v = inputs(mask, 1, 1, 16, torch.float32)
    clean = gradients(run(mask, deterministic=deterministic), q, k, v, torch.float32)
    sees, seen = dense.any(-1)[..., None], dense.any(-2)[..., None]
    bad = float("nan")
    with torch.no_grad():
        leaves = [torch.where(sees, q, bad), torch.where(seen, k, bad), torch.where(seen, v, bad)]
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = run(mask, deterministic=deterministic)(*leaves)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator)
    lse_weight = torch.randn(lse.shape, generator=generator)
    weight, lse_weight = torch.where(sees, weight, bad), torch.where(sees[..., 0], lse_weight, bad)
    grads = torch.autograd.grad((out, lse), leaves, (weight, lse_weight))
    for got, want in zip((out, *grads), (clean[0], *clean[2:]), strict=True):
        assert torch.equal(got, want)
    assert bool((out[~sees.expand_as(out)] == 0).all())
    assert bool((lse[~sees[..., 0].expand_as(lse)] == float("-inf")).all())


def test_kernels_take_strides_and_repeat_bitwise():
    mask = MASKS["visual"](2, 40, "cpu")
    packed = torch.randn(2, 40, 4, 32)
    q, k, v = (packed[:, :, a:b].transpose(1, 2)[..., :16] for a, b in ((0, 2), (2, 3), (3, 4)))
    first = gradients(run(mask, deterministic=True), q, k, v, torch.float32)
    again = gradients(
        run(mask, deterministic=True), *(x.contiguous() for x in (q, k, v)), torch.float32
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("vector", VECTORS)
def test_kernels_step_by_the_stride_of_each_vector_of_the_mask(vector):
    """Forward and both halves of the backward used to take a batch of vectors for contiguous."""
    mask = MASKS["holes"](3, 40, "cpu")
    q, k, v = inputs(mask, 1, 1, 16, torch.float32)
    want = gradients(run(mask, deterministic=True), q, k, v, torch.float32)
    views = as_views(mask, (vector,))
    assert getattr(views, vector).stride(0) != getattr(mask, vector).stride(0)
    got = gradients(run(views, deterministic=True), q, k, v, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("make", [as_views, every_second, expanded])
@pytest.mark.parametrize("name", ["left", "holes", "cache"])
def test_kernels_take_masks_that_are_views(name, make):
    mask = make(MASKS[name](3, 40, "cpu"))
    assert not mask.start.is_contiguous()
    q, k, v = inputs(mask, 2, 1, 16, torch.float16)
    check(run(mask, deterministic=True), q, k, v, mask, 0.25)


def test_kernels_refuse_what_they_do_not_have():
    mask = MixedMask.causal(1, 4)
    x = torch.zeros(1, 1, 4, 72)
    with pytest.raises(ValueError, match="D must be one of") as caught:
        mixed_attention(x, x, x, mask)
    assert str(caught.value) == (
        "mixed_attention: D must be one of (16, 32, 64, 80, 96, 128, 160, 192, 256), got 72; "
        'pad the head, or use backend="reference"'
    )
    x = torch.zeros(1, 1, 4, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64") as caught:
        mixed_attention(x, x, x, mask)
    assert str(caught.value) == (
        "mixed_attention: dtype must be float16, bfloat16 or float32 for the Triton kernels, got "
        'float64, or use backend="reference"'
    )


def test_kernels_of_nothing():
    mask = MixedMask.causal(0, 5)
    x = torch.zeros(0, 2, 5, 16, requires_grad=True)
    mixed_attention(x, x, x, mask).sum().backward()
    assert x.grad.shape == x.shape


def fragments(rows, cols):
    """Place of element (row, column) in a tile of dQ as eight warps hold it, 4 values at a time."""
    warps = 4 if rows == 64 else 8
    width = cols * warps // 8
    places = torch.empty(rows, cols, dtype=torch.int64)
    for r in range(rows):
        for c in range(cols):
            warp = r // 16 % warps + warps * (c // width)
            lane = r % 8 * 4 + c % 8 // 2
            quad = r // (16 * warps) * (width // 8) + c % width // 8
            places[r, c] = ((quad * 8 + warp) * 32 + lane) * 4 + r // 8 % 2 * 2 + c % 2
    return places


@pytest.mark.parametrize(("dim", "block_m"), [(64, 64), (64, 128), (128, 64), (256, 64)])
@pytest.mark.parametrize("early", [True, False])
def test_kernels_finish_puts_the_gradient_of_queries_in_rows(dim, block_m, early, monkeypatch):
    transposed, length = dim >= 128, block_m + 5
    shape = (dim, block_m) if transposed else (block_m, dim)
    places = fragments(*shape)
    assert places.flatten().sort().values.equal(torch.arange(dim * block_m))
    tiles = torch.randn(8, *shape)
    sums = torch.empty(8, dim * block_m)
    sums[:, places.flatten()] = tiles.flatten(1)
    got = torch.full((2, length, 2, dim), float("nan")).transpose(1, 2)
    monkeypatch.setattr(hopper_backward, "gdc_wait", lambda: None)
    # Two key heads, and three programs for each; the other counts are not what is waited for.
    counts = torch.tensor([0, 0, 0, 0, 0, 3, 3, 0, 0], dtype=torch.int32)
    hopper_backward._finish_kernel[(8,)](
        sums, got, got.stride()[:3], 0.5, length, counts, 3, HEADS=2, GROUP=2, D=dim,
        BLOCK_M=block_m, TRANSPOSED=transposed, WAIT=True, EARLY=early,
    )  # fmt: skip
    rows = (tiles.mT if transposed else tiles).reshape(2, 2, 2 * block_m, dim)
    assert torch.equal(got, 0.5 * rows[:, :, :length])


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("how", ["whole", (6, False), (4, False), (4, True)])
def test_kernels_prepare_marks_rows_that_see_nothing(with_lse, how, monkeypatch):
    """Of two samples with three heads each: zeros for the first heads, and statistics for all or
    for those alone. Nothing to zero where one tile holds all keys.
    """
    whole = how == "whole"
    first, part = (6, False) if whole else how
    monkeypatch.setattr(hopper_backward, "gdc_launch_dependents", lambda: None)
    length, block_m, dim = 100, 64, 32
    out, grad = (torch.randn(2, length, 3, dim).transpose(1, 2) for _ in range(2))
    grad_lse = torch.randn(2, 3, length)
    lse = torch.randn(2, 3, length)
    blind = torch.zeros(2, 1, length, dtype=torch.bool)
    blind[1, :, 70:80] = True
    lse = lse.masked_fill(blind, float("-inf"))
    hidden = grad.masked_fill(blind[..., None], float("nan"))
    stats, sums = torch.full((12, 2, block_m), 3.0), torch.full((12, 64 * dim), 7.0)
    dirty, counts = torch.full((2, 2), -1).int(), torch.full((25,), -1).int()
    hopper_backward._prepare_kernel[(2 * (first + 2) if part else 12,)](
        out, hidden, lse, grad_lse, stats, dirty, counts, sums,
        (*out.stride()[:3], *hidden.stride()[:3]), length, 6, first,
        HEADS=3, D=dim, BLOCK_M=block_m, HAS_GRAD_LSE=with_lse, ORDERED=True, PART=part,
        LAUNCH=True, WHOLE=whole,
    )  # fmt: skip
    got = stats.reshape(6, 2, 2, block_m).transpose(1, 2).reshape(6, 2, 128)
    want = torch.full((2, 3, 128), float("inf"))
    want[..., :length] = lse.masked_fill(blind, float("inf"))
    delta = torch.zeros(2, 3, 128)
    delta[..., :length] = (out * grad).sum(-1) - with_lse * config.LOG2_E * grad_lse
    delta = delta.masked_fill(want == float("inf"), 0.0).flatten(0, 1)
    made = first if part else 6
    assert torch.equal(got[:made, 0], want.flatten(0, 1)[:made])
    torch.testing.assert_close(got[:made, 1], delta[:made])
    assert (got[made:] == 3.0).all()
    assert dirty.tolist() == [[0, 0], [0, 10]]
    if whole:
        assert (counts == -1).all()
        assert (sums == 7.0).all()
        return
    # What is counted for all six heads, and turns at two tiles of each of the first.
    assert not counts[: 13 + 2 * first].any()
    assert (counts[13 + 2 * first :] == -1).all()
    assert not sums[: 2 * first].any()
    assert (sums[2 * first :] == 7.0).all()
