"""Replacement and reconstruction loss on CPU tensors, in chunks so that nothing is copied whole."""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS = 2**22
_NONE = 0  # ATen's word for reduction="none"


def _precision(*tensors: Tensor) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _places(where: Tensor, index: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """Flat rows that are replaced, and the pool row of each."""
    place = where.reshape(-1).nonzero().squeeze(1)
    drawn = index.reshape(-1)[place].long()
    bad = drawn[(drawn < 0) | (drawn >= pool_size)]
    if bad.numel() > 0:
        raise ValueError(
            f"replace_tokens: index must be in [0, {pool_size}) where selected, got {bad[0].item()}"
        )
    return place, drawn


def replace_tokens_fwd(embeddings: Tensor, where: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """``croc_kernels::replace_tokens_fwd`` for CPU tensors."""
    place, drawn = _places(where, index, pool.shape[0])
    out = embeddings.clone(memory_format=torch.contiguous_format)
    if out.numel() > 0:
        out.view(-1, pool.shape[1])[place] = pool[drawn].to(out.dtype)
    return out


def replace_tokens_bwd(
    grad_out: Tensor,
    where: Tensor,
    index: Tensor,
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
            embeddings.view(-1, dim)[where.reshape(-1)] = 0
    pool = grad_out.new_zeros((pool_size if pool_grad else 0, dim), dtype=pool_dtype)
    if pool_grad and grad_out.numel() > 0:
        rows = grad_out.reshape(-1, dim)
        acc = torch.zeros((pool_size, dim), dtype=_precision(grad_out, pool))
        place, drawn = _places(where, index, pool_size)
        # index_add_ on CPU adds one row after the other: bitwise repeatable.
        size = max(1, _CHUNK_ELEMENTS // dim)
        for some, of in zip(place.split(size), drawn.split(size), strict=True):
            acc.index_add_(0, of, rows[some].to(acc.dtype))
        pool = acc.to(pool_dtype)
    return embeddings, pool


def _selected(like: Tensor, where: Tensor | None) -> list[slice | Tensor]:
    """Flat rows that count, in chunks: slices, which copy nothing, where all do."""
    tokens, dim = like.shape[:-1].numel(), max(like.shape[-1], 1)
    size = max(1, _CHUNK_ELEMENTS // dim)
    if where is None:
        return [slice(first, first + size) for first in range(0, tokens, size)]
    return list(where.reshape(-1).nonzero().squeeze(1).split(size))


def reconstruction_loss_fwd(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    items: Tensor | None,
    beta: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """``croc_kernels::reconstruction_loss_fwd`` for CPU tensors."""
    dtype, dim = _precision(prediction, target), prediction.shape[-1]
    total = torch.zeros((), dtype=torch.float64)
    divisor = torch.ones((), dtype=torch.float64)
    if prediction.numel() == 0:
        return total.to(dtype), divisor.to(dtype)
    if mean:
        count = torch.tensor(prediction.shape[:-1].numel()) if where is None else where.sum()
        count = (count if items is None else items).double()
        divisor = torch.where(count > 0, count, 1.0) * dim
    a, b = prediction.reshape(-1, dim), target.reshape(-1, dim)
    for place in _selected(prediction, where):
        p, t = a[place].to(dtype), b[place].to(dtype)
        size = F.smooth_l1_loss(p, t, reduction="none", beta=beta)
        total += size.sum(dtype=torch.float64)
    return (total / divisor).to(dtype), divisor.to(dtype)


def reconstruction_loss_bwd(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    divisor: Tensor,
    grad_loss: Tensor,
    beta: float,
) -> Tensor:
    """``croc_kernels::reconstruction_loss_bwd`` for CPU tensors."""
    out = torch.zeros(prediction.shape, dtype=prediction.dtype)
    if out.numel() == 0:
        return out
    dim, scale = prediction.shape[-1], grad_loss / divisor
    a, b = prediction.reshape(-1, dim), target.reshape(-1, dim)
    for place in _selected(prediction, where):
        p, t = a[place].to(scale.dtype), b[place].to(scale.dtype)
        if beta > 0:
            slope = torch.ops.aten.smooth_l1_loss_backward(scale.expand_as(p), p, t, _NONE, beta)
        else:
            slope = torch.sign(p - t) * scale
        out.view(-1, dim)[place] = slope.to(out.dtype)
    return out


def reconstruction_loss_fwd_foreseen(
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    items: Tensor | None,
    beta: float,
    mean: bool,
    history: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``croc_kernels::reconstruction_loss_fwd_foreseen`` for CPU tensors: expects nothing."""
    loss, divisor = reconstruction_loss_fwd(prediction, target, where, items, beta, mean)
    return loss, divisor, torch.full_like(loss, torch.nan), torch.zeros_like(prediction)


def reconstruction_loss_bwd_foreseen(
    gradient: Tensor,
    prediction: Tensor,
    target: Tensor,
    where: Tensor | None,
    divisor: Tensor,
    grad_loss: Tensor,
    expected: Tensor,
    history: Tensor,
    beta: float,
) -> None:
    """``croc_kernels::reconstruction_loss_bwd_foreseen`` for CPU tensors."""
    gradient.copy_(reconstruction_loss_bwd(prediction, target, where, divisor, grad_loss, beta))
