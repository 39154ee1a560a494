"""Batched assignment against SciPy, lapx and torch-linear-assignment, host copies included."""

import pytest
import torch
from torch import Tensor

from croc_kernels import linear_assignment_ex

from . import cases, peers
from .timing import Ceiling, Work, measure

# The variant that never waits; linear_assignment adds one look at the status.
CROC = peers.Peer("croc", lambda: lambda cost: linear_assignment_ex(cost).index)
CHECKED_PROBLEMS = 2


def excess(cost: Tensor, index: Tensor) -> float:
    """Largest relative excess over SciPy's total cost; inf if it is no matching."""
    worst = 0.0
    for problem, columns in zip(cost.cpu(), index.cpu(), strict=True):
        if (columns < 0).any() or len(columns.unique()) != len(columns):
            return float("inf")
        best = problem.double().gather(1, peers.scipy_rows(problem)[:, None]).sum()
        total = problem.double().gather(1, columns[:, None]).sum()
        worst = max(worst, ((total - best) / best).item())
    return worst


@pytest.mark.cases(cuda=cases.ASSIGNMENT_GPU, cpu=cases.ASSIGNMENT_CPU)
@pytest.mark.parametrize("peer", [CROC, *peers.ASSIGNMENT], ids=lambda peer: peer.name)
def test_linear_assignment(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Matching,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    cost = case.cost(device)
    call = peer.prepare()
    error = excess(cost[:CHECKED_PROBLEMS], call(cost)[:CHECKED_PROBLEMS])
    # Both sums are of the same float32 costs: 1e-9 is what double rounding of two orders can give.
    assert peer is not CROC or error <= 1e-9, f"total cost exceeds the optimum by {error:.1e}"
    measure(
        benchmark, lambda: call(cost), device, ceiling, Work(bytes=4.0 * cost.numel()),
        op="linear_assignment", case=case.name, provider=peer.name, direction="fwd",
        relative_excess=error,
    )  # fmt: skip
