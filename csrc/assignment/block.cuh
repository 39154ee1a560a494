// Reductions of a warp and of a block. All are deterministic: minima are exact, sums have a fixed
// order.
#pragma once

#include "platform.cuh"

namespace croc::gpu {

// Doubles as integers of the same order, so that the integer minimum of sm_80 finds the least
// double.
__device__ inline uint64_t ordered(double x) {
  const int64_t bits = __double_as_longlong(x + 0.0);  // + 0.0: minus zero ties with zero
  return static_cast<uint64_t>(bits ^ ((bits >> 63) | INT64_MIN));
}

__device__ inline double from_ordered(uint64_t key) {
  const int64_t bits = static_cast<int64_t>(key);
  return __longlong_as_double(bits ^ (~(bits >> 63) | INT64_MIN));
}

__device__ inline float rounded_down(float, double x) { return __double2float_rd(x); }
__device__ inline double rounded_down(double, double x) { return x; }
__device__ inline float rounded_up(float, double x) { return __double2float_ru(x); }
__device__ inline double rounded_up(double, double x) { return x; }
// x y + z
__device__ inline float sum_down(float x, float y, float z) { return __fmaf_rd(x, y, z); }
__device__ inline double sum_down(double x, double y, double z) { return __fma_rd(x, y, z); }
__device__ inline float sum_up(float x, float y, float z) { return __fmaf_ru(x, y, z); }

__device__ inline uint64_t warp_min(uint64_t x) {
  const unsigned high = static_cast<unsigned>(x >> 32);
  const unsigned least = __reduce_min_sync(kAllLanes, high);
  const unsigned low = __reduce_min_sync(kAllLanes, high == least ? static_cast<unsigned>(x) : ~0u);
  return static_cast<uint64_t>(least) << 32 | low;
}

// The least (value, key) pair: a distance and who has it. `none` is larger than any pair that is
// one.
struct Least {
  uint64_t value;
  unsigned key;

  __device__ static Least none() { return {~uint64_t{0}, ~0u}; }
  __device__ bool operator<(Least other) const {
    return value < other.value || (value == other.value && key < other.key);
  }
};

// Most often one lane alone has the least upper half, which saves two reductions of three.
__device__ inline Least warp_least(Least mine) {
  const unsigned high = static_cast<unsigned>(mine.value >> 32);
  const unsigned low = static_cast<unsigned>(mine.value);
  const unsigned least = __reduce_min_sync(kAllLanes, high);
  const unsigned votes = __ballot_sync(kAllLanes, high == least);
  if ((votes & (votes - 1)) == 0) {
    const int lane = __ffs(static_cast<int>(votes)) - 1;
    const unsigned its_low = __shfl_sync(kAllLanes, low, lane);
    return {static_cast<uint64_t>(least) << 32 | its_low, __shfl_sync(kAllLanes, mine.key, lane)};
  }
  const unsigned least_low = __reduce_min_sync(kAllLanes, high == least ? low : ~0u);
  const bool tied = high == least && low == least_low;
  return {static_cast<uint64_t>(least) << 32 | least_low,
          __reduce_min_sync(kAllLanes, tied ? mine.key : ~0u)};
}

// One barrier. Every warp repeats the last step, so nobody waits for a broadcast. Calls alternate
// between two sets of slots (`turn`): a warp may write for the next call while another still reads
// this one's.
// `of_warps`: lane w gets the least of warp w.
__device__ inline Least block_least(Least mine, int turn, Least& of_warps) {
  __shared__ Least slots[2][kWarp];
  const Least of_warp = warp_least(mine);
  if (lane_id() == 0) slots[turn & 1][warp_id()] = of_warp;
  __syncthreads();
  of_warps = lane_id() < warp_count() ? slots[turn & 1][lane_id()] : Least::none();
  return warp_least(of_warps);
}

__device__ inline Least block_least(Least mine, int turn) {
  Least of_warps;
  return block_least(mine, turn, of_warps);
}

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The sum over the block, in every thread.
__device__ inline double block_sum(double x) {
  __shared__ double slots[kWarp];
  x = warp_sum(x);
  __syncthreads();
  if (lane_id() == 0) slots[warp_id()] = x;
  __syncthreads();
  return warp_sum(lane_id() < warp_count() ? slots[lane_id()] : 0.0);
}

__device__ inline double block_min(double x) {
  __shared__ uint64_t slots[kWarp];
  const uint64_t of_warp = warp_min(ordered(x));
  __syncthreads();
  if (lane_id() == 0) slots[warp_id()] = of_warp;
  __syncthreads();
  return from_ordered(warp_min(lane_id() < warp_count() ? slots[lane_id()] : ~uint64_t{0}));
}

// The sum of small counts over the block, in every thread. `turn` as in block_least.
__device__ inline int block_count(int x, int turn) {
  __shared__ unsigned slots[2][kWarp];
  const unsigned of_warp = __reduce_add_sync(kAllLanes, static_cast<unsigned>(x));
  if (lane_id() == 0) slots[turn & 1][warp_id()] = of_warp;
  __syncthreads();
  return static_cast<int>(
      __reduce_add_sync(kAllLanes, lane_id() < warp_count() ? slots[turn & 1][lane_id()] : 0u));
}

// The largest of non-negative numbers over the block. `turn` as in block_least.
__device__ inline float block_most(float x, int turn) {
  __shared__ int slots[2][kWarp];
  const int of_warp = __reduce_max_sync(kAllLanes, static_cast<int>(__float_as_uint(x)));
  if (lane_id() == 0) slots[turn & 1][warp_id()] = of_warp;
  __syncthreads();
  const int mine = lane_id() < warp_count() ? slots[turn & 1][lane_id()] : 0;
  return __uint_as_float(static_cast<unsigned>(__reduce_max_sync(kAllLanes, mine)));
}

// Writes the indices below `count` for which `keep` holds to `list`, in order and at most `room` of
// them; returns how many it wrote. Four indices per thread and barrier.
template <class Keep>
__device__ int block_collect(int count, int* list, int room, Keep keep) {
  __shared__ int slots[2][kWarp];
  const unsigned earlier_lanes = (1u << lane_id()) - 1u;
  int total = 0, turn = 0;
  for (int start = 0; start < count; start += 4 * blockDim.x, ++turn) {
    const int first = start + 4 * static_cast<int>(threadIdx.x);
    bool kept[4];
    int before = 0, of_warp = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      kept[k] = first + k < count && keep(first + k);
      const unsigned votes = __ballot_sync(kAllLanes, kept[k]);
      before += __popc(votes & earlier_lanes);
      of_warp += __popc(votes);
    }
    if (lane_id() == 0) slots[turn & 1][warp_id()] = of_warp;
    __syncthreads();
    const int here = lane_id() < warp_count() ? slots[turn & 1][lane_id()] : 0;
    int place =
        total + before +
        __reduce_add_sync(kAllLanes, static_cast<unsigned>(lane_id() < warp_id() ? here : 0));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (kept[k] && place < room) list[place] = first + k;
      place += kept[k];
    }
    total += static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(here)));
  }
  __syncthreads();
  return min(total, room);
}

// The value of rank `rank` (0 is the least) among `count` non-negative floats, by bisection on
// their bits: one barrier per bit. The first values stay in registers; `read(k)` gives value k.
template <class Read>
__device__ float block_select(int count, int rank, Read read) {
  constexpr int kHeld = 8;
  unsigned held[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int k = static_cast<int>(threadIdx.x + h * blockDim.x);
    held[h] = k < count ? __float_as_uint(read(k)) : ~0u;
  }
  unsigned low = 0, high = 0x7f800000u;  // the answer's bits are in [low, high]
  for (int turn = 0; low < high; ++turn) {
    const unsigned middle = low + (high - low) / 2;
    int below = 0;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) below += held[h] <= middle;
    for (int k = static_cast<int>(threadIdx.x + kHeld * blockDim.x); k < count; k += blockDim.x)
      below += __float_as_uint(read(k)) <= middle;
    if (block_count(below, turn) > rank)
      high = middle;
    else
      low = middle + 1;
  }
  __syncthreads();  // the next call starts again with the first slots
  return __uint_as_float(low);
}

}  // namespace croc::gpu
