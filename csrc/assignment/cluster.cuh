// The blocks that work on one problem together: a thread-block cluster along the grid's y axis
// (from sm_90 on), or one block alone. Each keeps the whole state in its own shared memory and
// changes it in the same way; all they tell each other are results, written into everybody's shared
// memory.
#pragma once

#include "block.cuh"

namespace croc::gpu {

#if defined(CROC_EMULATION) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CROC_CLUSTERS
#endif

constexpr int kMostBlocks = 8;  // of a cluster: what every device with clusters can run

// Who works: all blocks of the cluster, or this block.
struct Team {
  int rank, size;

  __device__ static Team all() {
    return {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
  }
  __device__ static constexpr Team alone() { return {0, 1}; }

  // Warps of all blocks, numbered so that few pieces of work go to different blocks.
  __device__ int warp() const { return warp_id() * size + rank; }
  __device__ int warps() const { return warp_count() * size; }

  // What was written before, to any block's shared memory or to global memory, is seen after.
  __device__ void wait() const {
#ifdef CROC_CLUSTERS
    if (size > 1) {
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
  __device__ void tell(T* place, T value) const {
    if (lane_id() >= size) return;
#ifdef CROC_CLUSTERS
    if (size > 1)
      place = static_cast<T*>(__cluster_map_shared_rank(place, static_cast<unsigned>(lane_id())));
#endif
    *place = value;
  }

  // The same, a place and a value of every lane.
  template <class T>
  __device__ void tell_each(T* place, T value) const {
#ifdef CROC_CLUSTERS
    for (int other = 0; size > 1 && other < size; ++other)
      *static_cast<T*>(__cluster_map_shared_rank(place, static_cast<unsigned>(other))) = value;
    if (size > 1) return;
#endif
    *place = value;
  }
};

}  // namespace croc::gpu
