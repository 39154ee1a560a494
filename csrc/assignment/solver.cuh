// The solver: which kernels run, in which order, with which shapes. `Launcher` is the CUDA stream in assignment.cu
// and the emulator in tests/cuda_emulation, so that both run the same sequence.
//
//   struct Launcher {
//     void operator()(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared, const Arguments&) const;
//   };
//
// No launch depends on data, so the sequence can be captured in a graph; kernels with nothing to do return at once.
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

// Where the sequential phases keep their state and how many columns a thread owns.
struct Plan {
  int groups;  // 1 or 4: registers and shared memory; 0: workspace
  int threads;
  int64_t shared;
};

inline Plan make_plan(int max_n, int max_m, int shared_limit) {
  Plan plan{};
  plan.threads = threads_for(ceil_div(max_m, 4), kPathThreads);
  State s;
  plan.shared = s.carve(nullptr, max_n, max_m, false);
  const int64_t reserve = 2048;  // the reductions' own
  if (plan.shared + reserve > shared_limit || max_m > 16 * plan.threads) plan.shared = 0;
  else plan.groups = max_m <= 4 * plan.threads ? 1 : 4;
  return plan;
}

// Sets a.large and a.workspace_stride; returns the bytes of workspace for the whole batch.
inline int64_t plan_workspace(Arguments& a, const Plan& plan) {
  a.large = plan.groups == 0;
  Workspace w;
  a.workspace_stride = w.carve(nullptr, a.max_n(), a.max_m(), a.large);
  return a.workspace_stride * a.batch;
}

template <class T, int kGroups, class Launcher>
void match(const Launcher& launch, const Arguments& a, const Plan& plan, dim3 stripes, int stripe_threads) {
  const dim3 problems(a.batch);
  launch(match_rows<T, kGroups>, problems, plan.threads, plan.shared, a);
  launch(raise_columns<T>, stripes, stripe_threads, 0, a);
  launch(release_columns<T, kGroups>, problems, plan.threads, plan.shared, a);
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
    const int stripe_threads = threads_for(4 * a.max_n(), kStripeThreads);  // a warp: 8 rows or more
    const int problem_threads = threads_for(a.max_m() / 2, kProblemThreads);
    launch(column_means<T>, stripes, stripe_threads, 0, a);
    launch(start_from_means<T>, problems, problem_threads, 0, a);
    launch(compare_rows<T>, rows, kRowThreads, 0, a);
    launch(choose_start<T>, problems, problem_threads, 0, a);
    for (int step = 0; step < kSinkhornSteps; ++step) {
      launch(sinkhorn_rows<T>, rows_and_slack, kRowThreads, 0, a);
      launch(sinkhorn_columns<T>, stripes, stripe_threads, 0, a);
    }
    launch(start_from_sinkhorn<T>, problems, problem_threads, 0, a);
    launch(nearest_columns<T>, rows, kRowThreads, 0, a);
    launch(find_twins<T>, rows, kRowThreads, 0, a);
    if (plan.groups == 1) match<T, 1>(launch, a, plan, stripes, stripe_threads);
    else if (plan.groups == 4) match<T, 4>(launch, a, plan, stripes, stripe_threads);
    else match<T, 0>(launch, a, plan, stripes, stripe_threads);
    launch(measure_slack<T>, rows, kRowThreads, 0, a);
  }
  launch(write_results<T>, problems, kRowThreads, 0, a);
}

}  // namespace croc::gpu
