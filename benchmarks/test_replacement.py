"""Token replacement and the reconstruction loss against eager and compiled PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from croc_kernels import reconstruction_loss, replace_tokens
from croc_kernels.testing import EPSILON, max_error

from . import cases, peers
from .timing import Ceiling, Work, measure

BETA = 0.01
REPLACE = peers.Peer("croc", lambda: replace_tokens)
LOSS = peers.Peer("croc", lambda: lambda p, t, w, beta: reconstruction_loss(p, t, w, beta=beta))


def _normal(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def _gradients(call: Callable, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.cases(cuda=cases.REPLACEMENT_GPU, cpu=cases.REPLACEMENT_CPU)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("peer", [REPLACE, *peers.REPLACE], ids=lambda peer: peer.name)
def test_replace_tokens(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Replacement,
    peer: peers.Peer,
    direction: str,
) -> None:
    peer.require(device, case.batch)
    where, index = case.where(device), case.index(device)
    embeddings = _normal((case.batch, case.length, case.dim), 5, device).requires_grad_()
    pool = _normal((case.pool_size, case.dim), 6, device).requires_grad_()
    grad = _normal(tuple(embeddings.shape), 7, device)
    replace = peer.prepare()

    def call(e: Tensor, p: Tensor) -> Tensor:
        return replace(e, where, p, index)

    exact = _gradients(
        lambda e, p: peers.eager_replace(e, where, p, index),
        [x.detach().double().requires_grad_() for x in (embeddings, pool)],
        grad.double(),
    )
    got = _gradients(call, [embeddings, pool], grad)
    error = max(
        max_error(g, e) / (EPSILON[g.dtype] * e.abs().max().item())
        for g, e in zip(got, exact, strict=True)
    )
    assert peer is not REPLACE or error <= 1.0, f"error is {error:.2f} units in the last place"
    size = embeddings.element_size()
    moved = 2.0 * embeddings.numel() * size
    if direction == "bwd":
        moved += pool.numel() * size
        out = call(embeddings, pool)
        timed = lambda: torch.autograd.grad(out, [embeddings, pool], grad, retain_graph=True)  # noqa: E731
    else:
        plain = embeddings.detach(), pool.detach()
        timed = lambda: call(*plain)  # noqa: E731
    measure(
        benchmark, timed, device, ceiling, Work(bytes=moved),
        op="replace_tokens", case=case.name, provider=peer.name, direction=direction,
        error_ulp=error,
    )  # fmt: skip


@pytest.mark.cases(cuda=cases.REPLACEMENT_GPU, cpu=cases.REPLACEMENT_CPU)
@pytest.mark.parametrize("peer", [LOSS, *peers.LOSS], ids=lambda peer: peer.name)
def test_reconstruction_loss(
    benchmark: object,
    device: torch.device,
    ceiling: Ceiling,
    case: cases.Replacement,
    peer: peers.Peer,
) -> None:
    peer.require(device, case.batch)
    where = case.where(device)
    shape = (case.batch, case.length, case.dim)
    prediction, target = _normal(shape, 5, device).requires_grad_(), _normal(shape, 6, device)
    loss = peer.prepare()
    one = torch.ones((), device=device)

    exact = _gradients(
        lambda p: peers.eager_loss(p, target.double(), where, BETA),
        [prediction.detach().double().requires_grad_()],
        one.double(),
    )
    value = loss(prediction, target, where, BETA)
    gradient = torch.autograd.grad(value, prediction)[0]
    # 1e-5: float32 sums of 1e8 terms in any sensible order; a wrong term is off by far more.
    errors = [
        max_error(value, exact[0]) / (1e-5 * exact[0].abs().item()),
        max_error(gradient, exact[1]) / (EPSILON[gradient.dtype] * exact[1].abs().max().item()),
    ]
    assert peer is not LOSS or max(errors) <= 1.0, f"errors over budget: {errors}"
    selected = case.batch * case.num_replaced * case.dim
    # Prediction and target of the selected tokens are read, the whole gradient is written.
    work = Work(bytes=float((2 * selected + prediction.numel()) * prediction.element_size()))
    measure(
        benchmark,
        lambda: torch.autograd.grad(loss(prediction, target, where, BETA), prediction),
        device, ceiling, work,
        op="reconstruction_loss", case=case.name, provider=peer.name, direction="fwd+bwd",
        error_over_budget=max(errors),
    )  # fmt: skip
