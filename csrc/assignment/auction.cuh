// For problems in which many rows still compete after the first rounds: an auction with a falling
// epsilon, by rows and by columns in turn (Bertsekas, Castanon, Tsaknakis 1993: an asymmetric
// problem needs both, since a column that ends up without a row must not keep a price). It leaves a
// state that the exact phases finish in few steps.
#pragma once

#include "offers.cuh"

namespace croc::gpu {

constexpr int kAuctionRounds =
    2000;                       // per phase and direction; who needs more is better served by paths
// With many rows: so many rounds into the first phase more than n / 10 free rows are a price war,
// in which each bid raises a price by little more than epsilon. It goes on with a larger one.
constexpr int kWarRounds = 320;
constexpr int kWarShare = 10;
constexpr double kWarRise = 8.0;
constexpr int kWars = 3;
constexpr int kPatience = 256;  // rounds of columns, and as long as each has more than two bids

// epsilon = the costs' local scale times `first`, and `fall` times the one before. The last few
// free rows and priced columns of a phase go round for hundreds of rounds; the next phase, or a
// search each, takes less.
struct Schedule {
  struct Left {
    int free, priced;
  };
  double first, fall;
  int phases;
  Left each, last;  // what a phase leaves
};

__device__ inline Schedule schedule_for(bool many_rows, bool annealed, int n) {
  if (!many_rows) return {1.0, 0.25, 4, {}, {}};
  const Schedule::Left each{min(24, n / 40), 2}, last{min(24, n / 40), 8};
  return annealed ? Schedule{0.5, 0.125, 2, each, last} : Schedule{2.0, 0.125, 3, each, last};
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
    const Offer offer = find_offer(p, levels, s, column, part, parts);
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
__device__ void accept_offers(const Problem<T>& p, const Levels<T>& levels, const State& s,
                              int count) {
  const Costs<T>& costs = p.costs;
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    const int row = s.target[k], column = s.list[k];
    if (p.slots > 0 && s.slot[column] >= 0) fill_slot(s, column);
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
    if (levels.level != nullptr) low_duals(s)[row] = rounded_down(float(), s.bid[k]);
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

// The same for no more columns than a warp has lanes, by one warp. Lists the columns that have a
// price and no row then, in any order; returns how many.
template <class T>
__device__ int accept_few(const Costs<T>& costs, const Levels<T>& levels, const State& s,
                          int count) {
  __shared__ int left;
  if (warp_id() == 0) {
    const int k = lane_id(), column = k < count ? s.list[k] : -1;
    const int row = k < count ? s.target[k] : -1;
    const double bid = row < 0 ? 0.0 : s.bid[k], cost = row < 0 ? 0.0 : costs.at(row, column);
    if (column >= 0 && row < 0) s.v[column] = 0.0;
    if (row >= 0 && s.best[row] == ordered(bid)) atomicMin(&s.path[row], column);
    __syncwarp();
    const bool won = row >= 0 && s.path[row] == column;
    int priced = row < 0 ? -1 : won ? s.column_of[row] : column;
    __syncwarp();
    if (won) {
      if (priced >= 0) s.row_of[priced] = -1;
      s.row_of[column] = row;
      s.column_of[row] = column;
      s.u[row] = bid;
      if (levels.level != nullptr) low_duals(s)[row] = rounded_down(float(), bid);
      s.v[column] = fmin(0.0, cost - bid);
      s.best[row] = ~uint64_t{0};
      s.path[row] = kNobody;
    }
    if (priced >= 0 && !(s.v[priced] < 0.0)) priced = -1;
    const unsigned votes = __ballot_sync(kAllLanes, priced >= 0);
    if (priced >= 0) s.list[__popc(votes & ((1u << k) - 1u))] = priced;
    if (k == 0) left = __popc(votes);
  }
  __syncthreads();
  return left;
}

// Before such rounds, where columns have levels.
template <class T>
__device__ void lower_duals(const Problem<T>& p, const Levels<T>& levels, const State& s) {
  if (levels.level == nullptr) return;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    low_duals(s)[i] = rounded_down(float(), s.u[i]);
  __syncthreads();
}

// One round of the listed columns; returns how many are listed for the next one, -1: none are yet.
template <class T>
__device__ int bid_columns_once(const Problem<T>& p, const Levels<T>& levels, const State& s,
                                int priced, double epsilon) {
  if (p.slots > 0) {
    for (int k = threadIdx.x; k < priced; k += blockDim.x) take_slot(s, s.list[k], p.slots);
    __syncthreads();
  }
  place_offers(p, levels, s, priced, epsilon);
  if (p.slots == 0 && priced <= kWarp) return accept_few(p.costs, levels, s, priced);
  accept_offers(p, levels, s, priced);
  return -1;
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
  lower_duals(p, levels, s);
  int bids = 0, priced = -1;
  for (int round = 0; round < kAuctionRounds && (round < kPatience || bids > 2 * round); ++round) {
    if (priced < 0) priced = collect_priced(p.costs, s);
    if (priced <= enough) return true;
    if (team.rank == 0) {
      count(p.scalars(), kReverseRounds, 1);
      count(p.scalars(), kReverseBids, priced);
    }
    bids += priced;
    priced = bid_columns_once(p, levels, s, priced, epsilon);
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

// Its three phases are `its` functions: bid by rows, as of bidding.cuh, bid_columns and
// drop_loose_pairs.
template <class T, class Phases>
__device__ void auction(const Problem<T>& p, Phases its) {
  const Schedule schedule = schedule_for(p.many, p.annealed(), p.n);
  double epsilon = -on_grid(-schedule.first * p.scalars().spread, p.scalars());
  int phases = schedule.phases;
  int wars = p.many ? kWars : 0;  // that may still be declared
  while (phases > 0 && epsilon > 0.0) {
    const bool last = phases == 1;
    const Schedule::Left leaves = last ? schedule.last : schedule.each;
    int left = wars > 0 ? kWarRounds : kAuctionRounds;
    const int free = its.bid(epsilon, left, leaves.free, p.n);
    if (wars > 0 && left == 0) {
      const bool war = free > p.n / kWarShare;
      if (war) epsilon *= kWarRise, ++phases;
      wars = war ? wars - 1 : 0;
      continue;
    }
    wars = 0;
    const bool done = free <= nearly(leaves.free) && its.bid_columns(epsilon, leaves.priced);
    epsilon = done && !last ? -on_grid(-schedule.fall * epsilon, p.scalars()) : 0.0;
    --phases;
    its.drop_loose_pairs(epsilon);
  }
}

}  // namespace croc::gpu
