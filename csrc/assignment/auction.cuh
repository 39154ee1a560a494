// For problems in which many rows still compete after the first rounds: an auction with a falling
// epsilon, by rows and by columns in turn (Bertsekas, Castanon, Tsaknakis 1993: an asymmetric
// problem needs both, since a column that ends up without a row must not keep a price). It leaves a
// state that the exact phases finish in few steps.
#pragma once

#include "columns.cuh"

namespace croc::gpu {

constexpr int kAuctionPhases = 4;  // epsilon = the costs' local scale times 1, 1/4, 1/16, 1/64
constexpr int kAuctionRounds =
    2000;                       // per phase and direction; who needs more is better served by paths
constexpr int kPatience = 256;  // rounds of columns, and as long as each has more than two bids

struct Offer {
  double least, second;  // the two smallest reduced costs of the column
  int row;
};

// The least and second least of both, given what the rows of this warp's lanes offer.
__device__ inline Offer warp_offer(double least, double second, unsigned key) {
  const Least found = warp_least({ordered(least), key});
  const bool winner = found.key == key && found.value == ordered(least);
  const uint64_t runner_up = warp_min(ordered(winner ? second : least));
  return {from_ordered(found.value), from_ordered(runner_up), static_cast<int>(found.key)};
}

// One warp reads every `parts`-th group of rows of a column, from group `part` on. All loads of a
// batch come before its stores, which they could not overtake.
template <class T>
__device__ Offer find_offer(const Costs<T>& costs, const State& s, T* copies, int column, int part,
                            int parts) {
  constexpr int kBatch = 8;
  const Column<T> entries(costs, s, copies, column);
  double least = infinity(), second = infinity();
  unsigned key = ~0u;
  for (int first = part * kWarp + lane_id(); first < costs.n; first += kBatch * parts * kWarp) {
    T x[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * parts * kWarp;
      x[b] = i < costs.n ? entries.from[i * entries.stride] : static_cast<T>(0);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * parts * kWarp;
      if (i >= costs.n) break;
      if (entries.to != nullptr) entries.to[i] = x[b];
      const double reduced = static_cast<double>(costs.sign * x[b]) - s.u[i];
      if (reduced < least) {
        second = least;
        least = reduced;
        key = static_cast<unsigned>(i);
      } else {
        second = fmin(second, reduced);
      }
    }
  }
  return warp_offer(least, second, key);
}

// Every listed column offers its nearest row a place at a price that its second choice sets, or
// gives up its price. Where columns are few, several warps share one.
template <class T>
__device__ void place_offers(const Costs<T>& costs, const State& s, T* copies, int count,
                             double epsilon) {
  __shared__ Offer offers[kWarp];
  int parts = 1;
  while (2 * parts * count <= warp_count()) parts *= 2;
  const auto place = [&](int k, Offer offer) {
    if (!(-offer.least > epsilon)) {
      s.target[k] = -1;
      return;
    }
    const double price = fmin(-offer.least, fmax(0.0, -offer.second - epsilon));
    s.target[k] = offer.row;
    s.bid[k] = costs.at(offer.row, s.list[k]) + price;  // what the row would pay
    atomicMin(reinterpret_cast<unsigned long long*>(&s.best[offer.row]),
              static_cast<unsigned long long>(ordered(s.bid[k])));
  };
  for (int k = warp_id() / parts; k < count; k += warp_count() / parts) {
    const Offer offer = find_offer(costs, s, copies, s.list[k], warp_id() % parts, parts);
    if (lane_id() != 0) continue;
    if (parts > 1)
      offers[warp_id()] = offer;
    else
      place(k, offer);
  }
  __syncthreads();
  if (parts == 1) return;
  if (warp_id() < count) {
    const int k = warp_id();
    const Offer mine =
        lane_id() < parts ? offers[k * parts + lane_id()] : Offer{infinity(), infinity(), -1};
    const Offer offer = warp_offer(mine.least, mine.second, static_cast<unsigned>(mine.row));
    if (lane_id() == 0) place(k, offer);
  }
  __syncthreads();
}

// The row takes the best offer; among equal ones that of the lowest column.
template <class T>
__device__ void accept_offers(const Costs<T>& costs, const State& s, int count) {
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    const int row = s.target[k], column = s.list[k];
    if (s.slot[column] >= 0) fill_slot(s, column);
    if (row < 0)
      s.v[column] = 0.0;
    else if (s.best[row] == ordered(s.bid[k]))
      atomicMin(&s.path[row], column);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    const int row = s.target[k], column = s.list[k];
    if (row < 0 || s.path[row] != column) continue;
    if (s.column_of[row] >= 0) s.row_of[s.column_of[row]] = -1;
    s.row_of[column] = row;
    s.column_of[row] = column;
    s.u[row] = s.bid[k];
    s.v[column] = fmin(0.0, costs.at(row, column) - s.bid[k]);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    const int row = s.target[k];
    if (row < 0 || s.column_of[row] != s.list[k]) continue;
    s.best[row] = ~uint64_t{0};
    s.path[row] = kNobody;
  }
  __syncthreads();
}

// One round of the listed columns.
template <class T>
__device__ void bid_columns_once(const Problem<T>& p, const State& s, int priced, double epsilon) {
  for (int k = threadIdx.x; k < priced; k += blockDim.x) take_slot(s, s.list[k], p.slots);
  __syncthreads();
  place_offers(p.costs, s, p.copies(), priced, epsilon);
  accept_offers(p.costs, s, priced);
}

// Lists the unmatched columns with a negative dual, as far as there is room; returns how many.
template <class T>
__device__ int collect_priced(const Costs<T>& costs, const State& s) {
  return block_collect(costs.m, s.list, costs.n,
                       [&](int j) { return s.row_of[j] < 0 && s.v[j] < 0.0; });
}

// Rounds until no unmatched column has a negative dual; returns whether that was reached. Every row
// must be matched.
template <class T>
__device__ bool bid_columns(const Problem<T>& p, const State& s, double epsilon) {
  int bids = 0;
  for (int round = 0; round < kAuctionRounds && (round < kPatience || bids > 2 * round); ++round) {
    const int priced = collect_priced(p.costs, s);
    if (priced == 0) return true;
    count(p.scalars(), kReverseRounds, 1);
    count(p.scalars(), kReverseBids, priced);
    bids += priced;
    bid_columns_once(p, s, priced, epsilon);
  }
  return false;
}

// Unmatches the pairs whose reduced cost is more than `epsilon` above the least of their row. Bids
// of columns raise duals, so the lists are made again.
template <class T>
__device__ void drop_loose_pairs(const Costs<T>& costs, const Lists<T>& lists, const State& s,
                                 double epsilon) {
  for (int row = warp_id(); row < costs.n; row += warp_count()) {
    const int column = s.column_of[row];
    const double least = list_row(costs, lists, s.v, row);
    if (lane_id() != 0) continue;
    const double its = column < 0 ? infinity() : costs.at(row, column) - s.v[column];
    s.target[row] = its - least > epsilon;
    s.u[row] = its - least > epsilon ? least : its;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < costs.n; row += blockDim.x) {
    const int column = s.column_of[row];
    if (column < 0 || !s.target[row]) continue;
    s.row_of[column] = -1;
    s.column_of[row] = -1;
  }
  __syncthreads();
}

template <class T>
__device__ void auction(const Problem<T>& p, const State& s) {
  double epsilon = -on_grid(-p.scalars().spread, p.scalars());
  for (int phase = 0; phase < kAuctionPhases && epsilon > 0.0; ++phase) {
    int left = kAuctionRounds;
    const bool done = bid(p, s, epsilon, left, 0, p.n) == 0 && bid_columns(p, s, epsilon);
    epsilon = done && phase + 1 < kAuctionPhases ? -on_grid(-0.25 * epsilon, p.scalars()) : 0.0;
    drop_loose_pairs(p.costs, p.lists(), s, epsilon);
  }
}

}  // namespace croc::gpu
