"""Costs and nearest pool rows against cdist and a product with eager norms."""

import functools

import pytest
import torch
from torch import Tensor

from croc_kernels import nearest_token, token_cost
from croc_kernels.testing import EPSILON, max_error

from . import cases, peers
from .timing import Ceiling, Work, measure

COST = peers.Peer("croc", lambda: token_cost)
NEAREST = peers.Peer("croc", lambda: nearest_token)
PRODUCT = peers.Peer("gemm", lambda: torch.mm)


def _inputs(case: cases.Matching, device: torch.device) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return case.tokens(device, dtype), case.pool(device, dtype)


@functools.lru_cache(maxsize=1)
def _exact(case: cases.Matching, device: torch.device) -> tuple[Tensor, float]:
    """Float64 costs of the first image; the budget is twice a float32-output product's error."""
    tokens, pool = _inputs(case, device)
    exact = torch.cdist(
        tokens[0].double(), pool.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    plain = max_error(peers.gemm_cost(tokens[:1], pool)[0], exact)
    return exact, 2.0 * plain + EPSILON[torch.float32] * exact.max().item()


@pytest.mark.cases(cuda=cases.COST_GPU, cpu=cases.COST_CPU)
@pytest.mark.parametrize("peer", [COST, *peers.COST], ids=lambda peer: peer.name)
def test_token_cost(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Matching,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    tokens, pool = _inputs(case, device)
    call = peer.prepare()
    exact, budget = _exact(case, device)
    error = max_error(call(tokens, pool)[0], exact) / budget
    assert peer is not COST or error <= 1.0, f"error is {error:.2f} times its budget"
    work = Work(case.cost_flops(), case.cost_bytes(tokens.element_size(), with_matrix=True))
    measure(
        benchmark, lambda: call(tokens, pool), device, ceiling, work,
        op="token_cost", case=case.name, provider=peer.name, direction="fwd",
        error_over_budget=error,
    )  # fmt: skip


@pytest.mark.cases(cuda=cases.COST_GPU, cpu=cases.COST_CPU)
@pytest.mark.parametrize("peer", [NEAREST, *peers.NEAREST], ids=lambda peer: peer.name)
def test_nearest_token(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Matching,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    tokens, pool = _inputs(case, device)
    call = peer.prepare()
    exact, budget = _exact(case, device)
    # Ties differ legally, so distances are compared, not indices.
    chosen = exact.gather(1, call(tokens, pool)[0][:, None])[:, 0]
    error = max_error(chosen, exact.min(1).values) / budget
    assert peer is not NEAREST or error <= 1.0, f"error is {error:.2f} times its budget"
    work = Work(case.cost_flops(), case.cost_bytes(tokens.element_size(), with_matrix=False))
    measure(
        benchmark, lambda: call(tokens, pool), device, ceiling, work,
        op="nearest_token", case=case.name, provider=peer.name, direction="fwd",
        error_over_budget=error,
    )  # fmt: skip


@pytest.mark.cases(cuda=cases.COST_GPU, cpu=cases.COST_CPU)
@pytest.mark.parametrize("peer", [PRODUCT], ids=lambda peer: peer.name)
def test_token_cost_product_alone(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Matching,
    peer: peers.Peer,
) -> None:
    """In the operands' dtype and nothing else: what both operators are held against."""
    tokens, pool = _inputs(case, device)
    rows, columns, call = tokens.flatten(0, 1), pool.T, peer.prepare()
    work = Work(case.cost_flops(), case.cost_bytes(tokens.element_size(), with_matrix=False))
    measure(
        benchmark, lambda: call(rows, columns), device, ceiling, work,
        op="gemm", case=case.name, provider=peer.name, direction="fwd",
    )  # fmt: skip
