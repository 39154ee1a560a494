"""replace_tokens on CPU tensors: values, gradients, strides, bad indices, errors."""

import pytest
import torch

from croc_kernels import ops, replace_tokens
from croc_kernels.replacement.config import place_sums

BACKENDS = ("auto", "reference")
PAIRS = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-pool-fp32"),
    pytest.param(torch.float64, torch.float64, id="fp64"),
]


def draw(shape: tuple[int, ...], m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A selection of 3 in 4 and an index that is nonsense where it must be ignored."""
    where = torch.rand(shape) < 0.75
    index = torch.where(where, torch.randint(m, shape), torch.tensor(-(2**60)))
    return where, index


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(37,), (2, 9), (2, 3, 5), ()], ids=str)
def test_replace_tokens_values_and_gradients(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    where, index = draw(shape, 6)
    embeddings = torch.randn(*shape, 13).to(dtype).requires_grad_()
    pool = torch.randn(6, 13).to(pool_dtype).requires_grad_()
    out = replace_tokens(embeddings, where, pool, index, backend=backend)
    rows = zip(where.flatten(), index.flatten(), embeddings.reshape(-1, 13), strict=True)
    expected = torch.stack([pool[i].to(dtype) if w else e for w, i, e in rows])
    assert out.dtype == dtype
    assert torch.equal(out, expected.reshape(out.shape))

    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (embeddings, pool), upstream)
    assert torch.equal(grads[0], torch.where(where[..., None], 0, upstream))
    exact = torch.zeros(6, 13, dtype=torch.float64)
    exact.index_add_(0, index[where], upstream[where].double())
    assert grads[1].dtype == pool_dtype
    # float32 sums, rounded once.
    double = torch.float64 in (dtype, pool_dtype)
    exact = exact if double else exact.float()
    rtol = {torch.float64: 1e-13, torch.float32: 1e-6}.get(pool_dtype, 0.0)
    torch.testing.assert_close(grads[1], exact.to(pool_dtype), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_replace_tokens_gradcheck(backend: str) -> None:
    where, index = draw((2, 5), 3)
    inputs = (torch.randn(2, 5, 4).double(), torch.randn(3, 4).double())
    assert torch.autograd.gradcheck(
        lambda e, p: replace_tokens(e, where, p, index, backend=backend),
        [x.requires_grad_() for x in inputs],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_replace_tokens_sums_many_small_gradients_in_float32(backend: str) -> None:
    # In bf16 the sum would stop growing at 256.
    where, index = torch.ones(4096, dtype=torch.bool), torch.zeros(4096, dtype=torch.int64)
    pool = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    embeddings = torch.zeros(4096, 3, dtype=torch.bfloat16)
    replace_tokens(embeddings, where, pool, index, backend=backend).sum().backward()
    assert pool.grad.tolist() == [[4096.0] * 3, [0.0] * 3]


def test_replace_tokens_repeats_bitwise() -> None:
    where, index = draw((5000,), 7)
    upstream = torch.randn(5000, 16)
    grads = []
    for _ in range(2):
        pool = torch.zeros(7, 16, requires_grad=True)
        replace_tokens(torch.zeros(5000, 16), where, pool, index).backward(upstream)
        grads.append(pool.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_replace_tokens_gives_the_gradients_that_are_wanted(wanted: tuple[bool, bool]) -> None:
    where, index = draw((2, 9), 6)
    embeddings, pool = torch.randn(2, 9, 4), torch.randn(6, 4)
    embeddings.requires_grad_(wanted[0])
    pool.requires_grad_(wanted[1])
    out = replace_tokens(embeddings, where, pool, index)
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.square().sum().backward()
    assert (embeddings.grad is not None, pool.grad is not None) == wanted


def test_replace_tokens_takes_any_strides() -> None:
    where, index = draw((3, 8), 5)
    wide, pool = torch.randn(3, 20, 24), torch.randn(12, 5).T
    for embeddings in (wide[:, 4:12, ::2], wide.transpose(1, 2)[:, :8, :12], wide[:1, :8, :12]):
        leaf = embeddings.expand(3, 8, 12)
        expected = replace_tokens(leaf.contiguous(), where, pool.contiguous(), index)
        out = replace_tokens(leaf, where, pool, index)
        assert torch.equal(out, expected)
        assert out.is_contiguous()
    # The gradient of a sum is one number, expanded to stride 0.
    leaf = torch.randn(3, 8, 12, requires_grad=True)
    replace_tokens(leaf, where, pool, index).sum().backward()
    assert torch.equal(leaf.grad, (~where).float()[..., None].expand_as(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_replace_tokens_of_nothing(shape: tuple[int, ...], backend: str) -> None:
    where, index = draw(shape, 5)
    embeddings = torch.randn(*shape, 4, requires_grad=True)
    pool = torch.randn(5, 4, requires_grad=True)
    out = replace_tokens(embeddings, where, pool, index, backend=backend)
    assert out.shape == embeddings.shape
    out.sum().backward()
    assert torch.equal(pool.grad, torch.zeros(5, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_replace_tokens_without_selection_needs_no_pool(backend: str) -> None:
    embeddings, where = torch.randn(3, 4), torch.zeros(3, dtype=torch.bool)
    index = torch.full((3,), -1)
    out = replace_tokens(embeddings, where, torch.zeros(0, 4), index, backend=backend)
    assert torch.equal(out, embeddings)
    assert out.data_ptr() != embeddings.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("value", [-1, -7, 5, 2**31 - 1])
def test_replace_tokens_refuses_an_index_out_of_range(
    value: int, integer: torch.dtype, backend: str
) -> None:
    where = torch.tensor([False, True, False])
    index = torch.tensor([-9, value, 99], dtype=integer)
    message = rf"^replace_tokens: index must be in \[0, 5\) where selected, got {value}$"
    with pytest.raises(ValueError, match=message):
        replace_tokens(torch.randn(3, 4), where, torch.randn(5, 4), index, backend=backend)


def test_replace_tokens_ignores_autocast() -> None:
    where, index = draw((2, 9), 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = replace_tokens(torch.randn(2, 9, 4), where, torch.randn(6, 4), index)
    assert out.dtype == torch.float32


_E, _W, _P, _I = (
    torch.zeros(2, 3, 4),
    torch.zeros(2, 3, dtype=torch.bool),
    torch.zeros(5, 4),
    torch.zeros(2, 3, dtype=torch.int64),
)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "embeddings must be a torch.Tensor, got NoneType", (None, _W, _P, _I)),
        (TypeError, "where must be a torch.Tensor, got int", (_E, 1, _P, _I)),
        (
            TypeError,
            "embeddings must have dtype float16, bfloat16, float32, float64, got int64",
            (_E.long(), _W, _P, _I),
        ),
        (
            TypeError,
            "pool must have dtype float16, bfloat16, float32, float64, got bool",
            (_E, _W, _P.bool(), _I),
        ),
        (TypeError, "where must have dtype bool, got int64", (_E, _I, _P, _I)),
        (TypeError, "index must have dtype int32, int64, got float32", (_E, _W, _P, _I.float())),
        (ValueError, "embeddings must be (..., C), got ()", (torch.zeros(()), _W, _P, _I)),
        (
            ValueError,
            "where must be embeddings.shape[:-1] = (2, 3), got (3,)",
            (_E, _W[0], _P, _I),
        ),
        (ValueError, "index must be where.shape = (2, 3), got (2,)", (_E, _W, _P, _I[:, 0])),
        (ValueError, "pool must be (M, C), got (4,)", (_E, _W, _P[0], _I)),
        (ValueError, "pool must be (M, C) = (5, 4), got (5, 3)", (_E, _W, _P[:, 1:], _I)),
        (
            ValueError,
            "pool must be on the device of embeddings, cpu, got meta",
            (_E, _W, _P.to("meta"), _I),
        ),
        (
            ValueError,
            "index must be on the device of embeddings, cpu, got meta",
            (_E, _W, _P, _I.to("meta")),
        ),
    ],
)
def test_replace_tokens_errors(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error) as caught:
        replace_tokens(*arguments)
    assert str(caught.value) == f"replace_tokens: {message}"


def test_replace_tokens_opcheck() -> None:
    where = torch.tensor([[False, True, True], [True, False, True]])
    index = torch.tensor([[-9, 2, 0], [2, 99, 4]])
    embeddings, pool = torch.randn(2, 3, 4), torch.randn(5, 4)
    torch.library.opcheck(ops.replace_tokens_fwd, (embeddings, where, pool, index))
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (embeddings.bfloat16(), where, index, 5, torch.float32, *wanted)
        torch.library.opcheck(ops.replace_tokens_bwd, arguments)


@pytest.mark.parametrize(("tiles", "sums"), [(8192, 2304), (32768, 3072), (5, 9), (40, 1), (1, 1)])
def test_replace_tokens_config_places_sums_among_tiles(tiles: int, sums: int) -> None:
    programs, lead, ratio = place_sums(tiles, sums)
    assert lead == tiles * 9 // 20
    assert ratio >= 1
    # The last sum's turn, and the last tile behind all sums, have a program.
    assert programs == max(tiles + sums, lead + sums * (ratio + 1))
    assert place_sums(tiles, 0) == (tiles, tiles, 0)
    assert place_sums(0, sums) == (sums, 0, 0)
