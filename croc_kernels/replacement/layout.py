"""How the replacement and loss kernels see memory: rows of components, addressed by two strides."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_offset(row, length, stride_b, stride_l):
    """Element offset of flat row ``row`` of a (B, length, C) tensor."""
    return (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


def column_block(dim: int, largest: int = 1024) -> int:
    """Components per tile."""
    return min(largest, max(16, triton.next_power_of_2(dim)))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor as (B, L, C) with unit stride inside rows; a view unless its strides forbid it."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    while tensor.dim() < 3:
        tensor = tensor.unsqueeze(0)
    return tensor if tensor.dim() == 3 else tensor.reshape(-1, *tensor.shape[-2:])


def accumulator(*dtypes: torch.dtype) -> tl.dtype:
    """What sums are kept in."""
    return tl.float64 if torch.float64 in dtypes else tl.float32
