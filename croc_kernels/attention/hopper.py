"""Names of Gluon that changed between triton 3.6 and 3.9, for the kernels written for sm_90."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Of all warps of a partition.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
