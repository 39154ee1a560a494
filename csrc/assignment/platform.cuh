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

// Copies kBytes, 4 or 16, from global to shared memory, or 0 if not `with`. They are there for this
// thread once it has waited for the group that they are in; close_copies ends a group.
template <int kBytes>
__device__ void copy_ahead(float* to, const float* from, bool with) {
#ifdef CROC_EMULATION
  emulation::copy_ahead(to, from, with ? kBytes : 0, kBytes);
#else
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const size_t address = __cvta_generic_to_global(from);
  const int bytes = with ? kBytes : 0;
  if (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(address),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(place), "l"(address),
                 "r"(bytes)
                 : "memory");
#endif
}

__device__ inline void close_copies() {
#ifdef CROC_EMULATION
  emulation::close_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// For all groups but the last `left`, at most 2.
__device__ inline void wait_for_copies(int left) {
#ifdef CROC_EMULATION
  emulation::wait_for_copies(left);
#else
  if (left >= 2)
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  else if (left == 1)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }

}  // namespace croc::gpu
