// The solver: which kernels run, in which order, with which shapes. `Launcher` is the CUDA stream
// in assignment.cu and the emulator in tests/cuda_emulation, so that both run the same sequence.
//
//   struct Launcher {
//     void operator()(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared, const
//     Arguments&, int cluster = 1) const;
//   };
//
// With `cluster` > 1 the grid's y axis is one cluster of as many blocks.
//
// No launch depends on data, so the sequence can be captured in a graph; kernels with nothing to do
// return at once.
#pragma once

#include "certificate.cuh"

namespace croc::gpu {

constexpr int kSinkhornSteps = 2;

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Threads of a block: a power of two, enough for `wanted`, at most `most`.
inline int threads_for(int wanted, int most) {
  int threads = 128;
  while (threads < most && threads < wanted) threads *= 2;
  return threads;
}

// Where the sequential phases keep their state, and how many columns a thread of the path search
// owns.
struct Plan {
  int64_t bid_shared;   // bytes of shared memory for bidding; 0: its state is in the workspace
  int bid_blocks;       // that bid for one problem, a cluster
  int level_rows;       // as in Arguments
  int64_t path_shared;  // and for the paths
  int path_threads;
  int groups;  // of 4 columns per thread in registers: 1 or 4; 0: any number, in memory
};

// Most bytes of shared memory that a kernel declares itself: the slots of searches and reductions.
constexpr int kStaticShared = 6 * 1024;

constexpr int kBlocksAtOnce = 128;     // of clusters, on an H100: 16 of 8, 32 of 4

inline void plan_bidding(Plan& plan, int max_n, int max_m, int64_t limit, int blocks) {
  State s;
  plan.bid_blocks = blocks;
  plan.bid_shared = s.carve_for_bidding(nullptr, max_n, max_m, blocks);
  if (plan.bid_shared <= limit) return;
  plan.bid_shared = 0;
  if (blocks > 1) plan_bidding(plan, max_n, max_m, limit, 1);
}

// `most_blocks` that a cluster may have; 1: the device knows none.
inline Plan make_plan(int batch, int max_n, int max_m, int shared_limit, int most_blocks) {
  const int64_t limit = shared_limit - kStaticShared;
  State s;
  Plan plan{};
  int blocks = max_n < kManyRows ? 1 : most_blocks;
  while (blocks > 1 && int64_t{blocks} * batch > kBlocksAtOnce) blocks /= 2;
  plan_bidding(plan, max_n, max_m, limit, blocks);
  plan.level_rows = kManyRows;
  plan.groups = max_m <= 4 * kPathThreads ? 1 : max_m <= 16 * kPathThreads ? 4 : 0;
  plan.path_threads = threads_for(ceil_div(max_m, 4), kPathThreads);
  plan.path_shared = s.carve_for_paths(nullptr, max_n, max_m, plan.groups);
  if (plan.path_shared > limit) plan.path_shared = 0;
  return plan;
}

// Sets the layout of the workspace; returns its bytes for the whole batch.
inline int64_t plan_workspace(Arguments& a, const Plan& plan) {
  State s;
  const int64_t bidding =
      plan.bid_shared > 0 ? 0 : s.carve_for_bidding(nullptr, a.max_n(), a.max_m(), 1);
  const int64_t paths =
      plan.path_shared > 0 ? 0 : s.carve_for_paths(nullptr, a.max_n(), a.max_m(), plan.groups);
  a.level_rows = plan.level_rows;
  a.paths_in_shared = plan.path_shared > 0;
  a.state_bytes = bidding > paths ? bidding : paths;
  Workspace w;
  a.workspace_stride = w.carve(nullptr, a);
  return a.workspace_stride * a.batch;
}

template <class T, int kGroups, class Launcher>
void finish(const Launcher& launch, const Arguments& a, const Plan& plan, dim3 stripes,
            int stripe_threads) {
  const dim3 problems(a.batch);
  launch(match_rows<T, kGroups>, problems, plan.path_threads, plan.path_shared, a);
  launch(raise_columns<T>, stripes, stripe_threads, 0, a);
  launch(a.max_n() < a.level_rows ? release_columns<T, kGroups, false> : release_columns<T, kGroups, true>,
         problems, plan.path_threads, plan.path_shared, a);
}

template <class T, class Launcher>
void solve(const Launcher& launch, const Arguments& a, const Plan& plan) {
  if (a.batch == 0) return;
  const dim3 problems(a.batch);
  launch(prepare<T>, problems, kRowThreads, 0, a);
  if (a.max_n() > 0) {
    const dim3 stripes(a.batch, ceil_div(a.max_m(), kStripe));
    const dim3 rows(a.batch, ceil_div(a.max_n(), kRowThreads / kWarp));
    const dim3 rows_and_slack(a.batch, rows.y + 1);
    const int stripe_threads =
        threads_for(4 * a.max_n(), kStripeThreads);  // a warp: 8 rows or more
    const int problem_threads = threads_for(a.max_m() / 2, kProblemThreads);
    launch(column_means<T>, stripes, stripe_threads, 0, a);
    launch(start_from_means<T>, problems, problem_threads, 0, a);
    const int sample = a.max_n() < kSampledRows ? a.max_n() : kSampledRows;
    launch(compare_rows<T>, dim3(a.batch, ceil_div(sample, kRowThreads / kWarp)), kRowThreads, 0,
           a);
    launch(choose_start<T>, problems, problem_threads, 0, a);
    for (int step = 0; step < kSinkhornSteps; ++step) {
      launch(sinkhorn_rows<T>, rows_and_slack, kRowThreads, 0, a);
      launch(sinkhorn_columns<T>, stripes, stripe_threads, 0, a);
    }
    launch(start_from_sinkhorn<T>, problems, problem_threads, 0, a);
    launch(nearest_columns<T>, rows, kRowThreads, 0, a);
    launch(find_twins<T>, rows, kRowThreads, 0, a);
    const int bid_threads = threads_for(ceil_div(a.max_m(), 4), kBidThreads);
    launch(plan.bid_shared > 0 ? bid_rows<T, true> : bid_rows<T, false>,
           dim3(a.batch, plan.bid_blocks), bid_threads, plan.bid_shared, a, plan.bid_blocks);
    if (plan.groups == 1)
      finish<T, 1>(launch, a, plan, stripes, stripe_threads);
    else if (plan.groups == 4)
      finish<T, 4>(launch, a, plan, stripes, stripe_threads);
    else
      finish<T, 0>(launch, a, plan, stripes, stripe_threads);
    launch(measure_slack<T>, rows, kRowThreads, 0, a);
  }
  launch(write_results<T>, problems, kRowThreads, 0, a);
}

}  // namespace croc::gpu
