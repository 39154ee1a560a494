"""Mixed attention against dense-mask SDPA, FlexAttention and causal kernels."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from croc_kernels import mixed_attention
from croc_kernels.testing import EPSILON, max_error

from . import cases, peers
from .timing import Ceiling, Work, measure

FLOPS = {"fwd": 1.0, "bwd": 2.5}


def _croc(deterministic: bool) -> Callable:
    def prepare(case: cases.Attention, device: torch.device) -> Callable:
        mask = case.mask(device)
        return lambda q, k, v: mixed_attention(q, k, v, mask, deterministic=deterministic)

    return prepare


CROC = peers.Peer("croc", _croc(False))
DETERMINISTIC = peers.Peer("croc-deterministic", _croc(True))  # differs in the backward only
OURS = (CROC, DETERMINISTIC)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _inputs(case: cases.Attention, device: torch.device) -> tuple[list[Tensor], Tensor]:
    qkv = [x.detach().requires_grad_() for x in case.inputs(device, _dtype(device))]
    generator = torch.Generator(device).manual_seed(1)
    shape = (case.batch, case.length, case.heads, case.head_dim)
    grad = torch.randn(shape, generator=generator, device=device, dtype=_dtype(device))
    return qkv, grad.transpose(1, 2)


def _one_group(
    case: cases.Attention, qkv: list[Tensor], grad: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The first key head with its query heads: small enough for a float64 reference."""
    group = case.heads // case.kv_heads
    q, k, v = qkv
    return [x.detach() for x in (q[:1, :group], k[:1, :1], v[:1, :1])], grad[:1, :group]


def _results(call: Callable, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@functools.cache
def _budget(case: cases.Attention, device: torch.device) -> tuple[list[Tensor], list[float]]:
    """Float64 results of the first group, and what each may err: twice PyTorch's error."""
    qkv, grad = _one_group(case, *_inputs(case, device))
    starts, ends = (x.to(device)[:, None] for x in case.row_bounds())
    keys = torch.arange(case.length, device=device)
    dense = (keys >= starts) & (keys < ends)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)

    exact = _results(sdpa, [x.double() for x in qkv], grad.double())
    plain = _results(sdpa, qkv, grad)
    floor = EPSILON[_dtype(device)]
    return exact, [
        2.0 * max_error(p, e) + floor * e.abs().max().item()
        for p, e in zip(plain, exact, strict=True)
    ]


@functools.lru_cache(maxsize=1)
def _prepared(case: cases.Attention, peer: peers.Peer, device: torch.device) -> Callable:
    """Compiled once for both directions where these follow each other."""
    return peer.prepare(case, device)


@functools.cache
def _error(case: cases.Attention, peer: peers.Peer, device: torch.device) -> float:
    """Largest error over its budget, of output and gradients, on the timed tensors."""
    qkv, grad = _inputs(case, device)
    out, dq, dk, dv = _results(_prepared(case, peer, device), qkv, grad)
    group = case.heads // case.kv_heads
    parts = [out[:1, :group], dq[:1, :group], dk[:1, :1], dv[:1, :1]]
    exact, budget = _budget(case, device)
    return max(max_error(p, e) / b for p, e, b in zip(parts, exact, budget, strict=True))


def _timed(call: Callable, qkv: list[Tensor], grad: Tensor, direction: str) -> Callable[[], object]:
    if direction == "fwd":
        plain = [x.detach() for x in qkv]
        return lambda: call(*plain)
    out = call(*qkv)
    return lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True)


def _run(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Attention,
    peer: peers.Peer,
    direction: str,
) -> None:
    """One row: errors first, then time."""
    peer.require(device, case.batch)
    error = None
    flops = case.forward_flops() * FLOPS[direction]
    if peer.same_problem:
        error = _error(case, peer, device)
        assert peer not in OURS or error <= 1.0, f"error is {error:.2f} times its budget"
    else:
        flops *= case.length * (case.length + 1) / 2 / case.pairs()
    qkv, grad = _inputs(case, device)
    call = _timed(_prepared(case, peer, device), qkv, grad, direction)
    measure(
        benchmark, call, device, ceiling, Work(flops=flops),
        op="mixed_attention", case=case.name, provider=peer.name, direction=direction,
        error_over_budget=error, same_problem=peer.same_problem,
    )  # fmt: skip


def rows(ours: tuple[peers.Peer, ...], others: tuple[peers.Peer, ...]) -> list:
    """(peer, direction) pairs; the two of ours share a forward."""
    pairs = [(peer, direction) for peer in (*ours, *others) for direction in FLOPS]
    pairs.remove((DETERMINISTIC, "fwd"))
    return [pytest.param(p, d, id=f"{p.name}-{d}") for p, d in pairs]


@pytest.mark.cases(cuda=cases.ATTENTION_GPU, cpu=cases.ATTENTION_CPU)
@pytest.mark.parametrize(("peer", "direction"), rows(OURS, peers.ATTENTION))
def test_mixed_attention(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Attention,
    peer: peers.Peer,
    direction: str,
) -> None:
    _run(benchmark, device, ceiling, case, peer, direction)


@pytest.mark.cases(cuda=cases.ATTENTION_LENGTHS, cpu=cases.ATTENTION_LENGTHS_CPU)
@pytest.mark.parametrize(("peer", "direction"), rows(OURS, peers.SWEEP))
def test_mixed_attention_lengths(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Attention,
    peer: peers.Peer,
    direction: str,
) -> None:
    _run(benchmark, device, ceiling, case, peer, direction)
