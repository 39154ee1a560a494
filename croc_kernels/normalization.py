"""L2 normalisation of rows with norms in float32 and nothing but the result kept for the backward
pass.
"""

import contextlib

import torch
from torch import Tensor

_EPSILON = 1e-12


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast would copy a half-precision input to float32 before its norm is taken."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class _Normalize(torch.autograd.Function):
    """y = x / max(|x|, eps) by rows; dx = (g - y (y . g)) / |x|."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with _without_autocast(x.device):
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
            norm = norm.clamp_min(_EPSILON)
            y = (x / norm).to(x.dtype)
        ctx.save_for_backward(y, norm)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, norm = ctx.saved_tensors
        with _without_autocast(grad.device):
            wide = grad.to(norm.dtype)
            # A row shorter than eps was only divided by eps.
            along = (wide * y).sum(-1, keepdim=True).masked_fill(norm <= _EPSILON, 0.0)
            return ((wide - y * along) / norm).to(grad.dtype)


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of norm 1 (a zero row stays zero) in the dtype of ``x``; the arithmetic is float32 or
    wider.
    """
    return _Normalize.apply(x)
