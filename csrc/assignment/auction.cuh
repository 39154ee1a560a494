// For problems in which many rows still compete after the first rounds: an auction with a falling
// epsilon, by rows and by columns in turn (Bertsekas, Castanon, Tsaknakis 1993: an asymmetric
// problem needs both, since a column that ends up without a row must not keep a price). It leaves a
// state that the exact phases finish in few steps.
#pragma once

#include "columns.cuh"
#include "levels.cuh"

namespace croc::gpu {

constexpr int kAuctionRounds =
    2000;                       // per phase and direction; who needs more is better served by paths
constexpr int kPatience = 256;  // rounds of columns, and as long as each has more than two bids

// epsilon = the costs' local scale times `first`, and `fall` times the one before. The last few
// free rows and priced columns of a phase go round for hundreds of rounds; the next phase, or a
// search each, takes less.
struct Schedule {
  double first, fall;
  int phases, free, priced, last_priced;
};

__device__ inline Schedule schedule_for(bool many_rows, int n) {
  return many_rows ? Schedule{2.0, 0.125, 3, min(24, n / 40), 2, 4}
                   : Schedule{1.0, 0.25, 4, 0, 0, 0};
}

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

__device__ inline void add_offer(double reduced, int row, double& least, double& second,
                                 unsigned& key) {
  const bool nearer = reduced < least;
  second = nearer ? least : lesser(second, reduced);
  key = nearer ? static_cast<unsigned>(row) : key;
  least = nearer ? reduced : least;
}

constexpr int kLoads = 8;  // of a column that a lane has under way

// One warp reads every `parts`-th group of rows of a column, from group `part` on. All loads of a
// batch come before its stores, which they could not overtake.
template <class T>
__device__ Offer find_offer(const Costs<T>& costs, const State& s, T* copies, int column, int part,
                            int parts) {
  const Column<T> entries(costs, s, copies, column);
  double least = infinity(), second = infinity();
  unsigned key = ~0u;
  for (int first = part * kWarp + lane_id(); first < costs.n; first += kLoads * parts * kWarp) {
    T x[kLoads];
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      const int i = first + b * parts * kWarp;
      x[b] = i < costs.n ? entries.from[i * entries.stride] : static_cast<T>(0);
    }
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      const int i = first + b * parts * kWarp;
      if (i >= costs.n) break;
      if (entries.to != nullptr) entries.to[i] = x[b];
      const double reduced = static_cast<double>(costs.sign * x[b]) - s.u[i];
      add_offer(reduced, i, least, second, key);
    }
  }
  return warp_offer(least, second, key);
}

// Four levels at a time, kLoads times, `stride` rows apart: each(place of a level among all, level,
// dual of its row). All loads come before their use.
template <class Each>
__device__ void for_levels(const unsigned char* levels, const double* row_dual, int from,
                           int stride, int n, Each each) {
  unsigned words[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = from + j * stride;
    words[j] = i < n ? *reinterpret_cast<const unsigned*>(levels + i) : ~0u;  // kNoLevel
  }
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = from + j * stride;
    double u[kRowsPerWord];
    four(row_dual, i < n ? i : 0, u);
#pragma unroll
    for (int k = 0; k < kRowsPerWord; ++k) each(kRowsPerWord * j + k, level_in(words[j], k), u[k]);
  }
}

// The same from the column's levels.
template <class T>
__device__ CROC_NOINLINE Offer find_offer(Costs<T> costs, Levels<T> levels, const double* row_dual,
                                          int column, int part, int parts) {
  const double low = levels.low[column], step = levels.step[column];
  const unsigned char* its_levels = levels.column(column);
  const int start = kRowsPerWord * (part * kWarp + lane_id());
  const int stride = kRowsPerWord * parts * kWarp;
  double nearest = infinity();  // upper end
  for (int from = start; from < costs.n; from += kLoads * stride)
    for_levels(its_levels, row_dual, from, stride, costs.n, [&](int, unsigned level, double u) {
      const double upper = fma(number_of(level) + 1.0, step, low) - u;
      nearest = level != kNoLevel ? lesser(nearest, upper) : nearest;
    });
  // Of two lanes' nearest, the further: at least two rows are that near.
  const unsigned lane = static_cast<unsigned>(lane_id());
  const Least found = warp_least({ordered(nearest), lane});
  const double bound = from_ordered(warp_min(ordered(found.key == lane ? infinity() : nearest)));
  double least = infinity(), second = infinity();
  unsigned key = ~0u;
  for (int chunk = start; chunk < costs.n; chunk += 2 * kLoads * stride) {
    uint64_t promising = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      unsigned bits = 0;
      for_levels(its_levels, row_dual, chunk + half * kLoads * stride, stride, costs.n,
                 [&](int place, unsigned level, double u) {
                   const bool is = fma(number_of(level), step, low) - u <= bound;
                   bits |= static_cast<unsigned>(is) << place;
                 });
      promising |= static_cast<uint64_t>(bits) << (32 * half);
    }
    while (promising != 0) {
      const int place = __ffsll(static_cast<long long>(promising)) - 1;
      promising &= promising - 1;
      const int row = chunk + place / kRowsPerWord * stride + place % kRowsPerWord;
      if (row < costs.n) add_offer(costs.at(row, column) - row_dual[row], row, least, second, key);
    }
  }
  return warp_offer(least, second, key);
}

// Every listed column offers its nearest row a place at a price that its second choice sets, or
// gives up its price. Where columns are few, several warps share one.
template <class T>
__device__ void place_offers(const Problem<T>& p, const Levels<T>& levels, const State& s,
                             int count, double epsilon) {
  __shared__ Offer offers[kWarp];
  const Costs<T>& costs = p.costs;
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
    const int column = s.list[k], part = warp_id() % parts;
    const Offer offer = levels.level != nullptr
                            ? find_offer(costs, levels, s.u, column, part, parts)
                            : find_offer(costs, s, p.copies(), column, part, parts);
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
__device__ void bid_columns_once(const Problem<T>& p, const Levels<T>& levels, const State& s,
                                 int priced, double epsilon) {
  for (int k = threadIdx.x; k < priced; k += blockDim.x) take_slot(s, s.list[k], p.slots);
  __syncthreads();
  place_offers(p, levels, s, priced, epsilon);
  accept_offers(p.costs, s, priced);
}

// Lists the unmatched columns with a negative dual, as far as there is room; returns how many.
template <class T>
__device__ int collect_priced(const Costs<T>& costs, const State& s) {
  return block_collect(costs.m, s.list, costs.n,
                       [&](int j) { return s.row_of[j] < 0 && s.v[j] < 0.0; });
}

// Rounds until at most `enough` unmatched columns have a negative dual; returns whether that was
// reached. Columns at work are few: each block of a team repeats these rounds, and none
// waits for another.
template <class T>
__device__ bool bid_columns(const Problem<T>& p, const Levels<T>& levels, const State& s, Team team,
                            double epsilon, int enough) {
  int bids = 0;
  for (int round = 0; round < kAuctionRounds && (round < kPatience || bids > 2 * round); ++round) {
    const int priced = collect_priced(p.costs, s);
    if (priced <= enough) return true;
    if (team.rank == 0) {
      count(p.scalars(), kReverseRounds, 1);
      count(p.scalars(), kReverseBids, priced);
    }
    bids += priced;
    bid_columns_once(p, levels, s, priced, epsilon);
  }
  return false;
}

// Unmatches the pairs whose reduced cost is more than `epsilon` above the least of their row. Bids
// of columns raise duals, so the lists are made again.
template <class T>
__device__ void drop_loose_pairs(const Costs<T>& costs, const Lists<T>& lists, const State& s,
                                 Team team, double epsilon) {
  team.wait();  // others may still be at work on their lists and duals
  for (int row = team.warp(); row < costs.n; row += team.warps()) {
    const int column = s.column_of[row];
    const double least = list_row(costs, lists, s.v, row);
    const double its = column < 0 ? infinity() : costs.at(row, column) - s.v[column];
    const bool loose = its - least > epsilon;
    team.tell(&s.list[row], static_cast<int>(loose));
    team.tell(&s.u[row], loose ? least : its);
  }
  team.wait();
  for (int row = threadIdx.x; row < costs.n; row += blockDim.x) {
    const int column = s.column_of[row];
    if (column < 0 || s.list[row] == 0) continue;
    s.row_of[column] = -1;
    s.column_of[row] = -1;
  }
  __syncthreads();
}

template <class T>
__device__ void auction(const Problem<T>& p, const Levels<T>& levels, State& s, Team team) {
  const Schedule schedule = schedule_for(p.many, p.n);
  double epsilon = -on_grid(-schedule.first * p.scalars().spread, p.scalars());
  for (int phase = 0; phase < schedule.phases && epsilon > 0.0; ++phase) {
    const bool last = phase + 1 == schedule.phases;
    int left = kAuctionRounds;
    const bool done =
        bid(p, s, team, epsilon, left, schedule.free, p.n) <= schedule.free &&
        bid_columns(p, levels, s, team, epsilon, last ? schedule.last_priced : schedule.priced);
    epsilon = done && !last ? -on_grid(-schedule.fall * epsilon, p.scalars()) : 0.0;
    drop_loose_pairs(p.costs, p.lists(), s, team, epsilon);
  }
}

}  // namespace croc::gpu
