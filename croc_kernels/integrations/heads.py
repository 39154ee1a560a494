"""Heads of any size: transformers has models whose heads the kernels don't take as they are.

Zeros at the end of a head change no score and no output, so queries and keys of 72 components run
as 80, and values may be narrower than keys (DeepSeek's latent attention). Heads above the largest
size of the kernels (the full layers of Gemma 4 have 512) run in PyTorch's own attention, with a
dense mask.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..attention.api import mixed_attention
from ..attention.config import HEAD_DIMS
from ..attention.mask import MixedMask
from ..backend import log_choice, uses_triton


def padded_size(key_size: int, value_size: int, on_kernel: bool) -> int | None:
    """The size that heads are padded to, or None if no kernel is that large."""
    size = max(key_size, value_size)
    if not on_kernel:
        return size
    return next((supported for supported in HEAD_DIMS if supported >= size), None)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """``mixed_attention`` for heads of any size: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)
    to (B, Hq, Lq, Dv).
    """
    key_size, value_size = query.shape[-1], value.shape[-1]
    scale = key_size**-0.5 if scale is None else scale
    on_kernel = uses_triton(query)
    size = padded_size(key_size, value_size, on_kernel)
    if size is None or (on_kernel and query.dtype == torch.float64):
        return _dense(query, key, value, mask, scale, softcap)
    query, key, value = (
        tensor if tensor.shape[-1] == size else functional.pad(tensor, (0, size - tensor.shape[-1]))
        for tensor in (query, key, value)
    )
    out = mixed_attention(query, key, value, mask, scale=scale, softcap=softcap)
    return out if value_size == size else out[..., :value_size]


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MixedMask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """PyTorch's attention with the mask written out; rows that see nothing give zeros."""
    what = f"heads of {query.shape[-1]}, {query.dtype}"
    log_choice("attn_implementation", "torch", f"{what}: no kernel, a dense mask in every layer")
    if softcap is not None:
        raise ValueError(
            f'attn_implementation="croc": softcap must be None with {what}, got {softcap}; use '
            '"eager"'
        )
    visible = mask.to_dense()
    blind = ~visible.any(-1, keepdim=True)
    # Not enable_gqa: with it and a mask PyTorch writes all scores out.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible | blind, scale=scale
    )
    return out.masked_fill(blind, 0.0)
