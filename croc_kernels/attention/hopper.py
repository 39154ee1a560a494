"""What the kernels written for sm_90 share: names of Gluon that changed between triton 3.6 and 3.9,
and descriptors for the copy engine.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Of all warps of a partition.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Made once: a launch is short enough for the host to notice.
_TILES = gl.NVMMASharedLayout(128, 16, 4)


@gluon.jit
def of_sample(vector, batch):
    """One sample's part of a vector of the mask, which is a pointer and the stride of its batch."""
    return vector[0] + batch.to(gl.int64) * vector[1]


def tile_descriptor(x: Tensor, block: int, columns: int = 0) -> TensorDescriptor:
    """(1, 1, block, columns or D) tiles of a (B, H, L, D) tensor; rows past the end are zeros."""
    # The stride of a dimension of one element may be anything, and is never used.
    strides = [s if n > 1 else 8 for n, s in zip(x.shape[:3], x.stride(), strict=False)]
    tile = [1, 1, block, columns or x.shape[3]]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], tile, _TILES)
