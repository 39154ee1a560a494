"""L2 normalisation of rows with norms in float32 and nothing but the result kept for the backward
pass.
"""

import contextlib

import torch
from torch import Tensor

from .. import ops

EPSILON = 1e-12


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast would copy a half-precision input to float32 before its norm is taken."""
    return torch.autocast(device.type, enabled=False)


def l2_normalize_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """``croc_kernels::l2_normalize_fwd`` in PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with _without_autocast(x.device):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        norm = norm.clamp_min(EPSILON)
        # Written as it is rounded: a float32 quotient of bf16 features is twice their size.
        return torch.div(x, norm, out=x.new_empty(x.shape)), norm


def l2_normalize_bwd(grad: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    """``croc_kernels::l2_normalize_bwd`` in PyTorch."""
    with _without_autocast(grad.device):
        along = (grad * y).sum(-1, keepdim=True, dtype=norm.dtype)
        # A row shorter than eps was only divided by eps.
        along = along.masked_fill(norm <= EPSILON, 0.0)
        across = torch.addcmul(grad, y, along, value=-1.0, out=y.new_empty(y.shape))
        return across.div_(norm)


class _Normalize(torch.autograd.Function):
    """y = x / max(|x|, eps) by rows; dx = (g - y (y . g)) / |x|."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y, norm = ops.l2_normalize_fwd(x)
        ctx.save_for_backward(y, norm)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return ops.l2_normalize_bwd(grad, *ctx.saved_tensors)


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of norm 1 (a zero row stays zero) in the dtype of ``x``; the arithmetic is float32 or
    wider.
    """
    return _Normalize.apply(x)
