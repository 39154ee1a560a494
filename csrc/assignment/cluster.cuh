// The blocks that work on one problem together: a thread-block cluster along the grid's y axis (sm_90), or
// one block alone. Each block keeps the whole state in its own shared memory and changes it in the
// same way; all they tell each other are results, written into everybody's shared memory.
#pragma once

#include "block.cuh"

namespace croc::gpu {

#if defined(CROC_EMULATION) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CROC_CLUSTERS
#endif

constexpr int kMostBlocks = 8;  // of a cluster: what every device with clusters can run

__device__ inline int cluster_rank() { return static_cast<int>(blockIdx.y); }
__device__ inline int cluster_size() { return static_cast<int>(gridDim.y); }

// Warps of all blocks, numbered so that few pieces of work go to different blocks.
__device__ inline int cluster_warp() { return warp_id() * cluster_size() + cluster_rank(); }
__device__ inline int cluster_warps() { return warp_count() * cluster_size(); }

// What was written before, to any block's shared memory or to global memory, is seen after.
__device__ inline void cluster_wait() {
#ifdef CROC_CLUSTERS
  if (cluster_size() > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    return;
  }
#endif
  __syncthreads();
}

// Writes to one place of dynamic shared memory in every block. By one warp, whose lanes agree on
// the value.
template <class T>
__device__ void cluster_tell(T* place, T value) {
  if (lane_id() >= cluster_size()) return;
#ifdef CROC_CLUSTERS
  if (cluster_size() > 1)
    place =
        static_cast<T*>(__cluster_map_shared_rank(place, static_cast<unsigned>(lane_id())));
#endif
  *place = value;
}

}  // namespace croc::gpu
