"""What the kernels written for sm_90 share: names of Gluon that changed between triton 3.6 and 3.9,
and descriptors for the copy engine.
"""

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Of all warps of a partition.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def _tma_add(desc, coord, tile, _semantic=None):
    """Add a tile in shared memory to global memory. Triton 3.8 has a name for it."""
    place = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, place, tile.handle)


tma_add = getattr(tma, "async_atomic_add", None) or _tma_add

# Its name since triton 3.9.
_PUBLIC: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

_TILES = gl.NVMMASharedLayout(128, 16, 4)


@gluon.jit
def of_sample(vector, batch):
    """One sample's part of a vector of the mask, which is a pointer and the stride of its batch."""
    return vector[0] + batch.to(gl.int64) * vector[1]


@gluon.jit
def reinterpret(smem, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory, read as something else."""
    if _PUBLIC:
        return smem.reinterpret(dtype, shape, layout)
    else:
        return smem._reinterpret(dtype, shape, layout)


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """As many barriers in shared memory, each for one arrival. Somebody must wait for every one: of
    others the memory goes to data, over which a GPU that processes take turns on writes the barrier
    back (aot.over_barriers).
    """
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


def tile_descriptor(x: Tensor, block: int, columns: int = 0) -> TensorDescriptor:
    """(1, 1, block, columns or D) tiles of a (B, H, L, D) tensor; rows past the end are zeros."""
    (b, h, rows, dim), (step_b, step_h, step_l, _) = x.shape, x.stride()
    # The stride of a dimension of one element may be anything, and is never used.
    strides = [step_b if b > 1 else 8, step_h if h > 1 else 8, step_l if rows > 1 else 8, 1]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, block, columns or dim], _TILES)
