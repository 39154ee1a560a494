// The kernel that matches a problem, given the start: with many rows bids and an auction by all
// blocks of a cluster; then, by the first of them, bids, and forests where they stall; the auction
// where that is not enough; bids by columns that have a price but no row; shortest paths for the
// rows that are still free; then the reverse pass. After the paths every row is matched, but a
// column that nobody took may still have a negative dual: it was priced for a demand that did not
// come. Each such column is raised to zero, or takes a row.
#pragma once

#include "forest.cuh"

namespace croc::gpu {

constexpr int kEnoughFree = 8;       // one row less costs bidding more than a path of its own
constexpr int kBidRounds = 80;       // at most, before the first forest
constexpr int kAfterForest = 40;     // and after one
constexpr int kForestLeast = 16;     // rows: fewer are cheaper on paths of their own
constexpr int kForestGain = 16;      // a forest helps if a 16th of the free rows find a place
constexpr int kForestMisses = 2;     // in a row that end them
constexpr int kAuctionShare = 3;     // the auction is for more than n / 3 free rows
constexpr int kAuctionLeast = 32;    // and more than this many
constexpr int kRaiseLimit = 8;       // rounds by columns before the paths
constexpr int kTogetherRounds = 40;  // with many rows, before
constexpr int kTogetherFree = 160;   // more free rows than this are auctioned

// A block's problem and its state, for each phase anew: a phase is a function that is not inlined,
// and so has the registers to itself. All that bids is in one for all sizes, since compiling it
// takes longest.
template <class T, bool kShared>
struct Work {
  Problem<T> p;
  State s;

  __device__ explicit Work(const Arguments& a) : p(a) {
    CROC_DYNAMIC_SHARED(shared);
    s.carve(kShared ? shared : p.work.state, a.max_n(), a.max_m(), a.groups, Team::all().size);
  }
};

// Calls a phase that searches with the groups of columns that a thread keeps in registers.
template <bool kShared, class Phase>
__device__ auto with_groups(const Arguments& a, Phase phase) {
  using Few = std::integral_constant<int, kShared ? 1 : 4>;
  using Many = std::integral_constant<int, kShared ? 4 : 0>;
  return a.groups == Few::value ? phase(Few()) : phase(Many());
}

// Of bids by a team: rounds that are left, and on which page of State the next one's are.
struct Rounds {
  int left;
  bool turned;
};

template <bool kAlike, class T, bool kShared>
__device__ CROC_NOINLINE int bid_as(const Arguments& a, Team team, double epsilon, int enough,
                                    int patient, Rounds* rounds) {
  Work<T, kShared> work(a);
  if (rounds->turned) work.s.turn_page();
  int left = rounds->left;
  const int free = bid<kAlike>(work.p, work.s, team, epsilon, left, enough, patient);
  *rounds = {left, work.s.page < 0};
  return free;
}

// Bids of a team with any epsilon; returns the number of rows left free, listed in s.list.
template <class T, bool kShared>
__device__ int bid_team(const Arguments& a, bool alike, Team team, double epsilon, int enough,
                        int patient, Rounds& rounds) {
  return alike ? bid_as<true, T, kShared>(a, team, epsilon, enough, patient, &rounds)
               : bid_as<false, T, kShared>(a, team, epsilon, enough, patient, &rounds);
}

// The same by a block without one. Nearly all problems with few rows need no others: this function
// is for them alone.
template <class T, bool kShared>
__device__ CROC_NOINLINE int bid_free(const Arguments& a, int* left) {
  Work<T, kShared> work(a);
  const Team team = Team::alone();
  if (!work.p.alike())
    return bid<false>(work.p, work.s, team, 0.0, *left, kEnoughFree, kForestLeast);
  Rounds rounds{*left, false};
  const int free = bid_as<true, T, kShared>(a, team, 0.0, kEnoughFree, kForestLeast, &rounds);
  *left = rounds.left;
  return free;
}

// A forest from all free rows; false if it reaches no unmatched column.
template <class T, int kGroups, bool kShared, int kNodesAtOnce>
__device__ CROC_NOINLINE bool grow_forest(const Arguments& a, int num_free) {
  const Work<T, kShared> work(a);
  const Problem<T>& p = work.p;
  const State& s = work.s;
  const int wanted = (num_free + 1) / 2;
  const Forest forest = p.costs.vectors
                            ? grow<T, kGroups, true, kNodesAtOnce>(p.costs, s, num_free, wanted)
                            : grow<T, kGroups, false, kNodesAtOnce>(p.costs, s, num_free, wanted);
  count(p.scalars(), kForests, 1);
  count(p.scalars(), kForestScans, forest.reads);
  count(p.scalars(), kForestSteps, forest.steps);
  const bool found = is_finite(forest.distance);
  if (found) harvest(p.costs, s, num_free, forest.distance);
  clear_bids(s, p.m);
  return found;
}

template <class T, bool kShared>
__device__ CROC_NOINLINE bool auction_columns(const Arguments& a, Team team, double epsilon,
                                              int enough) {
  const Work<T, kShared> work(a);
  return bid_columns(work.p, work.p.levels(a), work.s, team, epsilon, enough);
}

template <class T, bool kShared>
__device__ CROC_NOINLINE void drop_pairs(const Arguments& a, Team team, double epsilon) {
  const Work<T, kShared> work(a);
  drop_loose_pairs(work.p.costs, work.p.lists(), work.s, team, epsilon);
}

// What an auction is made of.
template <class T, bool kShared>
struct AuctionPhases {
  const Arguments& a;
  Team team;
  bool alike;
  Rounds rounds;

  __device__ int bid(double epsilon, int& left, int enough, int patient) {
    rounds.left = left;
    const int free = bid_team<T, kShared>(a, alike, team, epsilon, enough, patient, rounds);
    left = rounds.left;
    return free;
  }
  __device__ bool bid_columns(double epsilon, int enough) const {
    return auction_columns<T, kShared>(a, team, epsilon, enough);
  }
  __device__ void drop_loose_pairs(double epsilon) const {
    drop_pairs<T, kShared>(a, team, epsilon);
  }
};

// `turned`: as of Rounds.
template <class T, bool kShared>
__device__ CROC_NOINLINE void run_auction(const Arguments& a, Team team, bool turned) {
  const Problem<T> p(a);
  auction(p, AuctionPhases<T, kShared>{a, team, p.alike(), {0, turned}});
}

// Whether a column has a price but no row.
template <class T, bool kShared>
__device__ CROC_NOINLINE bool any_priced(const Arguments& a) {
  const Work<T, kShared> work(a);
  return collect_priced(work.p.costs, work.s) > 0;
}

// Bids, and an auction if that leaves too many rows free, by all blocks of a cluster. Searches for
// so many rows would take far longer.
template <class T, bool kShared>
__device__ CROC_NOINLINE void bid_together(const Arguments& a) {
  const Problem<T> p(a);
  const Team team = Team::all();
  team.wait();  // all have begun: from here on their shared memory may be written
  const int few = min(kTogetherFree, p.n / kAuctionShare);
  Rounds rounds{kTogetherRounds, false};
  const bool served =
      bid_team<T, kShared>(a, p.alike(), team, 0.0, kEnoughFree, few, rounds) <= few;
  // Columns with a price but no row are read from the levels later, in a fraction of the time.
  if (served && !any_priced<T, kShared>(a)) return;
  // A problem read through swapped strides has its columns in whole lines already.
  if (!p.swapped) {
    make_levels(p.costs, p.levels(a, true), team);
    if (team.rank == 0 && threadIdx.x == 0) p.scalars().with_levels = 1;
    team.wait();
  }
  if (!served) run_auction<T, kShared>(a, team, rounds.turned);
}

// Rounds of bids by the priced columns, while a few rows are still free: many find one, or need no
// price any more, and the paths become shorter. Returns the number of rows left free, listed in
// s.list.
template <class T, bool kShared>
__device__ CROC_NOINLINE int raise_columns(const Arguments& a) {
  const Work<T, kShared> work(a);
  const Problem<T>& p = work.p;
  const State& s = work.s;
  settle_rows(p.costs, s);
  clear_bids(s, p.m);
  lower_duals(p, p.levels(a), s);
  int priced = -1;
  for (int round = 0; round < kRaiseLimit; ++round) {
    if (priced < 0) priced = collect_priced(p.costs, s);
    if (priced == 0) break;
    count(p.scalars(), kRaiseRounds, 1);
    count(p.scalars(), kRaiseBids, priced);
    priced = bid_columns_once(p, p.levels(a), s, priced, 0.0);
  }
  return block_collect(p.n, s.list, p.n, [&](int row) { return s.column_of[row] < 0; });
}

// One shortest path per free row; false if there is none for a row.
template <class T, int kGroups, bool kShared, bool kVectors, int kNodesAtOnce>
__device__ CROC_NOINLINE bool match_listed(const Arguments& a, int num_free) {
  const Work<T, kShared> work(a);
  const Problem<T>& p = work.p;
  const State& s = work.s;
  count(p.scalars(), kFreeRows, num_free);
  settle_rows(p.costs, s);
  for (int k = 0; k < num_free; ++k) {
    const RowGraph<T, kVectors, kNodesAtOnce> graph{p.costs, s};
    const PathEnd end = shortest_path<T, kGroups>(graph, s.list + k);
    count(p.scalars(), kRowScans, end.reads);
    count(p.scalars(), kRowSteps, end.steps);
    if (end.column < 0) return false;
    augment(p.costs, s, s.list[k], end);
  }
  return true;
}

template <class T, int kGroups, bool kShared, bool kVectors>
__device__ bool match_free(const Arguments& a, int num_free, bool wide) {
  return wide ? match_listed<T, kGroups, kShared, kVectors, kWide<kGroups>>(a, num_free)
              : match_listed<T, kGroups, kShared, kVectors, kFront>(a, num_free);
}

// What remains of the reverse pass, one shortest path each. `kLevels`: the columns' levels are
// there; kWidth: as of ColumnGraph.
template <class T, int kGroups, bool kShared, bool kLevels, int kWidth>
__device__ CROC_NOINLINE void release_columns(const Arguments& a) {
  const Work<T, kShared> work(a);
  const Problem<T>& p = work.p;
  const State& s = work.s;
  const std::conditional_t<kLevels, LevelGraph<T>, ColumnGraph<T, kWidth>> graph = [&] {
    const ColumnGraph<T, kWidth> plain{p.costs, s, p.copies()};
    if constexpr (kLevels)
      return LevelGraph<T>{plain, p.levels(a)};
    else
      return plain;
  }();
  for (int j = threadIdx.x; p.slots > 0 && j < p.m; j += blockDim.x)
    if (s.row_of[j] >= 0 || s.v[j] < 0.0) take_slot(s, j, p.slots);
  if (threadIdx.x == 0) s.target[0] = 0;
  // Each search leaves one priced column less, so this ends.
  for (int priced; (priced = collect_priced(p.costs, s)) > 0;) {
    count(p.scalars(), kReleased, priced);
    for (int k = 0; k < priced; ++k) {
      const int source = s.list[k];
      const Release end = shortest_release<T, kGroups>(graph, s.list + k);
      count(p.scalars(), kColumnScans, end.reads);
      count(p.scalars(), kColumnSteps, end.steps);
      release(p.costs, s, source, end);
    }
  }
}

// Runs a phase and adds the time it takes to a counter.
template <class Phase>
__device__ void timed(const Arguments& a, Counter which, Phase phase) {
  const int64_t start = clock64();
  phase();
  Workspace work;
  work.carve(a.workspace + blockIdx.x * a.workspace_stride, a);
  if (Team::all().rank == 0) count(*work.scalars, which, static_cast<int>(clock64() - start));
}

// A forest by the function for this problem.
template <class T, bool kShared>
__device__ bool grow_any(const Arguments& a, int num_free, bool wide) {
  return with_groups<kShared>(a, [&](auto groups) {
    constexpr int kGroups = groups();
    return wide ? grow_forest<T, kGroups, kShared, kWide<kGroups>>(a, num_free)
                : grow_forest<T, kGroups, kShared, kFront>(a, num_free);
  });
}

// Bids, and a forest whenever they stall, while that helps; returns the number of rows left free.
template <class T, bool kShared>
__device__ int bid_and_grow(const Arguments& a, bool wide) {
  int left = kBidRounds, num_free = 0, before = 0, misses = -1;  // -1: no forest yet
#pragma unroll 1
  for (;;) {
    timed(a, kBidTime, [&] { num_free = bid_free<T, kShared>(a, &left); });
    const bool missed = misses >= 0 && kForestGain * (before - num_free) < before;
    misses = missed ? misses + 1 : 0;
    if (misses == kForestMisses || num_free <= kForestLeast) break;
    before = num_free;
    bool found = false;
    timed(a, kForestTime, [&] { found = grow_any<T, kShared>(a, num_free, wide); });
    if (!found) break;
    left = max(left, kAfterForest);
  }
  return num_free;
}

// What match_rows decides by.
struct Outline {
  int n = 0;  // 0: there is nothing to match, or not by this block
  bool many, vectors;
};

template <class T, bool kShared>
__device__ Outline begin(const Arguments& a) {
  const Work<T, kShared> work(a);
  if (work.p.n == 0 || (Team::all().rank != 0 && !work.p.many)) return {};
  if (work.p.failed()) return {};
  load_state(work.p, work.s);
  match_nearest(work.s, work.p.n, work.p.m);
  clear_slots(work.s, work.p.m);
  return {work.p.n, work.p.many, work.p.costs.vectors};
}

template <class T, int kGroups, bool kShared>
__device__ void release_all(const Arguments& a, const Outline& outline) {
  if (outline.many && Problem<T>(a).scalars().with_levels)
    release_columns<T, kGroups, kShared, true, 4>(a);
  else if (kGroups == 1 && outline.n <= static_cast<int>(blockDim.x))
    release_columns<T, kGroups, kShared, false, kGroups == 1 ? 1 : 4>(a);
  else
    release_columns<T, kGroups, kShared, false, 4>(a);
}

// Grid (batch, blocks of a cluster).
template <class T, bool kShared>
__global__ void __launch_bounds__(kPathThreads, 1) match_rows(const __grid_constant__ Arguments a) {
  const Outline outline = begin<T, kShared>(a);
  if (outline.n == 0) return;
  if (outline.many) {
    timed(a, kAuctionTime, [&] { bid_together<T, kShared>(a); });
    if (Team::all().rank != 0) return;
  }
  int num_free = 0;
#pragma unroll 1
  for (bool auctioned = false;; auctioned = true) {
    num_free = bid_and_grow<T, kShared>(a, outline.many);
    if (auctioned || num_free <= kAuctionLeast || num_free <= outline.n / kAuctionShare) break;
    timed(a, kAuctionTime, [&] { run_auction<T, kShared>(a, Team::alone(), false); });
  }
  timed(a, kRaiseTime, [&] { num_free = raise_columns<T, kShared>(a); });
  bool matched = false;
  timed(a, kPathTime, [&] {
    matched = with_groups<kShared>(a, [&](auto groups) {
      return outline.vectors ? match_free<T, groups(), kShared, true>(a, num_free, outline.many)
                             : match_free<T, groups(), kShared, false>(a, num_free, outline.many);
    });
  });
  if (matched)
    timed(a, kReleaseTime, [&] {
      with_groups<kShared>(a, [&](auto groups) { release_all<T, groups(), kShared>(a, outline); });
    });
  const Work<T, kShared> work(a);
  if (matched)
    store_state(work.p, work.s);
  else if (threadIdx.x == 0)
    work.p.scalars().status = kInfeasible;
}

template <class T, bool kShared>
Kernel matching_kernel() {
  return match_rows<T, kShared>;
}

}  // namespace croc::gpu
