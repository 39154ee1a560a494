// What the device code needs from its compiler. It is built twice: by nvcc, and by a host compiler
// against tests/cuda_emulation, where a block's threads are fibers. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef CROC_EMULATION
#include "emulation.h"
#define CROC_NOINLINE
#else
#include <cuda_runtime.h>
#define CROC_NOINLINE __noinline__
#define CROC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace croc::gpu {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ inline double infinity() { return __longlong_as_double(0x7ff0000000000000LL); }
__device__ inline bool is_finite(double x) { return x - x == 0.0; }

// Without fmin's rules for NaN, which cost instructions: a cost that is NaN ends its problem before
// any use of this.
template <class T>
__device__ T lesser(T x, T y) {
  return x < y ? x : y;
}

template <class T>
__device__ T greater(T x, T y) {
  return x > y ? x : y;
}

// 2^x; what is below the least normal number is 0.
__device__ inline float power_of_two(float x) {
#ifdef CROC_EMULATION
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// From global memory that this kernel may have written, before a barrier.
template <class T>
__device__ T load_cached(const T* address) {
#ifdef CROC_EMULATION
  return *address;
#else
  return __ldca(address);
#endif
}

constexpr int kLine = 128;  // bytes

__device__ inline void prefetch(const void* address) {
#ifdef CROC_EMULATION
  (void)address;
#else
  asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(address)));
#endif
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }

}  // namespace croc::gpu
