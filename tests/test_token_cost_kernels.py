"""The Triton kernels of token_cost and nearest_token: on a GPU, else in Triton's interpreter.

test_token_cost_fresh.py runs this file with TRITON_INTERPRET=1, fp16 and fp32 (bf16 products are
wrong there). Tile edges, ragged steps and masks are the same code in both.
"""

import pytest
import torch
from kernel_device import BF16, DEVICE, INTERPRETED, draw, needs_kernels
from torch import Tensor

from croc_kernels import nearest_token, token_cost
from croc_kernels.cost import config, kernel, prepass, reference
from croc_kernels.testing import assert_within_budget

DTYPES = (torch.float16, torch.float32, *BF16)
METRICS = ("l2", "l2sq", "cosine")
pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter is paid by the program, not by the row.
    if INTERPRETED:
        monkeypatch.setattr(kernel, "PREPASS", {"BLOCK_R": 64, "BLOCK_K": 128})


def exact_cost(tokens: Tensor, pool: Tensor, metric: str = "l2", **options: Tensor) -> Tensor:
    return reference.token_cost(tokens.double(), pool.double(), metric=metric, **options)


def check_cost(tokens: Tensor, pool: Tensor, metric: str = "l2", **options: Tensor) -> Tensor:
    """Within twice the error of the same expansion in float32, and 1e-6 of what it subtracts."""
    cost = token_cost(tokens, pool, metric, backend="triton", **options)
    exact = exact_cost(tokens, pool, metric, **options)
    x, p = tokens.double(), pool.double()
    terms = 1.0 if metric == "cosine" else x.square().sum(-1).max() + p.square().sum(-1).max()
    square = cost.double().square() - exact.square() if metric == "l2" else cost - exact
    assert square.abs().max() <= 1e-6 * terms
    assert cost.is_contiguous()
    return cost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("rows", "m", "dim"),
    [(63, 257, 131), (1, 1, 1), (129, 130, 64)],
    ids=str,
)
def test_token_cost_kernel_values(
    rows: int, m: int, dim: int, metric: str, dtype: torch.dtype
) -> None:
    tokens, pool = draw(rows, dim, dtype=dtype), draw(m, dim, dtype=dtype)
    cost = check_cost(tokens, pool, metric)
    exact = exact_cost(tokens, pool, metric)
    x, p = tokens.float(), pool.float()
    if metric == "cosine":
        plain = 1.0 - torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(p).T
    else:
        square = x.square().sum(-1, keepdim=True) + p.square().sum(-1) - 2 * (x @ p.T)
        plain = square.clamp(min=0).sqrt() if metric == "l2" else square
    assert_within_budget(cost, exact, plain, torch.float32, "token_cost")
    index = nearest_token(tokens, pool, metric, backend="triton")
    chosen = exact.gather(-1, index[:, None])[:, 0]
    assert (chosen <= exact.min(-1).values + 1e-5).all()


@pytest.mark.parametrize("small", [False, True], ids=["large-tile", "small-tile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_cost_kernel_tiles_cover_all(
    dtype: torch.dtype, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More row tiles than one group, and a last group that is not full.
    if small:
        tile = config.CostConfig(16, 16, 32, 3, 4, 2)
    else:
        tile = config.pick_config(kernel._arch(draw(1)), dtype, 10**6, 10**6, 64)
    monkeypatch.setattr(kernel, "pick_config", lambda *_: tile)
    rows, m = (16 * 4 + 5, 70) if small else (130, 300)
    tokens, pool = draw(rows, 64, dtype=dtype), draw(m, 64, dtype=dtype)
    check_cost(tokens, pool)
    index = nearest_token(tokens, pool, backend="triton")
    assert torch.equal(index, reference.nearest_token(tokens, pool))


@pytest.mark.parametrize("metric", METRICS)
def test_token_cost_kernel_cancellation(metric: str) -> None:
    for dtype in DTYPES:
        pool = draw(40, 515, dtype=dtype)
        tokens = pool[[3, 39, 0]].clone()
        cost = check_cost(tokens, pool, metric)
        norm = 1.0 if metric == "cosine" else pool.float().norm(dim=-1)[[3, 39, 0]]
        itself = cost[[0, 1, 2], [3, 39, 0]]
        assert (itself <= 1e-3 * norm).all()
        assert (itself >= 0).all()
        assert nearest_token(tokens, pool, metric, backend="triton").tolist() == [3, 39, 0]


@pytest.mark.parametrize(
    ("metric", "integer"),
    [("l2", torch.int32), ("l2sq", torch.int64), ("cosine", torch.int32)],
    ids=str,
)
def test_token_cost_kernel_counts(metric: str, integer: torch.dtype) -> None:
    # 90 rows per image: tiles straddle images, and the second tile has no row to compute.
    tokens, pool = draw(4, 90, 40), draw(33, 40)
    num_rows = torch.tensor([90, 37, 0, 500], dtype=integer, device=DEVICE)
    tokens[1, 37:] = tokens[2] = float("nan")
    live = torch.arange(90, device=DEVICE) < num_rows[:, None]
    cost = token_cost(tokens, pool, metric, num_rows=num_rows, backend="triton")
    expected = exact_cost(tokens[live], pool, metric)
    torch.testing.assert_close(cost[live].double(), expected, rtol=1e-6, atol=1e-6)
    assert (cost[~live] == 0).all()
    index = nearest_token(tokens, pool, metric, num_rows=num_rows, backend="triton")
    assert (index[~live] == -1).all()
    assert torch.equal(index[live], reference.nearest_token(tokens[live], pool, metric=metric))


def test_token_cost_kernel_gathers_rows() -> None:
    tokens, pool = draw(90, 48), draw(33, 48)
    rows = torch.randint(90, (3, 50), device=DEVICE)
    cost = token_cost(tokens, pool, token_index=rows, backend="triton")
    assert torch.equal(cost, token_cost(tokens[rows], pool, backend="triton"))
    index = nearest_token(tokens, pool, token_index=rows, backend="triton")
    assert torch.equal(index, reference.nearest_token(tokens[rows], pool))
    # Nothing can raise from a kernel: the row is NaN, or has no nearest, and nothing is read.
    rows[1, 7], rows[2, 3] = -1, 90
    cost = token_cost(tokens, pool, token_index=rows, backend="triton")
    index = nearest_token(tokens, pool, token_index=rows, backend="triton")
    bad = torch.zeros(3, 50, dtype=torch.bool, device=DEVICE)
    bad[1, 7] = bad[2, 3] = True
    assert torch.equal(cost.isnan().all(-1), bad)
    assert torch.equal(cost.isnan().any(-1), bad)
    assert torch.equal(index == -1, bad)
    # Past the count an index may be anything.
    counts = torch.tensor([50, 7, 3], device=DEVICE)
    options = {"token_index": rows, "num_rows": counts, "backend": "triton"}
    assert token_cost(tokens, pool, **options).isfinite().all()


def test_token_cost_kernel_strides() -> None:
    wide, pool = draw(3, 60, 128), draw(64, 70).T
    for tokens in (
        wide[:, 5:37, 10:74],
        wide.transpose(0, 1)[..., :64],
        wide[..., ::2],
        wide[:1, :, :64].expand(3, 60, 64),
    ):
        plain = tokens.contiguous(), pool.contiguous()
        cost = token_cost(tokens, pool, backend="triton")
        assert torch.equal(cost, token_cost(*plain, backend="triton"))
        index = nearest_token(tokens, pool, backend="triton")
        assert torch.equal(index, nearest_token(*plain, backend="triton"))


@pytest.mark.parametrize("metric", METRICS)
def test_token_cost_kernel_nan_and_zero_rows(metric: str) -> None:
    tokens, pool = draw(5, 24), draw(7, 24)
    tokens[1, 2] = pool[4, 0] = float("nan")
    tokens[3] = pool[6] = 0.0
    cost = token_cost(tokens, pool, metric, backend="triton")
    expected = exact_cost(tokens, pool, metric)
    assert torch.equal(cost.isnan(), expected.isnan())
    assert cost.isnan()[1].all()
    torch.testing.assert_close(cost.double(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)
    index = nearest_token(tokens, pool, metric, backend="triton")
    assert torch.equal(index, reference.nearest_token(tokens, pool, metric=metric))
    assert index[1] == -1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_token_kernel_ties(dtype: torch.dtype) -> None:
    # Small integers: every product and sum is exact, so ties are ties. Copies of the pool fall into
    # both halves of a tile and into several tiles.
    rows = torch.randint(-2, 3, (90, 24)).to(dtype).to(DEVICE)
    pool = rows[torch.randint(90, (300,), device=DEVICE)]
    for metric in ("l2", "l2sq"):
        index = nearest_token(rows, pool, metric, backend="triton")
        cost = exact_cost(rows, pool, "l2sq").tolist()
        assert index.tolist() == [row.index(min(row)) for row in cost]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 5, 8)], ids=str)
def test_token_cost_kernel_of_nothing(shape: tuple[int, ...]) -> None:
    tokens, pool = draw(*shape), draw(3, 8)
    assert token_cost(tokens, pool, backend="triton").shape == (*shape[:-1], 3)
    assert nearest_token(tokens, pool, backend="triton").shape == shape[:-1]
    assert token_cost(draw(4, 8), pool[:0], backend="triton").shape == (4, 0)


def test_token_cost_kernel_offsets_past_32_bits() -> None:
    # 2^20 rows of 4096: only the pages that are written exist.
    tokens = torch.empty(2**20, 4096, dtype=torch.float16, device=DEVICE)
    tokens[-3:] = draw(3, 4096, dtype=torch.float16)
    tokens[0] = 0.0
    rows = torch.tensor([2**20 - 2, 0, 2**20 - 1], device=DEVICE)
    pool = draw(5, 4096, dtype=torch.float16)
    cost = token_cost(tokens, pool, token_index=rows, backend="triton")
    assert torch.equal(cost, token_cost(tokens[rows], pool, backend="triton"))
    strided = tokens.view(2, 2**19, 4096)[:, -2:]
    strided[0] = 1.0
    cost = token_cost(strided, pool, backend="triton")
    assert torch.equal(cost, token_cost(strided.contiguous(), pool, backend="triton"))


def test_token_cost_kernel_repeats_bitwise() -> None:
    tokens, pool = draw(140, 96), draw(150, 96)
    for function in (token_cost, nearest_token):
        first = function(tokens, pool, backend="triton")
        assert torch.equal(function(tokens, pool, backend="triton"), first)


def test_token_cost_kernel_refuses_float64() -> None:
    with pytest.raises(TypeError, match=r"^token_cost: tokens must have dtype .*, got float64$"):
        token_cost(draw(2, 4).double(), draw(3, 4).double(), backend="triton")


def test_nearest_token_kernel_starts_from_keys_and_no_state() -> None:
    # What comes before the product that the interpreter has no kernel for; more state than rows.
    out = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    state = torch.ones(12, dtype=torch.int32, device=DEVICE)
    prepass._hopper_start_kernel[(3,)](out, state, 8, 11, BLOCK=4)
    assert out.tolist() == [2**63 - 1] * 8 + [0]
    assert state.tolist() == [0] * 11 + [1]
    state.fill_(1)
    prepass._hopper_start_kernel[(1,)](None, state, 0, 2, BLOCK=4)
    assert state.tolist() == [0] * 2 + [1] * 10
