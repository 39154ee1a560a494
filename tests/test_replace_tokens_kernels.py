"""The Triton kernels of replace_tokens: see kernel_device.py."""

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, PAIRS, draw, needs_kernels
from torch import Tensor

from croc_kernels import ops, replace_tokens
from croc_kernels.replacement import kernel
from croc_kernels.testing import assert_within_budget

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter is paid by the program, not by the row.
    if INTERPRETED:
        monkeypatch.setattr(kernel, "ROWS", 16)
        monkeypatch.setattr(kernel, "GRADIENT_ROWS", 16)


def selection(shape: tuple[int, ...], m: int) -> tuple[Tensor, Tensor]:
    where = torch.rand(shape) < 0.75
    index = torch.where(where, torch.randint(m, shape), torch.tensor(-(2**60)))
    return where.to(DEVICE), index.to(DEVICE)


def replace_and_gradients(
    embeddings: Tensor, where: Tensor, pool: Tensor, index: Tensor, upstream: Tensor, backend: str
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in (embeddings, pool)]
    out = replace_tokens(leaves[0], where, leaves[1], index, backend=backend)
    return out, *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(
    ("shape", "m", "dim"),
    [((64,), 4, 64), ((3, 21), 5, 131), ((2, 3, 5), 12, 17), ((), 1, 1), ((2, 9), 1, 1100)],
    ids=str,
)
def test_replace_tokens_kernel(
    shape: tuple[int, ...], m: int, dim: int, pool_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    where, index = selection(shape, m)
    embeddings, pool = draw(*shape, dim, dtype=dtype), draw(m, dim, dtype=pool_dtype)
    upstream = draw(*shape, dim, dtype=dtype)
    operands = (embeddings, where, pool, index, upstream)
    out, grad, pool_grad = replace_and_gradients(*operands, "triton")
    expected, expected_grad, plain = replace_and_gradients(*operands, "reference")
    assert torch.equal(out, expected)
    assert torch.equal(grad, expected_grad)
    exact = torch.zeros(m, dim, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, index[where], upstream[where].double())
    assert pool_grad.dtype == pool.dtype
    assert_within_budget(pool_grad, exact, plain, pool.dtype, "pool gradient")
    assert (pool_grad[exact.eq(0).all(-1)] == 0).all()


def test_replace_tokens_kernel_all_draw_one_row() -> None:
    # What nearest-row matching does at the start: one segment of all tokens.
    where = torch.ones(130, dtype=torch.bool, device=DEVICE)
    index = torch.full((130,), 3, device=DEVICE)
    pool = draw(5, 40).requires_grad_()
    upstream = draw(130, 40)
    grads = [
        torch.autograd.grad(
            replace_tokens(draw(130, 40), where, pool, index, backend="triton"), pool, upstream
        )[0]
        for _ in range(2)
    ]
    assert torch.equal(*grads)
    torch.testing.assert_close(grads[0][3].double(), upstream.double().sum(0), rtol=0, atol=1e-4)
    assert grads[0].count_nonzero() == 40


@pytest.mark.parametrize("sizes", [(4, 16, 4, 4), (8, 64, 16, 32), (32, 8192, 256, 256)], ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("most", [1, 3, 13], ids=lambda most: f"{most}-of-13")
def test_replace_tokens_kernel_sorts_what_was_drawn(
    most: int, integer: torch.dtype, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in zip(("GROUP", "SORT_BLOCK", "SORT_LIST", "CHUNK"), sizes, strict=True):
        monkeypatch.setattr(kernel, name, size)
    where = (torch.rand(5, 30) < 0.7).to(DEVICE)
    index = torch.randint(-1, most + 1, (5, 30), dtype=integer, device=DEVICE)
    pool, upstream = draw(13, 8, dtype=torch.float64).requires_grad_(), draw(5, 30, 8).double()
    embeddings = draw(5, 30, 8).double()
    out = replace_tokens(embeddings, where, pool, index, backend="triton")
    (got,) = torch.autograd.grad(out, pool, upstream)
    drawn = where & (index >= 0) & (index < 13)
    want = torch.zeros_like(pool).index_add_(0, index[drawn].long(), upstream[drawn])
    torch.testing.assert_close(got, want)


def test_replace_tokens_kernel_sums_long_segments_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Segments of 0 to 40 tokens against chunks of 8: within one, over an edge, over many, one that
    # ends where the next begins, and two long ones that meet in a chunk.
    monkeypatch.setattr(kernel, "CHUNK", 8)
    lengths = [3, 8, 9, 0, 12, 40, 1, 17, 8, 24]
    index = torch.arange(10).repeat_interleave(torch.tensor(lengths))
    index = index[torch.randperm(len(index))].to(DEVICE)
    where = torch.ones(len(index), dtype=torch.bool, device=DEVICE)
    pool, upstream = draw(10, 2000).requires_grad_(), draw(len(index), 2000)
    grads = [
        torch.autograd.grad(
            replace_tokens(upstream, where, pool, index, backend="triton"), pool, upstream
        )[0]
        for _ in range(2)
    ]
    assert torch.equal(*grads)
    want = torch.zeros(10, 2000, dtype=torch.float64, device=DEVICE)
    want.index_add_(0, index, upstream.double())
    torch.testing.assert_close(grads[0].double(), want, rtol=0, atol=1e-5)


def test_replace_tokens_kernel_bad_index_is_nan() -> None:
    where = torch.tensor([True, True, True, False, True], device=DEVICE)
    index = torch.tensor([0, -1, 4, 99, -(2**63)], device=DEVICE)
    embeddings, pool = draw(5, 20).requires_grad_(), draw(4, 20).requires_grad_()
    out = replace_tokens(embeddings, where, pool, index, backend="triton")
    bad = torch.tensor([False, True, True, False, True], device=DEVICE)
    assert torch.equal(out.isnan().all(-1), bad)
    assert torch.equal(out.isnan().any(-1), bad)
    grads = torch.autograd.grad(out, (embeddings, pool), torch.ones_like(out))
    expected = torch.zeros(5, 20, device=DEVICE)
    expected[3] = 1.0
    assert torch.equal(grads[0], expected)
    expected = torch.zeros(4, 20, device=DEVICE)
    expected[0] = 1.0
    assert torch.equal(grads[1], expected)


def test_replace_tokens_kernel_strides() -> None:
    where, index = selection((3, 8), 5)
    wide, pool = draw(3, 20, 48), draw(24, 5).T
    for embeddings in (
        wide[:, 4:12, 5:29],
        wide[:, :8, ::2],
        wide.transpose(1, 2)[:, :8, :20].expand(3, 8, 20)[..., :12].repeat(1, 1, 2),
        wide[:1, :8, :24].expand(3, 8, 24),
    ):
        upstream = draw(24, 8, 3).permute(2, 1, 0)
        leaf, row = embeddings.detach().requires_grad_(), pool.detach().requires_grad_()
        out = replace_tokens(leaf, where, row, index, backend="triton")
        assert torch.equal(out, replace_tokens(embeddings, where, pool, index, backend="reference"))
        grads = torch.autograd.grad(out, (leaf, row), upstream)
        assert torch.equal(grads[0], torch.where(where[..., None], 0.0, upstream))
        exact = torch.zeros(5, 24, device=DEVICE).index_add_(0, index[where], upstream[where])
        torch.testing.assert_close(grads[1], exact)
    # Five dimensions, and the stride-0 gradient of a sum.
    deep = draw(2, 3, 4, 2, 8).requires_grad_()
    where, index = selection((2, 3, 4, 2), 5)
    rows = draw(5, 8)
    replace_tokens(deep, where, rows, index, backend="triton").sum().backward()
    assert torch.equal(deep.grad, (~where).float()[..., None].expand_as(deep))


@pytest.mark.parametrize("pool_size", [1, 7, 300])
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)], ids=str)
def test_replace_tokens_kernel_sums_lie_among_tiles(
    wanted: tuple[bool, bool], pool_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From many tiles per sum to more sums than tiles; two columns of tiles, the second not full.
    monkeypatch.setattr(kernel, "GRADIENT_ROWS", 2)
    where, index = selection((67,), pool_size)
    upstream = draw(67, 1100).round(decimals=1)
    tiles, pool = ops.replace_tokens_bwd(upstream, where, index, pool_size, torch.float64, *wanted)
    if wanted[0]:
        assert torch.equal(tiles, torch.where(where[:, None], 0.0, upstream))
    if wanted[1]:
        want = torch.zeros(pool_size, 1100, dtype=torch.float64, device=DEVICE)
        want.index_add_(0, index[where], upstream[where].double())
        torch.testing.assert_close(pool, want)


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_replace_tokens_kernel_of_nothing(shape: tuple[int, ...]) -> None:
    where, index = selection(shape, 5)
    embeddings, pool = draw(*shape, 4).requires_grad_(), draw(5, 4).requires_grad_()
    replace_tokens(embeddings, where, pool, index, backend="triton").sum().backward()
    assert torch.equal(pool.grad, torch.zeros(5, 4, device=DEVICE))
