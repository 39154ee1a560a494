"""Replacement and reconstruction loss on CPU tensors, in chunks so that nothing is copied whole."""

import torch
from torch import Tensor

from .config import KEEP

_CHUNK_ELEMENTS = 2**22


def _precision(*tensors: Tensor) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _check_source(source: Tensor, pool_size: int) -> None:
    bad = source[(source != KEEP) & ((source < 0) | (source >= pool_size))]
    if bad.numel() > 0:
        raise ValueError(
            f"replace_tokens: index must be in [0, {pool_size}) where selected, got {bad[0].item()}"
        )


def replace_tokens_fwd(embeddings: Tensor, pool: Tensor, source: Tensor) -> Tensor:
    """``croc_kernels::replace_tokens_fwd`` for CPU tensors."""
    _check_source(source, pool.shape[0])
    out = embeddings.clone(memory_format=torch.contiguous_format)
    if out.numel() > 0:
        place = (source >= 0).nonzero().squeeze(1)
        out.view(-1, pool.shape[1])[place] = pool[source[place]].to(out.dtype)
    return out


def replace_tokens_bwd(
    grad_out: Tensor,
    source: Tensor,
    pool_size: int,
    pool_dtype: torch.dtype,
    embeddings_grad: bool,
    pool_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``croc_kernels::replace_tokens_bwd`` for CPU tensors."""
    dim = grad_out.shape[-1]
    embeddings = grad_out.new_zeros(0)
    if embeddings_grad:
        embeddings = grad_out.clone(memory_format=torch.contiguous_format)
        if embeddings.numel() > 0:
            embeddings.view(-1, dim)[source != KEEP] = 0
    pool = grad_out.new_zeros((pool_size if pool_grad else 0, dim), dtype=pool_dtype)
    if pool_grad and grad_out.numel() > 0:
        rows = grad_out.reshape(-1, dim)
        acc = torch.zeros((pool_size, dim), dtype=_precision(grad_out, pool))
        # index_add_ on CPU adds one row after the other: bitwise repeatable.
        for place in (source >= 0).nonzero().squeeze(1).split(max(1, _CHUNK_ELEMENTS // dim)):
            acc.index_add_(0, source[place], rows[place].to(acc.dtype))
        pool = acc.to(pool_dtype)
    return embeddings, pool


def reconstruction_loss_fwd(
    prediction: Tensor, target: Tensor, where: Tensor | None, beta: float, prediction_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``croc_kernels::reconstruction_loss_fwd`` for CPU tensors."""
    dtype = _precision(prediction, target)
    gradient = torch.zeros(prediction.shape if prediction_grad else (0,), dtype=prediction.dtype)
    tokens, dim = prediction.shape[:-1].numel(), prediction.shape[-1]
    chosen = torch.arange(tokens) if where is None else where.reshape(-1).nonzero().squeeze(1)
    total = torch.zeros((), dtype=torch.float64)
    count = torch.tensor(chosen.numel(), dtype=dtype)
    if prediction.numel() == 0:
        return total.to(dtype), count, gradient
    a, b = prediction.reshape(-1, dim), target.reshape(-1, dim)
    for place in chosen.split(max(1, _CHUNK_ELEMENTS // dim)):
        difference = a[place].to(dtype) - b[place].to(dtype)
        size = difference.abs()
        small = size < beta
        if beta > 0:
            size = torch.where(small, difference.square() / (2 * beta), size - beta / 2)
        total += size.sum(dtype=torch.float64)
        if prediction_grad:
            slope = torch.sign(difference)
            if beta > 0:
                slope = torch.where(small, difference / beta, slope)
            gradient.view(-1, dim)[place] = slope.to(gradient.dtype)
    return total.to(dtype), count, gradient


def reconstruction_loss_bwd(gradient: Tensor, scale: Tensor) -> Tensor:
    """``croc_kernels::reconstruction_loss_bwd`` for CPU tensors."""
    # A 0-d operand does not widen the other one, and would be rounded to its dtype.
    out = torch.empty(gradient.shape, dtype=gradient.dtype)
    flat = zip(
        out.view(-1).split(_CHUNK_ELEMENTS),
        gradient.reshape(-1).split(_CHUNK_ELEMENTS),
        strict=True,
    )
    for into, part in flat:
        into.copy_(part.to(scale.dtype) * scale)
    return out
