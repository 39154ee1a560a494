// Each row's nearest columns under the start, and rows that are equal.
#pragma once

#include "candidates.cuh"

namespace croc::gpu {

__device__ inline unsigned folded_bits(float x) { return __float_as_uint(x); }
__device__ inline unsigned folded_bits(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  return static_cast<unsigned>(bits ^ bits >> 32);
}

// Grid (batch, rows / warps): u = min(c - v) and its column, and a hash of the row. Ties go to
// columns that differ between rows, or equal rows would all ask for the same one. Lists the row.
template <class T>
__device__ void find_nearest(const Problem<T>& p) {
  const int row = row_of_warp();
  if (row >= p.n || p.failed()) return;
  const int turn = rotation(row, p.m);
  double least = infinity();
  unsigned key = ~0u, hash = 0;
  const bool listed = p.listed();
  Nearest nearest = Nearest::none();
  for_row(p.costs, row, [&](int first, const T(&x)[4]) {
    double v[4];
    four(p.work.v, first, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      hash = (hash ^ folded_bits(x[k])) * 0x9e3779b1u;
      const double reduced = static_cast<double>(x[k]) - v[k];
      if (reduced <= least) {
        const unsigned mine = rotated(first + k, turn, p.m);
        if (reduced < least || mine < key) least = reduced, key = mine;
      }
      if (listed) nearest.add(reduced, first + k);
    }
  });
  if (listed) store_list(p.costs, p.lists(), row, nearest);
  const Least found = warp_least({ordered(least), key});
  // Twice the costs change high bits alone, which a multiplication leaves high.
  hash ^= hash >> 15;
  hash = __reduce_add_sync(kAllLanes, hash * (2 * static_cast<unsigned>(lane_id()) + 1));
  if (lane_id() != 0) return;
  p.work.row_hash[row] = hash;
  p.work.u[row] = from_ordered(found.value);
  p.work.column_of[row] = unrotated(found.key, turn, p.m);
  if (!is_finite(from_ordered(found.value)))
    atomicMax(&p.scalars().status, static_cast<int>(kInfeasible));
}

template <class T>
__global__ void nearest_columns(Arguments a) {
  find_nearest(Problem<T>(a));
}

// Grid (batch, rows / warps): twin = the first row with the same costs, the row itself if there is
// none.
template <class T>
__global__ void find_twins(Arguments a) {
  const Problem<T> p(a);
  const int row = row_of_warp();
  if (row >= p.n || p.failed()) return;
  const unsigned hash = p.work.row_hash[row];
  unsigned twin = static_cast<unsigned>(row);
  for (int other = lane_id(); other < row; other += kWarp)
    if (p.work.row_hash[other] == hash) twin = min(twin, static_cast<unsigned>(other));
  twin = __reduce_min_sync(kAllLanes, twin);
  if (twin != static_cast<unsigned>(row)) {  // equal hashes prove nothing
    int differs = 0;
    for_row(p.costs, row, [&](int first, const T(&x)[4]) {
      T y[4];
      p.costs.four(static_cast<int>(twin), first, y);
#pragma unroll
      for (int k = 0; k < 4; ++k) differs |= x[k] != y[k];
    });
    if (__any_sync(kAllLanes, differs)) twin = static_cast<unsigned>(row);
  }
  if (lane_id() != 0) return;
  p.work.twin[row] = static_cast<int>(twin);
  if (twin != static_cast<unsigned>(row)) atomicAdd(&p.scalars().copies, 1);
}

// A row's place in the order of twins, and of rows among the same. By a warp.
template <class T>
__device__ void order_row(const Problem<T>& p) {
  const int row = row_of_warp();
  if (row >= p.n || p.failed()) return;
  const int twin = p.work.twin[row];
  unsigned place = 0;
  for (int other = lane_id(); other < p.n; other += kWarp) {
    const int its = p.work.twin[other];
    place += its < twin || (its == twin && other < row);
  }
  place = __reduce_add_sync(kAllLanes, place);
  if (lane_id() == 0) p.work.order[place] = row;
}

}  // namespace croc::gpu
