// Synchronous bidding: every free row bids for its nearest column at once, the best bid per column
// wins, the row it drives out is free again. Keeps u_i + v_j <= c_ij (+ epsilon on matched pairs)
// and only ever lowers v.
#pragma once

#include "cluster.cuh"
#include "nearest.cuh"

namespace croc::gpu {

constexpr int kNobody = 0x7fffffff;

// One warp scans one row.
template <class T>
__device__ CROC_NOINLINE Bid find_bid(Costs<T> costs, State s, int row) {
  const int turn = rotation(row, costs.m);
  const auto key_of = [&](int column) { return bid_key(s, column, turn, costs.m); };
  double least = infinity(), second = infinity();
  int column = -1;
  for_row(costs, row, [&](int first, const T(&x)[4]) {
    double v[4];
    four(s.v, first, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const double reduced = static_cast<double>(x[k]) - v[k];
      bool nearer = reduced < least;
      if (reduced == least && column >= 0 && is_finite(reduced))
        nearer = key_of(first + k) < key_of(column);
      second = nearer ? least : lesser(second, reduced);
      least = nearer ? reduced : least;
      column = nearer ? first + k : column;
    }
  });
  const unsigned key = column >= 0 ? key_of(column) : ~0u;
  const Least found = warp_least({ordered(least), key});
  const uint64_t runner_up = warp_min(ordered(found.key == key ? second : least));
  if (found.key == ~0u) return {infinity(), infinity(), -1};
  return {from_ordered(found.value), from_ordered(runner_up),
          unrotated(found.key & ~kMatched, turn, costs.m)};
}

// What a bid is for (-1: none) and its price. Without an epsilon a bid that would not lower the dual of a
// taken column is not made: it could go round for ever.
struct Placed {
  int target;
  double price;
};

__device__ inline Placed place_bid(const State& s, Bid bid, double epsilon) {
  const bool taken = bid.column >= 0 && s.row_of[bid.column] >= 0;
  // The only column a row may have: any price is right, so none is made up.
  const double step = is_finite(bid.second) ? bid.second - bid.least + epsilon : 0.0;
  if (!is_finite(bid.least) || (taken && !(step > 0.0))) return {-1, 0.0};
  return {bid.column, s.v[bid.column] - fmax(step, 0.0)};
}

// Bids for all free rows, by a warp each.
template <class T>
__device__ void place_bids(const Costs<T>& costs, const Lists<T>& lists, const State& s,
                           int num_free, double epsilon) {
  for (int k = cluster_warp(); k < num_free; k += cluster_warps()) {
    const int row = s.list[k];
    const Bid bid =
        lists.bound != nullptr ? bid_from_list(costs, lists, s, row) : find_bid(costs, s, row);
    const Placed placed = place_bid(s, bid, epsilon);
    cluster_tell(&s.target[k], placed.target);
    cluster_tell(&s.bid[k], placed.price);
  }
  cluster_wait();
}

// The best bid of each column takes it; among equal bids the lowest row. Returns whether any was
// made. The caller's next barrier comes before the next use of `path`.
__device__ inline bool award(const State& s, int num_free) {
  bool made = false;
  for (int k = threadIdx.x; k < num_free; k += blockDim.x) {
    if (s.target[k] < 0) continue;
    made = true;
    atomicMin(reinterpret_cast<unsigned long long*>(&s.best[s.target[k]]),
              static_cast<unsigned long long>(ordered(s.bid[k])));
  }
  if (__syncthreads_or(made) == 0) return false;
  for (int k = threadIdx.x; k < num_free; k += blockDim.x) {
    const int column = s.target[k];
    if (column >= 0 && s.best[column] == ordered(s.bid[k]))
      atomicMin(&s.path[column], s.list[k]);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < num_free; k += blockDim.x) {
    const int row = s.list[k], column = s.target[k];
    if (column < 0 || s.path[column] != row) continue;
    const int before = s.row_of[column];
    if (before >= 0) s.column_of[before] = -1;
    s.row_of[column] = row;
    s.column_of[row] = column;
    s.v[column] = s.bid[k];
    s.best[column] = ~uint64_t{0};
  }
  __syncthreads();
  for (int k = threadIdx.x; k < num_free; k += blockDim.x) {
    const int column = s.target[k];
    if (column >= 0 && s.column_of[s.list[k]] == column) s.path[column] = kNobody;
  }
  return true;
}

// Rounds until at most `enough` rows are free, no bid can be made, or the limit is reached. Returns
// the free rows, listed in s.list.
template <class T>
__device__ int bid(const Costs<T>& costs, const Lists<T>& lists, State& s,
                   double epsilon, int limit, int enough, int* counters) {
  const auto free = [&](int row) { return s.column_of[row] < 0; };
  int num_free = block_collect(costs.n, s.list, costs.n, free);
  for (int round = 0; round < limit && num_free > enough; ++round) {
    ++counters[kRounds];
    counters[kBids] += num_free;
    place_bids(costs, lists, s, num_free, epsilon);
    const bool made = award(s, num_free);
    s.turn_page();
    if (!made) break;
    num_free = block_collect(costs.n, s.list, costs.n, free);
  }
  return num_free;
}

// Matches every row that is alone with its nearest column, or first in line for it.
__device__ inline void match_nearest(const State& s, int n, int m) {
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    s.row_of[j] = -1;
    s.path[j] = kNobody;
    s.best[j] = ~uint64_t{0};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicMin(&s.path[s.column_of[i]], i);
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int column = s.column_of[i];
    if (s.path[column] == i)
      s.row_of[column] = i;
    else
      s.column_of[i] = -1;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < m; j += blockDim.x) s.path[j] = kNobody;
  __syncthreads();
}

// u = min(c - v) for free rows and c - v on the matched pairs, which are tight up to rounding.
template <class T>
__device__ void settle_rows(const Costs<T>& costs, const State& s, int num_free) {
  for (int k = warp_id(); k < num_free; k += warp_count()) {
    const int row = s.list[k];
    const Bid bid = find_bid(costs, s, row);
    if (lane_id() == 0) s.u[row] = bid.least;
  }
  for (int i = threadIdx.x; i < costs.n; i += blockDim.x) {
    const int column = s.column_of[i];
    if (column >= 0) s.u[i] = costs.at(i, column) - s.v[column];
  }
  __syncthreads();
}

}  // namespace croc::gpu
