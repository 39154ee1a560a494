"""What matching adds to a step: costs and assignment, against the released code's loop."""

from collections.abc import Callable

import pytest
import torch

from croc_kernels import linear_assignment_ex, token_cost

from . import cases, peers
from .test_linear_assignment import CHECKED_PROBLEMS, excess
from .timing import Ceiling, Work, measure


def _croc() -> Callable:
    return lambda tokens, pool: linear_assignment_ex(token_cost(tokens, pool)).index


CROC = peers.Peer("croc", _croc)


@pytest.mark.cases(cuda=cases.STEP_GPU, cpu=cases.STEP_CPU)
@pytest.mark.parametrize("peer", [CROC, *peers.STEP], ids=lambda peer: peer.name)
def test_matching_step(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Matching,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, pool = case.tokens(device, dtype), case.pool(device, dtype)
    call = peer.prepare()
    exact = torch.cdist(tokens[:CHECKED_PROBLEMS].double(), pool.double()[None])
    error = excess(exact, call(tokens, pool)[:CHECKED_PROBLEMS])
    # Costs are rounded to float32 before they are matched: 1e-6 relative is their rounding.
    assert peer is not CROC or error <= 1e-6, f"total cost exceeds the optimum by {error:.1e}"
    measure(
        benchmark, lambda: call(tokens, pool), device, ceiling, Work(flops=case.cost_flops()),
        op="matching_step", case=case.name, provider=peer.name, direction="fwd",
        relative_excess=error,
    )  # fmt: skip
