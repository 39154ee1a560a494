// For problems in which many rows still compete after the first rounds: an auction with a falling
// epsilon, by rows and by columns in turn (Bertsekas, Castanon, Tsaknakis 1993: an asymmetric
// problem needs both, since a column that ends up without a row must not keep a price). It leaves a
// state that the exact phases finish in few steps.
#pragma once

#include "bidding.cuh"
#include "columns.cuh"

namespace croc::gpu {

constexpr int kBidThreads = 512;
constexpr int kEnoughFree = 8;     // one row less costs bidding more than a path of its own
constexpr int kFirstRounds = 40;   // before the auction is considered
constexpr int kMoreRounds = 40;    // where it is not needed
constexpr int kAuctionShare = 3;   // considered when more than n / 3 rows are free
constexpr int kAuctionMost = 160;  // or more than this many, whatever n is
constexpr int kAuctionLeast = 32;  // and never with fewer
constexpr int kAuctionRounds =
    2000;                       // per phase and direction; who needs more is better served by paths
constexpr int kPatience = 256;  // rounds of columns, and as long as each has more than two bids

// epsilon = the costs' local scale times `first`, and `fall` times the one before.
struct Schedule {
  double first, fall;
  int phases;
};

__device__ inline Schedule schedule_for(int n) {
  return n < kManyRows ? Schedule{1.0, 0.25, 4} : Schedule{2.0, 0.125, 3};
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

// One warp reads every `parts`-th group of rows of a column, from group `part` on.
template <class T>
__device__ Offer find_offer(const Costs<T>& costs, const State& s, int column, int part,
                            int parts) {
  double least = infinity(), second = infinity();
  unsigned key = ~0u;
#pragma unroll 8
  for (int i = part * kWarp + lane_id(); i < costs.n; i += parts * kWarp) {
    add_offer(costs.at(i, column) - s.u[i], i, least, second, key);
  }
  return warp_offer(least, second, key);
}

// The same from the column's levels.
template <class T>
__device__ CROC_NOINLINE Offer find_offer(Costs<T> costs, Levels<T> levels, const double* row_dual,
                                          int column, int part, int parts) {
  const double low = levels.low[column], step = levels.step[column];
  const unsigned char* its_levels = levels.column(column);
  const int start = kRowsPerWord * (part * kWarp + lane_id());
  const int stride = kRowsPerWord * parts * kWarp;
  const auto visit = [&](int from, int to, auto each) {
#pragma unroll 8
    for (int first = from; first < to; first += stride) {
      const unsigned word = *reinterpret_cast<const unsigned*>(its_levels + first);
      double u[kRowsPerWord];
      four(row_dual, first, u);
      each(word, u);
    }
  };
  double nearest = infinity();  // upper end
  visit(start, costs.n, [&](unsigned word, const double(&u)[kRowsPerWord]) {
#pragma unroll
    for (int k = 0; k < kRowsPerWord; ++k) {
      const unsigned level = level_in(word, k);
      const double upper = fma(number_of(level) + 1.0, step, low) - u[k];
      nearest = level != kNoLevel ? lesser(nearest, upper) : nearest;
    }
  });
  // Of two lanes' nearest, the further: at least two rows are that near.
  const unsigned lane = static_cast<unsigned>(lane_id());
  const Least found = warp_least({ordered(nearest), lane});
  const double bound = from_ordered(warp_min(ordered(found.key == lane ? infinity() : nearest)));
  double least = infinity(), second = infinity();
  unsigned key = ~0u;
  for (int chunk = start; chunk < costs.n; chunk += kHeldWords * stride) {
    uint64_t promising = 0;
    int bit = 0;
    visit(chunk, min(costs.n, chunk + kHeldWords * stride),
          [&](unsigned word, const double(&u)[kRowsPerWord]) {
#pragma unroll
            for (int k = 0; k < kRowsPerWord; ++k) {
              const bool is = fma(number_of(level_in(word, k)), step, low) - u[k] <= bound;
              promising |= static_cast<uint64_t>(is) << (bit + k);
            }
            bit += kRowsPerWord;
          });
    while (promising != 0) {
      const int which = __ffsll(static_cast<long long>(promising)) - 1;
      promising &= promising - 1;
      const int row = chunk + which / kRowsPerWord * stride + which % kRowsPerWord;
      if (row < costs.n)
        add_offer(costs.at(row, column) - row_dual[row], row, least, second, key);
    }
  }
  return warp_offer(least, second, key);
}

// Every listed column offers its nearest row a place at a price that its second choice sets, or
// gives up its price. Where columns are few, several warps share one.
template <class T>
__device__ void place_offers(const Costs<T>& costs, const Levels<T>& levels, const State& s, int count,
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
    const int part = warp_id() % parts;
    const Offer offer = levels.level != nullptr
                            ? find_offer(costs, levels, s.u, s.list[k], part, parts)
                            : find_offer(costs, s, s.list[k], part, parts);
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
    if (row < 0)
      s.v[column] = 0.0;
    else if (s.best[row] == ordered(s.bid[k]))
      atomicMin(&s.path[row], column);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    const int row = s.target[k], column = s.list[k];
    if (row < 0 || s.path[row] != column) continue;
    s.row_of[s.column_of[row]] = -1;
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

// Rounds until no unmatched column has a negative dual; returns whether that was reached. Every row
// must be matched. Columns at work are few, so each block of a cluster repeats these rounds and none waits.
template <class T>
__device__ bool bid_columns(const Costs<T>& costs, const Levels<T>& levels, const State& s,
                            double epsilon, int* counters) {
  for (int i = threadIdx.x; i < costs.n; i += blockDim.x)
    s.u[i] = costs.at(i, s.column_of[i]) - s.v[s.column_of[i]];
  __syncthreads();
  int bids = 0;
  for (int round = 0; round < kAuctionRounds && (round < kPatience || bids > 2 * round); ++round) {
    const int count = block_collect(costs.m, s.list, costs.n,
                                    [&](int j) { return s.row_of[j] < 0 && s.v[j] < 0.0; });
    if (count == 0) return true;
    ++counters[kReverseRounds];
    counters[kReverseBids] += count;
    bids += count;
    place_offers(costs, levels, s, count, epsilon);
    accept_offers(costs, s, count);
  }
  return false;
}

// Unmatches the pairs whose reduced cost is more than `epsilon` above the least of their row. Bids
// of columns raise duals, so the lists are made again.
template <class T>
__device__ void drop_loose_pairs(const Costs<T>& costs, const Lists<T>& lists, const State& s,
                                 double epsilon) {
  cluster_wait();  // others may still read their lists
  for (int row = cluster_warp(); row < costs.n; row += cluster_warps()) {
    const int column = s.column_of[row];
    const double least = list_row(costs, lists, s.v, row);
    const bool loose = column >= 0 && (costs.at(row, column) - s.v[column]) - least > epsilon;
    cluster_tell(&s.list[row], static_cast<int>(loose));
  }
  cluster_wait();
  for (int row = threadIdx.x; row < costs.n; row += blockDim.x) {
    if (s.list[row] == 0) continue;
    s.row_of[s.column_of[row]] = -1;
    s.column_of[row] = -1;
  }
  __syncthreads();
}

__device__ inline bool needs_auction(int num_free, int n) {
  return num_free > kAuctionLeast && num_free > min(n / kAuctionShare, kAuctionMost);
}

// All bidding. Returns the number of rows left free, listed in s.list.
template <class T>
__device__ int bid_all(const Arguments& a, const Costs<T>& costs, const Lists<T>& lists,
                       State& s, Scalars& scalars,
                       int* counters) {
  const Schedule schedule = schedule_for(costs.n);
  double epsilon = 0.0;
  int limit = kFirstRounds, enough = kEnoughFree;
  for (int phase = -1;; ++phase) {  // one call of `bid`: more would be as many copies of it
    const int num_free = bid(costs, lists, s, epsilon, limit, enough, counters);
    if (phase >= 0 && !(epsilon > 0.0)) return num_free;
    if (phase < 0) {
      if (needs_auction(num_free, costs.n) && counters[kRounds] == kFirstRounds) {
        make_levels(costs, levels_of<T>(a));
        cluster_wait();
        if (threadIdx.x == 0 && cluster_rank() == 0)
          scalars.with_levels = levels_of<T>(a).level != nullptr;
        epsilon = -on_grid(-schedule.first * scalars.spread, scalars);
      }
    } else {
      const bool done = num_free == 0 && bid_columns(costs, levels_of<T>(a), s, epsilon, counters);
      epsilon = done && phase + 1 < schedule.phases ? -on_grid(-schedule.fall * epsilon, scalars) : 0.0;
      drop_loose_pairs(costs, lists, s, epsilon);
    }
    limit = epsilon > 0.0 ? kAuctionRounds : kMoreRounds;
    enough = epsilon > 0.0 ? 0 : kEnoughFree;
  }
}

// Grid (batch, blocks of a cluster).
template <class T, bool kShared>
__global__ void __launch_bounds__(kBidThreads, 1) bid_rows(Arguments a) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<T> p(a);
  if (p.failed() || p.n == 0) return;
  State s;
  s.carve_for_bidding(kShared ? shared : p.work.state, a.max_n(), a.max_m(), cluster_size());
  load_state(p, s);
  match_nearest(s, p.n, p.m);
  cluster_wait();  // all have begun: from here on their shared memory may be written
  int counters[kCounters] = {};
  const int num_free =
      bid_all(a, p.costs, p.lists(), s, p.scalars(), counters);
  if (cluster_rank() != 0) return;
  settle_rows(p.costs, s, num_free);
  store_state(p, s);
  if (threadIdx.x != 0) return;
  counters[kFreeRows] = num_free;
  for (int c = 0; c < kCounters; ++c) p.scalars().counters[c] = counters[c];
}

}  // namespace croc::gpu
