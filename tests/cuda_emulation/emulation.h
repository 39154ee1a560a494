// A small CUDA on the host, enough to run csrc/assignment/*.cuh as they are: blocks run one after
// another, the threads of a block are fibers that switch only where CUDA lets threads wait for each
// other. The order of fibers is a seeded shuffle, so a missing barrier shows as a result that
// depends on the seed. The blocks of a cluster run together, each on a thread of the host's own, so
// that each has its own shared memory; one runs at a time, and who is next is part of the shuffle.
//
// It checks what a GPU leaves undefined: a barrier that part of a block reaches elsewhere or never,
// and a warp operation whose lanes are not all there. It does not model memory ordering inside one
// step of a fiber.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define CROC_DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic_shared()

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct double2 {
  double x, y;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Host side. start() clears the error and sets the schedule: seed 0 runs threads in order, any
// other shuffles them. After an error launch() does nothing.
void start(uint64_t seed);
const char* error();
// `cluster` > 1: the grid's y axis is one cluster of so many blocks.
void launch(std::function<void()> body, dim3 grid, int threads, int64_t shared, int cluster = 1);

// Device side. All block the calling fiber until its warp or block is complete. `site` names the
// source line: threads that wait for each other at different lines are an error.
enum class Op {
  kBarrier,
  kBarrierOr,
  kClusterBarrier,
  kReduceMin,
  kReduceMax,
  kReduceAdd,
  kReduceMinSigned,
  kReduceMaxSigned,
  kBallot,
  kWarpBarrier
};
uint64_t block_wait(Op op, uint64_t value, int site);
void cluster_wait(int site);
// The same place in another block's shared memory.
void* cluster_address(const void* address, unsigned rank);
uint64_t warp_reduce(Op op, uint64_t value, int site);
void warp_wait(int site);
uint64_t warp_shuffle(uint64_t value, int source, int site);
void check_mask(unsigned mask);
void maybe_switch();  // before an atomic: other threads may come first
int64_t clock();      // rises by one with every call
unsigned char* dynamic_shared();
// Copies arrive as late as they may: when their thread waits for them. Until then NaN is in their
// place, and who writes there or reads meanwhile races with the copy.
void copy_ahead(void* to, const void* from, size_t size, size_t room);  // 0 beyond `size`
void close_copies();
void wait_for_copies(int left);

template <class T>
uint64_t to_bits(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
template <class T>
T shuffle(unsigned mask, T x, int source, int site) {
  check_mask(mask);
  return from_bits<T>(warp_shuffle(to_bits(x), source, site));
}
// Relaxed, as on the device: an atomic orders nothing else.
template <class T, class Choose>
T update(T* address, Choose choose) {
  maybe_switch();
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &before, choose(before), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return before;
}

}  // namespace emulation

#define __syncthreads() ((void)emulation::block_wait(emulation::Op::kBarrier, 0, __LINE__))
#define __syncthreads_or(x)                                          \
  (static_cast<int>(emulation::block_wait(emulation::Op::kBarrierOr, \
                                          static_cast<uint64_t>((x) != 0), __LINE__)))
#define __syncwarp() emulation::warp_wait(__LINE__)
#define __cluster_barrier_arrive() ((void)0)  // everybody waits at once
#define __cluster_barrier_wait() emulation::cluster_wait(__LINE__)
#define __cluster_map_shared_rank(address, rank) emulation::cluster_address(address, rank)
#define __shfl_sync(mask, value, lane) emulation::shuffle(mask, value, (lane) & 31, __LINE__)
#define __shfl_xor_sync(mask, value, step) \
  emulation::shuffle(mask, value, (static_cast<int>(threadIdx.x) & 31) ^ (step), __LINE__)

inline unsigned __reduce_min_sync(unsigned mask, unsigned x, int site = __builtin_LINE()) {
  emulation::check_mask(mask);
  return static_cast<unsigned>(emulation::warp_reduce(emulation::Op::kReduceMin, x, site));
}
inline int __reduce_min_sync(unsigned mask, int x, int site = __builtin_LINE()) {
  emulation::check_mask(mask);
  return static_cast<int>(
      emulation::warp_reduce(emulation::Op::kReduceMinSigned, static_cast<uint64_t>(x), site));
}
inline int __reduce_max_sync(unsigned mask, int x, int site = __builtin_LINE()) {
  emulation::check_mask(mask);
  return static_cast<int>(
      emulation::warp_reduce(emulation::Op::kReduceMaxSigned, static_cast<uint64_t>(x), site));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x, int site = __builtin_LINE()) {
  emulation::check_mask(mask);
  return static_cast<unsigned>(emulation::warp_reduce(emulation::Op::kReduceAdd, x, site));
}
inline unsigned __ballot_sync(unsigned mask, bool x, int site = __builtin_LINE()) {
  emulation::check_mask(mask);
  return static_cast<unsigned>(emulation::warp_reduce(emulation::Op::kBallot, x, site));
}
inline int __any_sync(unsigned mask, int x, int site = __builtin_LINE()) {
  return __ballot_sync(mask, x != 0, site) != 0;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T atomicMin(T* address, T value) {
  return emulation::update(address, [value](T before) { return std::min(before, value); });
}
template <class T>
T atomicAdd(T* address, T value) {
  return emulation::update(address, [value](T before) { return before + value; });
}
template <class T>
T atomicOr(T* address, T value) {
  return emulation::update(address, [value](T before) { return before | value; });
}
template <class T>
T atomicMax(T* address, T value) {
  return emulation::update(address, [value](T before) { return std::max(before, value); });
}

inline int64_t __double_as_longlong(double x) {
  return emulation::from_bits<int64_t>(emulation::to_bits(x));
}
inline double __longlong_as_double(int64_t x) {
  return emulation::from_bits<double>(emulation::to_bits(x));
}
inline unsigned __float_as_uint(float x) {
  return emulation::from_bits<unsigned>(emulation::to_bits(x));
}
inline float __uint_as_float(unsigned x) {
  return emulation::from_bits<float>(emulation::to_bits(x));
}
inline float __double2float_rd(double x) {
  const float nearest = static_cast<float>(x);
  return nearest > x ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __double2float_ru(double x) { return -__double2float_rd(-x); }
// Below the exact result, if not always the nearest number below it.
inline double __fma_rd(double x, double y, double z) {
  return std::nextafter(std::fma(x, y, z), -INFINITY);
}
inline float __fmaf_rd(float x, float y, float z) { return __double2float_rd(__fma_rd(x, y, z)); }
inline float __fmaf_ru(float x, float y, float z) { return -__fmaf_rd(-x, y, -z); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k)
    result |= static_cast<unsigned>(both >> 8 * (selector >> 4 * k & 7u) & 255u) << 8 * k;
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int64_t clock64() { return emulation::clock(); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::fma, std::fmax, std::fmaxf, std::fmin, std::ldexp, std::log, std::max, std::min,
    std::rint;
