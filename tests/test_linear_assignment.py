"""Values: optimal totals, matchings, duals, on small instances by brute force and on families."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from croc_kernels import linear_assignment, linear_assignment_ex, ops
from croc_kernels.assignment.api import AssignmentStatus, LinearAssignment
from croc_kernels.assignment.certificate import assignment_gap
from croc_kernels.assignment.families import FAMILIES, make_costs

MISSING = ops.ASSIGNMENT_MISSING.get("cpu")
NATIVE = pytest.param(
    "native", id="native", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
)
BACKENDS = [NATIVE, pytest.param("reference", id="reference")]


def totals(cost: Tensor, index: Tensor) -> Tensor:
    """(B,) float64 totals of the matched pairs."""
    pairs = cost.double().gather(2, index.clamp(min=0)[..., None])[..., 0]
    return torch.where(index >= 0, pairs, 0.0).sum(1)


def assert_matching(index: Tensor, rows: int, m: int) -> None:
    for row in index:
        used = row[:rows][row[:rows] >= 0]
        assert (row[rows:] == -1).all()
        assert len(used) == min(rows, m)
        assert len(used.unique()) == len(used)
        assert (used < m).all()


def assert_optimal(cost: Tensor, result: LinearAssignment, maximize: bool = False) -> None:
    """The certificate, computed by other code than the solver's, bounds the error by rounding."""
    assert (result.status == 0).all()
    size = cost.double()[cost.isfinite()].abs().max().item() if cost.numel() else 0.0
    bound = max(cost.shape[1:]) * 2.0**-50 * size
    gap = assignment_gap(cost, result.index, result.column_dual, maximize=maximize)
    assert (gap >= 0).all()
    assert (gap <= bound).all()
    assert (result.gap - gap).abs().max() <= bound
    dual = result.row_dual.sum(1) + result.column_dual.sum(1)
    assert (dual - totals(cost, result.index)).abs().max() <= bound
    reduced = cost.double() - result.row_dual[:, :, None] - result.column_dual[:, None]
    slack = -reduced if maximize else reduced
    assert slack.min() >= -bound
    few = result.row_dual if cost.shape[1] > cost.shape[2] else result.column_dual
    if cost.shape[1] != cost.shape[2]:
        assert ((few if maximize else -few) >= 0).all()


def brute_force(cost: np.ndarray) -> np.ndarray:
    """(B,) least totals; inf where no matching avoids the forbidden pairs."""
    if cost.shape[1] > cost.shape[2]:
        cost = cost.transpose(0, 2, 1)
    n, m = cost.shape[1:]
    ways = np.array(list(itertools.permutations(range(m), n)))
    return cost[:, np.arange(n), ways].sum(2).min(1)


def small_costs(kind: str, batch: int, n: int, m: int) -> np.ndarray:
    rng = np.random.default_rng((n, m, len(kind)))
    match kind:
        case "uniform":
            return rng.random((batch, n, m))
        case "ties":
            return rng.integers(-1, 3, (batch, n, m)).astype(float)
        case "gamma":
            return rng.gamma(0.3, size=(batch, n, m)) * 1e5 - 1e4
        case "columns":
            return rng.random((batch, n, m)) + 100 * rng.standard_normal((batch, 1, m))
        case _:
            cost = rng.integers(0, 50, (batch, n, m)).astype(float)
            return np.where(rng.random((batch, n, m)) < 0.35, np.inf, cost)


SMALL = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 3), (3, 6), (6, 3), (5, 5), (4, 7), (7, 4), (6, 6)]


@pytest.mark.parametrize("kind", ["uniform", "ties", "gamma", "columns", "forbidden"])
@pytest.mark.parametrize(("n", "m"), [pytest.param(n, m, id=f"N{n}-M{m}") for n, m in SMALL])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_brute_force(backend: str, n: int, m: int, kind: str) -> None:
    batch = 60 if backend == "native" else 6
    cost = torch.from_numpy(small_costs(kind, batch, n, m)).float()
    best = torch.from_numpy(brute_force(cost.double().numpy()))
    for maximize in (False, True):
        given = -cost if maximize else cost
        result = linear_assignment_ex(given, maximize=maximize, backend=backend)
        solved = result.status == 0
        assert torch.equal(solved, best.isfinite())
        assert (result.status[~solved] == AssignmentStatus.INFEASIBLE).all()
        found = totals(given[solved], result.index[solved]) * (-1 if maximize else 1)
        assert (found - best[solved]).abs().max() <= 1e-12 * 1e6
        assert_matching(result.index[solved], n, m)
        assert_optimal(given[solved], LinearAssignment(*(x[solved] for x in result)), maximize)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("n", "m"), [pytest.param(n, m, id=f"N{n}-M{m}") for n, m in [(63, 257), (128, 128), (70, 33)]]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_families(backend: str, n: int, m: int, family: str) -> None:
    batch = 3 if backend == "native" else 1
    cost = make_costs(family, batch, n, m, seed=n, dim=256)
    result = linear_assignment_ex(cost, backend=backend)
    assert_matching(result.index, n, m)
    assert_optimal(cost, result)
    # float32 costs of one magnitude share a grid that float64 sums stay on: no rounding at all.
    assert (result.gap == 0).all()
    for b in range(batch):
        exact = cost[b].double().numpy()
        rows, columns = linear_sum_assignment(exact)
        least = math.fsum(exact[rows, columns])
        matched = result.index[b] >= 0
        found = math.fsum(exact[matched, result.index[b][matched]])
        assert found == pytest.approx(least, rel=2.0**-50)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("backend", [NATIVE])
def test_linear_assignment_random_shapes(backend: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 90, 2)
    cost = rng.standard_normal((4, n, m)) * np.exp(rng.uniform(-20, 20))
    cost += rng.standard_normal((4, 1, m)) * np.exp(rng.uniform(-20, 20))
    cost[rng.random(cost.shape) < 0.2] = np.inf
    given = torch.from_numpy(cost)
    result = linear_assignment_ex(given if seed % 2 else given.float(), backend=backend)
    exact = (given if seed % 2 else given.float().double()).numpy()
    for b in range(4):
        try:
            rows, columns = linear_sum_assignment(exact[b])
        except ValueError:
            assert result.status[b] == AssignmentStatus.INFEASIBLE
            continue
        assert result.status[b] == AssignmentStatus.OK
        matched = result.index[b].numpy() >= 0
        found = exact[b][matched, result.index[b].numpy()[matched]]
        scale = np.abs(exact[b][np.isfinite(exact[b])]).max()
        assert abs(found.sum() - exact[b][rows, columns].sum()) <= 100 * 2.0**-52 * scale
        assert result.gap[b] <= 100 * 2.0**-50 * scale


SCALES = {
    "float32-denormal": lambda x: (x * 1e-42).float(),
    "float32-huge": lambda x: (x * 3e38).float(),
    "float32-offset": lambda x: (x + 1e6).float(),
    "float32-negative": lambda x: -x.float(),
    "float64-denormal": lambda x: x * 1e-320,
    "float64-huge": lambda x: x * 1.7e308,
    "float64-huge-both-signs": lambda x: (2 * x - 1) * 1.7e308,
    "float64-offset": lambda x: x + 1e12,
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", [NATIVE])
def test_linear_assignment_scales(backend: str, scale: str) -> None:
    cost = SCALES[scale](torch.from_numpy(np.random.default_rng(1).random((8, 12, 20))))
    assert cost.isfinite().all()
    assert (cost != 0).double().mean() > 0.99
    result = linear_assignment_ex(cost, backend=backend)
    assert (result.status == 0).all()
    assert_matching(result.index, 12, 20)
    # SciPy's sums overflow too: it gets the same problem, a power of two smaller.
    power = 2.0**-600 if cost.abs().max() > 1e300 else 1.0
    for b in range(8):
        exact = (cost[b].double() * power).numpy()
        least = exact[linear_sum_assignment(exact)].sum()
        found = exact[np.arange(12), result.index[b]].sum()
        assert found == pytest.approx(least, rel=2.0**-48)


@pytest.mark.parametrize("backend", [NATIVE])
def test_linear_assignment_mixed_magnitudes(backend: str) -> None:
    # 200 binary orders of magnitude: no grid holds them, the certificate is at rounding level.
    generator = torch.manual_seed(2)
    cost = torch.exp2(torch.rand((30, 20, 31), dtype=torch.float64, generator=generator) * 200)
    result = linear_assignment_ex(cost, backend=backend)
    assert_optimal(cost, result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_one_feasible_matching(backend: str) -> None:
    n = 12
    permutation = torch.randperm(n, generator=torch.manual_seed(3))
    cost = torch.full((1, n, n), math.inf)
    for position, row in enumerate(permutation):
        # Triangular: only the diagonal in this order matches everything.
        cost[0, row, permutation[: position + 1].flip(0)] = torch.rand(position + 1)
    index = linear_assignment(cost, backend=backend)
    assert torch.equal(index[0], torch.arange(n))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_infeasible_block(backend: str) -> None:
    # Hall: three rows share two columns. No row and no column is empty.
    cost = torch.rand((3, 8, 10))
    cost[1, :3] = math.inf
    cost[1, :3, :2] = 1.0
    result = linear_assignment_ex(cost, backend=backend)
    assert result.status.tolist() == [0, 2, 0]
    assert (result.index[1] == -1).all()
    assert result.gap[1].isnan()
    assert (result.row_dual[1] == 0).all()
    assert (result.column_dual[1] == 0).all()
    alone = linear_assignment_ex(cost[[0, 2]], backend=backend)
    assert torch.equal(alone.index, result.index[[0, 2]])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_invalid_values(backend: str, maximize: bool, bad: float) -> None:
    for n, m in ((4, 67), (67, 4), (1, 1)):
        cost = torch.rand((3, n, m))
        cost[2, -1, -1] = -bad if maximize else bad
        result = linear_assignment_ex(cost, maximize=maximize, backend=backend)
        assert result.status.tolist() == [0, 0, AssignmentStatus.INVALID]
        assert (result.index[2] == -1).all()


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0), (3, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_empty(backend: str, n: int, m: int) -> None:
    for batch in (0, 2) if n * m == 0 else (0,):
        cost = torch.empty((batch, n, m))
        result = linear_assignment_ex(cost, backend=backend)
        assert result.index.shape == (batch, n)
        assert (result.index == -1).all()
        assert result.row_dual.shape == (batch, n)
        assert result.column_dual.shape == (batch, m)
        assert (result.gap == 0).all()
        assert (result.status == 0).all()
        assert torch.equal(assignment_gap(cost, result.index, result.column_dual), result.gap)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_num_rows(backend: str, dtype: torch.dtype) -> None:
    cost = torch.rand((6, 20, 12))
    rows = torch.tensor([20, 0, 1, 12, 13, 5], dtype=dtype)
    for b, used in enumerate(rows.tolist()):
        cost[b, used:] = math.nan
    result = linear_assignment_ex(cost, num_rows=rows, backend=backend)
    assert (result.status == 0).all()
    gap = assignment_gap(cost, result.index, result.column_dual, num_rows=rows)
    assert (gap == 0).all()
    assert (result.gap == 0).all()
    for b, used in enumerate(rows.tolist()):
        alone = linear_assignment_ex(cost[b, :used], backend=backend)
        assert torch.equal(alone.index, result.index[b, :used])
        assert torch.equal(alone.column_dual, result.column_dual[b])
        assert (result.index[b, used:] == -1).all()
        assert (result.row_dual[b, used:] == 0).all()
    clamped = linear_assignment_ex(cost[:1], num_rows=rows[:1] + 7, backend=backend)
    assert torch.equal(clamped.index, result.index[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_strides(backend: str) -> None:
    cost = torch.rand((4, 9, 14))
    expected = linear_assignment(cost, backend=backend)
    views = {
        "transposed": cost.mT.contiguous().mT,
        "batch last": cost.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "every other": torch.rand((4, 9, 28))[..., ::2].copy_(cost),
        "rows apart": torch.rand((4, 20, 40))[:, 3:12, 5:19].copy_(cost),
    }
    for name, view in views.items():
        assert not view.is_contiguous(), name
        assert torch.equal(linear_assignment(view, backend=backend), expected), name
    repeated = cost[:1].expand(3, 9, 14)
    assert torch.equal(linear_assignment(repeated, backend=backend), expected[:1].expand(3, 9))
    tall = linear_assignment(cost.mT, backend=backend)
    assert_optimal(cost.mT, linear_assignment_ex(cost.mT, backend=backend))
    assert (tall >= 0).sum() == 4 * 9
    assert torch.equal(linear_assignment(cost[0], backend=backend), expected[0])


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16,
     torch.int32, torch.int64],
    ids=lambda d: str(d).removeprefix("torch."),
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_dtypes(backend: str, dtype: torch.dtype) -> None:
    values = torch.randint(0, 120, (3, 10, 15), generator=torch.manual_seed(4))
    cost = values.to(dtype)
    result = linear_assignment_ex(cost, backend=backend)
    assert torch.equal(result.index, linear_assignment(values.double(), backend=backend))
    assert (assignment_gap(cost, result.index, result.column_dual) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_assignment_integers_are_exact(backend: str) -> None:
    # float32 can't tell these apart, and float64 just can.
    top = 2**53
    cost = torch.tensor([[[top - 1, top], [top - 3, top - 1]]])
    assert linear_assignment(cost, backend=backend).tolist() == [[1, 0]]
    near = torch.tensor([[[2**31 - 1, 2**31 - 2], [2**31 - 1, 2**31 - 3]]], dtype=torch.int32)
    assert linear_assignment(near, backend=backend).tolist() == [[0, 1]]
    beyond = torch.tensor([[[top + 1, 0], [0, 0]]])
    assert linear_assignment_ex(beyond, backend=backend).status.tolist() == [1]
