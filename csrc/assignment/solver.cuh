// The solver: which kernels run, in which order, with which shapes. `Launcher` is the CUDA stream
// in assignment.cu and the emulator in tests/cuda_emulation, so that both run the same sequence.
//
//   struct Launcher {
//     void operator()(Kernel kernel, dim3 grid, int threads, int64_t shared, const
//     Arguments&, int cluster = 1) const;
//   };
//
// With `cluster` > 1 the grid's y axis is one cluster of as many blocks.
//
// No launch depends on data, so the sequence can be captured in a graph; kernels with nothing to do
// return at once.
#pragma once

#include "anneal.cuh"
#include "certificate.cuh"
#include "graphs.cuh"

namespace croc::gpu {

constexpr int kSinkhornSteps = 2;

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Threads of a block: a power of two, enough for `wanted`, at most `most`.
inline int threads_for(int wanted, int most) {
  int threads = 128;
  while (threads < most && threads < wanted) threads *= 2;
  return threads;
}

// Where the sequential phases keep their state, and how many columns a thread of a search owns.
struct Plan {
  int64_t shared;  // bytes of shared memory for their state; 0: it is in the workspace
  int threads;
  int groups;  // of 4 columns per thread in registers: 1 or 4; 0: any number, in memory
  int blocks;  // that bid for one problem, a cluster
  int anneal;  // and that anneal it
  int many_rows, ring_places;  // as in Arguments
};

// Most bytes of shared memory that a kernel declares itself: the slots of searches and reductions.
constexpr int kStaticShared = 6 * 1024;
constexpr int kAnnealShared = 10 * 1024;  // the same of annealing

constexpr int kBlocksAtOnce = 128;  // of clusters, of an H100's 132: launch.cuh asks how many fit

// `most_blocks` that a cluster may have; 1: the device knows none. No result depends on how many.
inline Plan make_plan(int batch, int max_n, int max_m, int shared_limit, int most_blocks,
                      int many_rows = kManyRows) {
  State s;
  Plan plan{};
  plan.many_rows = many_rows;
  plan.ring_places = max_n < kAnnealRows ? 0 : places_within(shared_limit - kAnnealShared);
  plan.anneal = most_blocks;
  while (plan.anneal > 1 && int64_t{plan.anneal} * batch > kBlocksAtOnce) --plan.anneal;
  plan.blocks = max_n < many_rows ? 1 : plan.anneal;
  plan.groups = max_m <= 4 * kPathThreads ? 1 : max_m <= 16 * kPathThreads ? 4 : 0;
  plan.threads = threads_for(ceil_div(max_m, 4), kPathThreads);
  plan.shared = s.carve(nullptr, max_n, max_m, plan.groups, plan.blocks);
  if (plan.groups > 0 && plan.shared <= shared_limit - kStaticShared) return plan;
  plan.shared = 0;
  if (plan.groups == 1) plan.groups = 4;  // searches less to compile
  // What the blocks of a cluster tell each other is in their shared memory, and takes more of it.
  return plan.blocks > 1 ? make_plan(batch, max_n, max_m, shared_limit, 1, many_rows) : plan;
}

// Sets the layout of the workspace; returns its bytes for the whole batch.
inline int64_t plan_workspace(Arguments& a, const Plan& plan) {
  State s;
  a.many_rows = plan.many_rows, a.groups = plan.groups;
  a.ring_places = a.cost_bytes == 4 ? plan.ring_places : 0;
  a.state_bytes = plan.shared > 0 ? 0 : s.carve(nullptr, a.max_n(), a.max_m(), plan.groups, 1);
  Workspace w;
  a.workspace_stride = w.carve(nullptr, a);
  return a.workspace_stride * a.batch;
}

// match_rows, defined in searches.cuh: each is compiled on its own (match_*.cu), which takes longer
// than all other kernels together.
template <class T, bool kShared>
Kernel matching_kernel();

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
    launch(anneal<T>, dim3(a.batch, plan.anneal), kAnnealThreads,
           int64_t{a.ring_places} * Ring::kBytes, a, plan.anneal);
    launch(nearest_again<T>, rows, kRowThreads, 0, a);
    launch(plan.shared > 0 ? matching_kernel<T, true>() : matching_kernel<T, false>(),
           dim3(a.batch, plan.blocks), plan.threads, plan.shared, a, plan.blocks);
    launch(measure_slack<T>, rows, kRowThreads, 0, a);
  }
  launch(write_results<T>, problems, kRowThreads, 0, a);
}

}  // namespace croc::gpu
