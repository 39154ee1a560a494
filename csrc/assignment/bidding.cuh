// Synchronous bidding: every free row bids for its nearest column at once, the best bid per column
// wins, the row it drives out is free again. Keeps u_i + v_j <= c_ij (+ epsilon on matched pairs)
// and only ever lowers v.
#pragma once

#include "alike.cuh"
#include "nearest.cuh"

namespace croc::gpu {

constexpr int kWindow = 6;       // rounds after which bidding looks back
constexpr int kLastRounds = 60;  // with an epsilon, when nearly few enough rows are free

__device__ inline int nearly(int enough) { return enough + enough / 3; }

// One warp scans one row.
template <class T>
__device__ Bid find_bid(const Costs<T>& costs, const State& s, int row) {
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

// What a bid is for (-1: none) and its price. Without an epsilon a bid that would not lower the
// dual of a taken column is not made: it could go round for ever.
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

// The bid of a free row, the k-th listed. By one warp; returns whether it was made.
template <class T>
__device__ bool bid_row(const Costs<T>& costs, const Lists<T>& lists, const State& s, Team team,
                        int k, double epsilon) {
  const int row = s.list[k];
  const Bid bid =
      lists.bound != nullptr ? bid_from_list(costs, lists, s, row) : find_bid(costs, s, row);
  const Placed placed = place_bid(s, bid, epsilon);
  if (is_finite(bid.least)) team.tell(&s.u[row], bid.least);
  team.tell(&s.target[k], placed.target);
  team.tell(&s.bid[k], placed.price);
  if (team.size == 1 && placed.target >= 0 && lane_id() == 0)
    outbid(s, placed.target, placed.price);
  return placed.target >= 0;
}

// The bids of the k-th listed kind.
template <class T>
__device__ bool bid_rows_alike(const Costs<T>& costs, const Lists<T>& lists, const State& s,
                               Team team, int k, Listed listed, double epsilon) {
  const int* kinds = s.path;
  const int first = kinds[k], end = k + 1 < listed.kinds ? kinds[k + 1] : listed.rows;
  if (end - first > kFewCopies) return kind_bids(costs, s, team, first, end, epsilon);
  bool made = false;
  for (int row = first; row < end; ++row) {
    if (s.column_of[s.list[row]] < 0)
      made |= bid_row(costs, lists, s, team, row, epsilon);
    else
      team.tell(&s.target[row], -1);
  }
  return made;
}

// Bids for all free rows, by a warp each; returns whether any was made. Then s.best has the best
// bid for every column. A warp that is done takes the block's next row: some have to read parts of
// their row again. `next` is zero before and after.
template <bool kAlike, class T>
__device__ bool place_bids(const Costs<T>& costs, const Lists<T>& lists, const State& s, Team team,
                           Listed listed, double epsilon, int& next) {
  bool made = false;
  const int pieces = kAlike ? listed.kinds : listed.rows;
  const int its_rows = (pieces - team.rank + team.size - 1) / team.size;  // every size-th
  int turn = warp_id();
  while (turn < its_rows) {
    const int k = team.rank + turn * team.size;
    if constexpr (kAlike)
      made |= bid_rows_alike(costs, lists, s, team, k, listed, epsilon);
    else
      made |= bid_row(costs, lists, s, team, k, epsilon);
    int taken = 0;
    if (lane_id() == 0 && its_rows > warp_count()) taken = atomicAdd(&next, 1);
    turn = warp_count() + __shfl_sync(kAllLanes, taken, 0);
    if (its_rows <= warp_count()) break;
  }
  if (team.size > 1) {
    team.wait();
    for (int k = threadIdx.x; k < listed.rows; k += blockDim.x) {
      if (s.target[k] < 0) continue;
      outbid(s, s.target[k], s.bid[k]);
      made = true;
    }
  }
  const bool any = __syncthreads_or(made) != 0;
  if (threadIdx.x == 0) next = 0;
  return any;
}

// The best bid of each column takes it; among equal bids the lowest row. A barrier must follow
// before the next use of `path`.
__device__ inline void award(const State& s, int num_free) {
  for (int k = threadIdx.x; k < num_free; k += blockDim.x) {
    const int row = s.list[k], column = s.target[k];
    if (column >= 0 && s.best[column] == ordered(s.bid[k])) atomicMin(&s.path[column], row);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < num_free; k += blockDim.x) {
    const int row = s.list[k], column = s.target[k];
    if (column < 0 || s.path[column] != row) continue;
    const int before = s.row_of[column];
    if (before >= 0) s.column_of[before] = -1;
    s.row_of[column] = row;
    s.column_of[row] = column;
    s.u[row] += s.v[column] - s.bid[k];
    s.v[column] = s.bid[k];
  }
  __syncthreads();
  for (int k = threadIdx.x; k < num_free; k += blockDim.x) {
    const int column = s.target[k];
    if (column < 0 || s.column_of[s.list[k]] != column) continue;  // the winner clears up
    s.best[column] = ~uint64_t{0};
    s.path[column] = kNobody;
  }
}

// Rounds until at most `enough` rows are free, no bid can be made, or none of the rounds `left` is.
// With more than `patient` rows free it also ends when kWindow rounds free less than a tenth of
// them, and with an epsilon after kLastRounds rounds with nearly few enough. Returns the free rows,
// listed in s.list; their u is at most their least reduced cost.
template <bool kAlike, class T>
__device__ int bid(const Problem<T>& p, State& s, Team team, double epsilon, int& left, int enough,
                   int patient) {
  __shared__ int next;
  if (threadIdx.x == 0) next = 0;
  const Lists<T> lists = p.lists();
  const auto free = [&](int row) { return s.column_of[row] < 0; };
  const auto list = [&]() -> Listed {
    if constexpr (kAlike) return list_kinds(s, p.work.order, p.n);
    const int count = block_collect(p.n, s.list, p.n, free);
    return {count, count, count};
  };
  Listed listed = list();
  int num_free = listed.free, before = num_free, last_rounds = 0;
  for (int round = 0; left > 0 && num_free > enough; ++round, --left) {
    if (round == kWindow) {
      if (num_free > patient && 10 * num_free > 9 * before) break;
      round = 0, before = num_free;
    }
    if (epsilon > 0.0 && num_free <= nearly(enough) && ++last_rounds > kLastRounds) break;
    if (team.rank == 0) count(p.scalars(), kRounds, 1), count(p.scalars(), kBids, num_free);
    const bool made = place_bids<kAlike>(p.costs, lists, s, team, listed, epsilon, next);
    if constexpr (kAlike) forget_kinds(s, p.n);
    if (made) award(s, listed.rows);
    s.turn_page();
    if (!made) break;
    listed = list();
    num_free = listed.free;
  }
  if constexpr (kAlike) {
    forget_kinds(s, p.n);
    num_free = block_collect(p.n, s.list, p.n, free);
  }
  return num_free;
}

// Between rounds, and before the first one after a search.
__device__ inline void clear_bids(const State& s, int m) {
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    s.path[j] = kNobody;
    s.best[j] = ~uint64_t{0};
  }
  __syncthreads();
}

// Matches every row that is alone with its nearest column, or first in line for it.
__device__ inline void match_nearest(const State& s, int n, int m) {
  for (int j = threadIdx.x; j < m; j += blockDim.x) s.row_of[j] = -1;
  clear_bids(s, m);
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
  clear_bids(s, m);
}

// u = c - v on the matched pairs, which are tight up to rounding.
template <class T>
__device__ void settle_rows(const Costs<T>& costs, const State& s) {
  for (int i = threadIdx.x; i < costs.n; i += blockDim.x) {
    const int column = s.column_of[i];
    if (column >= 0) s.u[i] = costs.at(i, column) - s.v[column];
  }
  __syncthreads();
}

}  // namespace croc::gpu
