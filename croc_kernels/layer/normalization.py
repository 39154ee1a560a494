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
            if torch.compiler.is_compiling():
                # The compiler fuses the rounding. Torch 2.11 gives the backward a wrong tensor if
                # the one that is saved came from out= or a conversion to its own dtype.
                y = x / norm
                y = y if y.dtype == x.dtype else y.to(x.dtype)
            else:
                # Written as it is rounded: a float32 quotient of bf16 features is twice their size.
                y = torch.div(x, norm, out=torch.empty_like(x))
        ctx.save_for_backward(y, norm)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, norm = ctx.saved_tensors
        with _without_autocast(grad.device):
            along = (grad * y).sum(-1, keepdim=True, dtype=norm.dtype)
            # A row shorter than eps was only divided by eps.
            along = along.masked_fill(norm <= _EPSILON, 0.0)
            across = torch.addcmul(grad, y, along, value=-1.0, out=torch.empty_like(grad))
            return across.div_(norm)


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of norm 1 (a zero row stays zero) in the dtype of ``x``; the arithmetic is float32 or
    wider.
    """
    return _Normalize.apply(x)
