"""The certificate: zero for an optimum, a bound otherwise; and the makers of costs."""

import math
import sys

import numpy as np
import pytest
import torch

from croc_kernels import linear_assignment_ex
from croc_kernels.assignment.certificate import assignment_gap
from croc_kernels.assignment.families import FAMILIES, make_costs

SHAPES = [(12, 30), (20, 20), (30, 12)]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_assignment_gap_swapped_pair(n: int, m: int, maximize: bool) -> None:
    cost = torch.rand((8, n, m), generator=torch.manual_seed(0))
    result = linear_assignment_ex(cost, maximize=maximize)
    right = assignment_gap(cost, result.index, result.column_dual, maximize=maximize)
    assert (right == 0).all()
    first, second = (result.index >= 0).int().topk(2, dim=1).indices.T
    batch = torch.arange(8)
    index = result.index.clone()
    index[batch, first], index[batch, second] = index[batch, second], index[batch, first]
    gap = assignment_gap(cost, index, result.column_dual, maximize=maximize)

    def total(chosen: torch.Tensor) -> torch.Tensor:
        pairs = cost.double().gather(2, chosen.clamp(min=0)[..., None])[..., 0]
        return pairs.where(chosen >= 0, 0.0).sum(1)

    loss = (total(index) - total(result.index)) * (-1 if maximize else 1)
    assert (gap > 0).all()
    # The duals are optimal, so that the bound is the loss itself.
    assert torch.allclose(gap, loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_assignment_gap_moved_pair(n: int, m: int) -> None:
    if n == m:
        return
    cost = torch.rand((1, n, m), generator=torch.manual_seed(1))
    result = linear_assignment_ex(cost)
    index = result.index.clone()
    if n < m:
        free = next(j for j in range(m) if j not in index[0].tolist())
        index[0, 3] = free
    else:
        row, free = (index[0] >= 0).nonzero()[0], (index[0] < 0).nonzero()[0]
        index[0, free], index[0, row] = index[0, row], -1
    assert assignment_gap(cost, index, result.column_dual) > 0


def test_assignment_gap_needs_no_trust_in_duals() -> None:
    rng = np.random.default_rng(2)
    cost = torch.from_numpy(rng.random((50, 6, 9)))
    result = linear_assignment_ex(cost)
    best = (result.row_dual.sum(1) + result.column_dual.sum(1)).numpy()
    for scale in (0.01, 1.0, 100.0):
        duals = torch.from_numpy(scale * rng.standard_normal((50, 9)))
        index = torch.from_numpy(np.stack([rng.permutation(9)[:6] for _ in range(50)]))
        total = cost.gather(2, index[..., None]).sum((1, 2)).numpy()
        gap = assignment_gap(cost, index, duals).numpy()
        assert (total - best <= gap + 1e-12).all()


def test_assignment_gap_what_is_no_matching() -> None:
    cost = torch.rand((1, 4, 6))
    cost[0, 0, 5] = math.inf
    result = linear_assignment_ex(cost)
    good = result.index[0].tolist()
    wrong = {
        "twice": [good[1], *good[1:]],
        "free": [-1, *good[1:]],
        "past the end": [6, *good[1:]],
        "below": [-2, *good[1:]],
        "forbidden": [5, *(j if j != 5 else good[0] for j in good[1:])],
    }
    for name, index in wrong.items():
        gap = assignment_gap(cost, torch.tensor([index]), result.column_dual)
        assert gap.item() == math.inf, name
    nan = torch.full_like(result.column_dual, math.nan)
    assert assignment_gap(cost, result.index, nan).item() == math.inf
    # A row that does not take part must not have a column.
    assert (
        assignment_gap(cost, result.index, result.column_dual, num_rows=torch.tensor([3])) > 1e300
    )


def test_assignment_gap_unsolved_problem() -> None:
    result = linear_assignment_ex(torch.full((2, 3, 3), math.inf))
    gap = assignment_gap(torch.full((2, 3, 3), math.inf), result.index, result.column_dual)
    assert gap.tolist() == [math.inf, math.inf]


def test_assignment_gap_ranks_and_compile() -> None:
    cost = torch.rand((7, 11), dtype=torch.float32)
    result = linear_assignment_ex(cost)
    gap = assignment_gap(cost, result.index, result.column_dual)
    assert gap.shape == ()
    assert gap == 0
    compiled = torch.compile(assignment_gap, fullgraph=True, backend="eager")
    assert compiled(cost, result.index, result.column_dual) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"index": torch.zeros((2, 4), dtype=torch.int64)}, ValueError,
            r"assignment_gap: index must be ([B,] N) = (2, 3), got (2, 4)", id="index",
        ),
        pytest.param(
            {"index": torch.zeros((2, 3), dtype=torch.int32)}, TypeError,
            "assignment_gap: index must have dtype int64, got int32", id="index-dtype",
        ),
        pytest.param(
            {"column_dual": torch.zeros((2, 3), dtype=torch.float64)}, ValueError,
            r"assignment_gap: column_dual must be ([B,] M) = (2, 5), got (2, 3)", id="dual",
        ),
        pytest.param(
            {"column_dual": torch.zeros((2, 5))}, TypeError,
            "assignment_gap: column_dual must have dtype float64, got float32", id="dual-dtype",
        ),
    ],
)  # fmt: skip
def test_assignment_gap_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "cost": torch.rand((2, 3, 5)),
        "index": torch.zeros((2, 3), dtype=torch.int64),
        "column_dual": torch.zeros((2, 5), dtype=torch.float64),
    }
    with pytest.raises(error) as raised:
        assignment_gap(**{**arguments, **change})
    assert str(raised.value) == message


def test_make_costs_does_not_depend_on_the_batch() -> None:
    for family in FAMILIES:
        many = make_costs(family, 3, 7, 11, seed=5, dim=32)
        assert many.shape == (3, 7, 11)
        assert many.dtype == torch.float32
        assert many.isfinite().all(), family
        assert torch.equal(many[:2], make_costs(family, 2, 7, 11, seed=5, dim=32))


def test_make_costs_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^make_costs: family must be one of \('uniform', "):
        make_costs("gaussian", 1, 2, 3)
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(RuntimeError) as raised:
        make_costs("pictures", 1, 2, 3)
    assert str(raised.value) == (
        "make_costs: family 'pictures' must find scikit-image, got none; "
        "install it with: pip install scikit-image"
    )
