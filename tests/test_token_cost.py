"""token_cost on CPU tensors, its definition, its errors and its tile shapes."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from croc_kernels import ops, token_cost
from croc_kernels.cost import reference
from croc_kernels.cost.config import HOPPER, candidates, one_matrix, pick_config, pick_hopper
from croc_kernels.testing import assert_within_budget, clustered_tokens

METRICS = ("l2", "l2sq", "cosine")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("auto", "reference")


def exact_cost(tokens: Tensor, pool: Tensor, metric: str) -> Tensor:
    """Float64 costs, every difference written out."""
    x, p = tokens.double()[..., :, None, :], pool.double()
    if metric == "cosine":
        return 1.0 - (x * p).sum(-1) / (x.norm(dim=-1) * p.norm(dim=-1))
    square = (x - p).square().sum(-1)
    return square if metric == "l2sq" else square.sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("shape", "m"),
    [
        pytest.param((64, 128), 64, id="N64-M64-C128"),
        pytest.param((2, 63, 257), 131, id="B2-N63-M131-C257"),
        pytest.param((1, 1, 1), 1, id="B1-N1-M1-C1"),
        pytest.param((300, 48), 17, id="N300-M17-C48"),
    ],
)
def test_token_cost_agrees_with_float64(
    shape: tuple[int, ...], m: int, metric: str, dtype: torch.dtype
) -> None:
    tokens = torch.randn(shape).to(dtype)
    pool = torch.randn(m, shape[-1]).to(dtype)
    exact = exact_cost(tokens, pool, metric)
    cost = token_cost(tokens, pool, metric)
    assert cost.dtype == torch.float32
    assert cost.is_contiguous()
    torch.testing.assert_close(cost.double(), exact, rtol=1e-6, atol=1e-6)
    plain = exact_cost(tokens.float(), pool.float(), metric).float()
    assert_within_budget(cost, exact, plain, torch.float32, "token_cost")
    by_reference = token_cost(tokens, pool, metric, backend="reference")
    torch.testing.assert_close(by_reference.double(), exact, rtol=1e-7, atol=2e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_token_cost_reference_is_float64_and_differentiable(metric: str) -> None:
    tokens = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    pool = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    cost = reference.token_cost(tokens, pool, metric=metric)
    assert cost.dtype == torch.float64
    torch.testing.assert_close(cost, exact_cost(tokens, pool, metric), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda x, p: reference.token_cost(x, p, metric=metric), (tokens, pool)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_token_cost_survives_cancellation(metric: str, backend: str) -> None:
    pool = 50.0 * torch.randn(20, 333)
    tokens = pool[[3, 19, 0]] + torch.tensor([[0.0], [0.0], [1e-4]])
    cost = token_cost(tokens, pool, metric, backend=backend)
    norm = 1.0 if metric == "cosine" else pool.norm(dim=-1)[[3, 19, 0]]
    assert not cost.isnan().any()
    assert (cost >= 0).all()
    on_itself = cost[[0, 1, 2], [3, 19, 0]]
    assert (on_itself <= 1e-3 * norm).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_cost_of_a_zero_row(backend: str) -> None:
    tokens = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    pool = torch.tensor([[0.0, 0.0], [0.6, 0.8]])
    by_angle = token_cost(tokens, pool, "cosine", backend=backend)
    torch.testing.assert_close(by_angle, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    by_length = token_cost(tokens, pool, "l2", backend=backend)
    torch.testing.assert_close(by_length, torch.tensor([[0.0, 1.0], [5.0, 4.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_token_cost_passes_nan_on(metric: str, backend: str) -> None:
    tokens, pool = torch.randn(3, 8), torch.randn(5, 8)
    tokens[1, 2] = pool[4, 0] = float("nan")
    bad = token_cost(tokens, pool, metric, backend=backend).isnan()
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[1], expected[:, 4] = True, True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[0, 5, 3], [7, 7, 7], [100, -2, 1]], ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_token_cost_leaves_rows_past_the_count(
    integer: torch.dtype, counts: list[int], backend: str
) -> None:
    tokens, pool = torch.randn(3, 7, 10), torch.randn(6, 10)
    for image, count in enumerate(counts):
        tokens[image, max(count, 0) :] = float("nan")
    num_rows = torch.tensor(counts, dtype=integer)
    cost = token_cost(tokens, pool, num_rows=num_rows, backend=backend)
    live = torch.arange(7) < num_rows[:, None]
    assert (cost[~live] == 0).all()
    torch.testing.assert_close(cost[live].double(), exact_cost(tokens, pool, "l2")[live])


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_cost_gathers_rows(backend: str) -> None:
    tokens, pool = torch.randn(23, 9), torch.randn(4, 9)
    index = torch.randint(23, (2, 6))
    expected = token_cost(tokens[index], pool, backend=backend)
    assert torch.equal(token_cost(tokens, pool, token_index=index, backend=backend), expected)
    flat = token_cost(tokens, pool, token_index=index[0], backend=backend)
    assert torch.equal(flat, expected[0])
    # Past the count an index may be anything.
    index[1, 2:] = torch.tensor([-1, 23, -(2**40), 2**40])
    arguments = {"token_index": index, "num_rows": torch.tensor([6, 2]), "backend": backend}
    cost = token_cost(tokens, pool, **arguments)
    assert torch.equal(cost[1, :2], expected[1, :2])
    assert (cost[1, 2:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-1, 23])
def test_token_cost_refuses_an_index_out_of_range(value: int, backend: str) -> None:
    message = rf"^token_cost: token_index must be in \[0, 23\), got {value}$"
    with pytest.raises(ValueError, match=message):
        token_cost(
            torch.randn(23, 9),
            torch.randn(4, 9),
            token_index=torch.tensor([0, value]),
            backend=backend,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_cost_takes_any_strides(backend: str) -> None:
    wide, pool = torch.randn(3, 40, 64), torch.randn(50, 32)
    for tokens in (wide[:, 5:17, ::2], wide.transpose(0, 1)[..., :32], wide[1:2, :, 32:]):
        expected = token_cost(tokens.contiguous(), pool.contiguous(), backend=backend)
        assert torch.equal(token_cost(tokens, pool.T.contiguous().T, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "m"), [((0, 4), 3), ((2, 0, 4), 3), ((0, 5, 4), 3), ((5, 4), 0)], ids=str
)
def test_token_cost_of_nothing(shape: tuple[int, ...], m: int, backend: str) -> None:
    cost = token_cost(torch.randn(shape), torch.randn(m, 4), backend=backend)
    assert cost.shape == (*shape[:-1], m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_cost_matching_is_optimal(dtype: torch.dtype) -> None:
    tokens = clustered_tokens(1, 48, 256, clusters=8)[0].to(dtype)
    for scale in (1.0, 1 / 16):
        pool = (scale * torch.randn(96, 256)).to(dtype)
        exact = exact_cost(tokens, pool, "l2").numpy()
        best = exact[linear_sum_assignment(exact)].sum()
        found = linear_sum_assignment(token_cost(tokens, pool).numpy())
        assert exact[found].sum() <= best * (1 + 1e-6)


def test_token_cost_has_no_gradient_and_ignores_autocast() -> None:
    tokens = torch.randn(3, 8, requires_grad=True)
    pool = torch.nn.Parameter(torch.randn(5, 8))
    expected = token_cost(tokens, pool)
    assert not expected.requires_grad
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cost = token_cost(tokens, pool, backend=backend)
        torch.testing.assert_close(cost, expected)


def test_token_cost_repeats_bitwise() -> None:
    tokens, pool = torch.randn(2, 300, 65), torch.randn(77, 65)
    assert torch.equal(token_cost(tokens, pool), token_cost(tokens, pool))


_X, _P = torch.zeros(2, 3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "tokens must be a torch.Tensor, got list", ([[1.0]], _P), {}),
        (TypeError, "pool must be a torch.Tensor, got ndarray", (_X, np.zeros((5, 4))), {}),
        (
            TypeError,
            "tokens must have dtype float16, bfloat16, float32, got float64",
            (_X.double(), _P.double()),
            {},
        ),
        (
            TypeError,
            "pool must have the dtype of tokens, float32, got float16",
            (_X, _P.half()),
            {},
        ),
        (ValueError, "tokens must be ([B,] N, C), got (4,)", (_X[0, 0], _P), {}),
        (ValueError, "pool must be (M, C), got (1, 5, 4)", (_X, _P[None]), {}),
        (ValueError, "pool must be (M, C) = (5, 4), got (5, 3)", (_X, _P[:, 1:]), {}),
        (
            ValueError,
            "metric must be one of ('l2', 'l2sq', 'cosine'), got 'l1'",
            (_X, _P, "l1"),
            {},
        ),
        (
            ValueError,
            "backend must be one of ('auto', 'triton', 'reference'), got 'cuda'",
            (_X, _P),
            {"backend": "cuda"},
        ),
        (
            ValueError,
            "pool must be on the device of tokens, cpu, got meta",
            (_X, _P.to("meta")),
            {},
        ),
        (
            ValueError,
            "tokens must be (S, C) with token_index, got (2, 3, 4)",
            (_X, _P),
            {"token_index": torch.zeros(2, 3, dtype=torch.int64)},
        ),
        (
            TypeError,
            "token_index must have dtype int64, got int32",
            (_X[0], _P),
            {"token_index": torch.zeros(2, 3, dtype=torch.int32)},
        ),
        (
            ValueError,
            "token_index must be ([B,] N), got ()",
            (_X[0], _P),
            {"token_index": torch.zeros((), dtype=torch.int64)},
        ),
        (
            ValueError,
            "tokens must have rows for token_index to name, got none",
            (_X[0, :0], _P),
            {"token_index": torch.zeros(2, 3, dtype=torch.int64)},
        ),
        (
            TypeError,
            "num_rows must have dtype int32, int64, got float32",
            (_X, _P),
            {"num_rows": torch.zeros(2)},
        ),
        (
            ValueError,
            "num_rows must be (B,) = (2,), got (3,)",
            (_X, _P),
            {"num_rows": torch.zeros(3, dtype=torch.int32)},
        ),
    ],
)
def test_token_cost_errors(
    error: type[Exception], message: str, arguments: tuple, options: dict
) -> None:
    with pytest.raises(error) as caught:
        token_cost(*arguments, **options)
    assert str(caught.value) == f"token_cost: {message}"


def test_token_cost_needs_a_gpu_for_triton() -> None:
    with pytest.raises(RuntimeError, match=r'^token_cost: backend="triton" must have CUDA tensors'):
        token_cost(_X, _P, backend="triton")


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 3, 8), torch.randn(5, 8), None, None, "l2"),
        (
            torch.randn(7, 8).bfloat16(),
            torch.randn(5, 8).bfloat16(),
            torch.randint(7, (2, 3)),
            torch.tensor([3, 1], dtype=torch.int32),
            "cosine",
        ),
    ],
    ids=["dense", "gathered"],
)
def test_token_cost_opcheck(arguments: tuple) -> None:
    torch.library.opcheck(ops.token_cost, arguments)
    torch.library.opcheck(ops.nearest_token, arguments)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_cost_config_fits_the_chip(dtype: torch.dtype, arch: int) -> None:
    for rows, pool_size, dim in ((13824, 2048, 4096), (432, 2048, 4096), (1, 1, 1), (9, 9, 4095)):
        config = pick_config(arch, dtype, rows, pool_size, dim)
        step = (config.block_m + 2 * config.half_n) * config.block_k * dtype.itemsize
        # Shared memory of one program: 99 KiB on sm_86, sm_89 and sm_120, 163 on sm_80, then 227.
        limit = {80: 163, 90: 227, 100: 227}.get(arch, 99)
        assert step * config.num_stages <= limit * 1024
        # Two halves' sums and one half's partial sums, in 32-bit registers of a thread.
        sums = config.block_m * config.half_n * 3 // (32 * config.num_warps)
        assert sums <= 192


def test_token_cost_config_uses_the_large_tile_on_a_full_chip() -> None:
    for images in (4, 32, 128):
        large = pick_config(90, torch.bfloat16, images * 432, 2048, 4096)
        assert (large.block_m, 2 * large.half_n) == (128, 256)
    assert pick_config(90, torch.bfloat16, 432, 2048, 4096).half_n == 64
    assert large in candidates(torch.bfloat16)
    assert pick_config(90, torch.float32, 9, 9, 9) in candidates(torch.float32)


def test_token_cost_config_takes_the_hopper_kernel_only_where_it_can() -> None:
    fits = {"rows": 13824, "pool_size": 2048, "dim": 4096, "aligned": True}
    for dtype in (torch.float16, torch.bfloat16):
        assert pick_hopper(90, dtype, **fits) == HOPPER
        for change in ({"aligned": False}, {"dim": 4032}, {"dim": 0}, {"rows": 432}):
            assert pick_hopper(90, dtype, **fits | change) is None
    assert pick_hopper(90, torch.float32, **fits) is None
    assert all(pick_hopper(arch, torch.bfloat16, **fits) is None for arch in (80, 89, 100, 120))
    slots = HOPPER.token_slots * HOPPER.block_m + HOPPER.pool_slots * HOPPER.block_n // 2
    assert slots * HOPPER.block_k * 2 <= 227 << 10
    # A step's halves of the pool's rows share one phase of the barriers.
    assert HOPPER.pool_slots % 2 == 0
    for nearest in (False, True):
        constants = HOPPER.constants(nearest)
        registers = 2 * constants["MULTIPLY_REGISTERS"] + 2 * constants["OTHER_REGISTERS"]
        assert registers * 128 <= 1 << 16
    # A pool of 2048 rows gives each program of an H100 at most one share.
    assert HOPPER.share * 132 >= 2048
    # Exact in float32: the factor is that many units in the last place above 1.
    correction = constants["CORRECTION"]
    assert correction == torch.tensor(correction, dtype=torch.float32).item() > 1


def test_token_cost_config_reads_boxes_only_of_one_matrix() -> None:
    assert one_matrix((3, 200, 384), (200 * 384, 384))
    assert one_matrix((3, 200, 384), (200 * 400, 400))
    assert one_matrix((1, 200, 384), (7, 384))
    # Images apart, an image repeated, rows that overlap.
    assert not one_matrix((3, 200, 384), (250 * 384, 384))
    assert not one_matrix((3, 200, 384), (0, 384))
    assert not one_matrix((3, 200, 384), (200 * 8, 8))
