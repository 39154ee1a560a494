"""Batched assignment against SciPy, lapx and torch-linear-assignment, host copies included."""

import functools

import pytest
import torch
from torch import Tensor

from croc_kernels import linear_assignment_ex
from croc_kernels.assignment.certificate import assignment_gap

from . import cases, peers
from .timing import Ceiling, Work, measure

# The variant that never waits; linear_assignment adds one look at the status.
CROC = peers.Peer("croc", lambda: lambda cost: linear_assignment_ex(cost).index)
CHECKED_PROBLEMS = 2
LONG_ROWS = 1000  # a peer takes seconds per problem from here on


def totals(cost: Tensor, index: Tensor) -> Tensor:
    """(B,) float64 total of each matching."""
    return cost.double().gather(2, index[..., None]).sum((1, 2))


def scale(cost: Tensor, total: Tensor) -> Tensor:
    """(B,) what an error is relative to: the total, or a cost where the total is less (or 0)."""
    return torch.maximum(total.abs(), cost.abs().amax((1, 2)))


def scipy_totals(cost: Tensor) -> Tensor:
    """(B,) least totals of costs on the host."""
    return totals(cost, torch.stack([peers.scipy_rows(problem) for problem in cost]))


@functools.cache
def least_totals(family: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """SciPy's totals of the first problems of a family: the same for every batch and peer."""
    first = cases.Assignment(family, CHECKED_PROBLEMS, rows, columns)
    return scipy_totals(first.cost(device).cpu())


def excess(cost: Tensor, index: Tensor, least: Tensor) -> float:
    """Largest relative excess over the ``least`` totals of the first problems; inf if these are no
    matchings.
    """
    cost, index = cost[: len(least)].cpu(), index[: len(least)].cpu()
    if any((row < 0).any() or len(row.unique()) != len(row) for row in index):
        return float("inf")
    return ((totals(cost, index) - least) / scale(cost, least)).max().item()


def certified_gap(cost: Tensor) -> float:
    """How far above the optimum the worst problem may be, relative to its total cost."""
    result = linear_assignment_ex(cost)
    gap = assignment_gap(cost, result.index, result.column_dual)
    return (gap / scale(cost, totals(cost, result.index))).max().item()


@pytest.mark.cases(cuda=cases.ASSIGNMENT_GPU, cpu=cases.ASSIGNMENT_CPU)
@pytest.mark.parametrize("peer", [CROC, *peers.ASSIGNMENT], ids=lambda peer: peer.name)
def test_linear_assignment(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Assignment,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    if peer is not CROC and case.rows >= LONG_ROWS:
        pytest.skip(f"from {LONG_ROWS} rows on peers take seconds per problem")
    if peer is not CROC and case in cases.ASSIGNMENT_HARD:
        pytest.skip("timed at 8 problems")
    cost = case.cost(device)
    call = peer.prepare()
    error = gap = None
    if peer is CROC:
        # Of every problem. Relative: 1e-9 is what double rounding of two orders can give.
        gap = certified_gap(cost)
        assert gap <= 1e-9, f"the total may exceed the optimum by {gap:.1e}"
    if case.rows < LONG_ROWS:
        least = least_totals(case.family, case.rows, case.columns, device)
        error = excess(cost, call(cost), least)
        assert peer is not CROC or error <= 1e-9, f"total cost exceeds the optimum by {error:.1e}"
    measure(
        benchmark, lambda: call(cost), device, ceiling, Work(bytes=4.0 * cost.numel()),
        op="linear_assignment", case=case.name, provider=peer.name, direction="fwd",
        relative_excess=error, relative_gap=gap,
    )  # fmt: skip
