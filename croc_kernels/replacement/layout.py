"""How the replacement and loss kernels see memory: rows of components, addressed by two strides."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..backend import capability, interpreted

__all__ = [
    "accumulator", "as_rows", "column_block", "gdc_launch_dependents", "gdc_wait",
    "launches_overlap", "row_offset",
]  # fmt: skip


@triton.jit
def row_offset(row, length, stride_b, stride_l):
    """Element offset of flat row ``row`` of a (B, length, C) tensor."""
    return (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


def column_block(dim: int, largest: int = 1024) -> int:
    """Components per tile."""
    return min(largest, max(16, triton.next_power_of_2(dim)))


def launches_overlap(tensor: Tensor) -> bool:
    """Whether a kernel may start before the one launched ahead of it has ended.

    A kernel launched with ``launch_pdl`` starts when all programs of the kernel before it have
    called ``gdc_launch_dependents``, and must call ``gdc_wait`` before it uses what that kernel
    writes. Only for a pair of our own: the first is launched as usual, so whatever came before it
    has ended.
    """
    return tensor.is_cuda and not interpreted() and capability(tensor.device.index) >= 90


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
