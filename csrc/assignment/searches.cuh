// The kernels that finish a problem exactly: shortest paths for the rows that are still free, then
// the reverse pass. After the paths every row is matched, but a column that nobody took may still
// have a negative dual: it was priced for a demand that did not come. Each such column is raised to
// zero, or takes a row.
#pragma once

#include "search.cuh"

namespace croc::gpu {

// One shortest path per row of the list; false if there is none for a row.
template <class T, int kGroups, bool kVectors>
__device__ bool match_listed(const Problem<T>& p, const State& s, int num_free) {
  int reads = 0, steps = 0;
  for (int k = 0; k < num_free; ++k) {
    const int source = s.list[k];
    const PathEnd end = shortest_path<T, kGroups, kVectors>(p.costs, s, source);
    reads += end.reads, steps += end.steps;
    if (end.column < 0) return false;
    augment(p.costs, s, source, end);
  }
  if (threadIdx.x == 0) {
    p.scalars().counters[kRowScans] = reads;
    p.scalars().counters[kRowSteps] = steps;
  }
  return true;
}

// Grid (batch): one shortest path per row that is still free.
template <class T, int kGroups>
__global__ void __launch_bounds__(kPathThreads, 1) match_rows(Arguments a) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<T> p(a);
  if (p.failed() || p.n == 0) return;
  State s;
  s.carve_for_paths(a.paths_in_shared ? shared : p.work.state, a.max_n(), a.max_m(), kGroups);
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) s.twin[i] = p.work.twin[i];
  load_state(p, s);
  const int num_free = block_collect(p.n, s.list, p.n, [&](int i) { return s.column_of[i] < 0; });
  const bool matched = p.costs.vectors ? match_listed<T, kGroups, true>(p, s, num_free)
                                       : match_listed<T, kGroups, false>(p, s, num_free);
  if (!matched) {
    if (threadIdx.x == 0) p.scalars().status = kInfeasible;
    return;
  }
  int raised = 0;
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) raised |= s.row_of[j] < 0 && s.v[j] < 0.0;
  raised = __syncthreads_or(raised);
  store_state(p, s);
  if (threadIdx.x == 0) p.scalars().raised = raised;
}

// Grid (batch, stripes): raise every unmatched column as far as the row duals let it, all at once.
template <class T>
__global__ void raise_columns(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0 || stripe_start() >= p.m || !p.scalars().raised) return;
  const int column = stripe_start() + static_cast<int>(threadIdx.x);
  const bool mine =
      threadIdx.x < kStripe && column < p.m && p.work.row_of[column] < 0 && p.work.v[column] < 0.0;
  if (!__syncthreads_or(mine)) return;
  __shared__ double rooms[kStripeThreads / kWarp][kStripe];
  double room[4] = {infinity(), infinity(), infinity(), infinity()};
  for_stripe(p.costs, stripe_first(), [&](int row, const T(&x)[4]) {
    const double u = p.work.u[row];
#pragma unroll
    for (int k = 0; k < 4; ++k) room[k] = lesser(room[k], static_cast<double>(x[k]) - u);
  });
#pragma unroll
  for (int k = 0; k < 4; ++k) rooms[warp_id()][4 * lane_id() + k] = room[k];
  __syncthreads();
  if (!mine) return;
  double least = infinity();
  for (int w = 0; w < warp_count(); ++w) least = fmin(least, rooms[w][threadIdx.x]);
  p.work.v[column] = fmin(0.0, fmax(p.work.v[column], least));
}

// One search per column of the list `waiting`.
template <class T, int kGroups, class Graph>
__device__ void release_listed(const Problem<T>& p, const Graph& graph, int count) {
  int reads = 0, steps = 0;
  for (int k = 0; k < count; ++k) {
    const int source = graph.s.waiting[k];
    const Release end = shortest_release<T, kGroups>(graph, source);
    reads += end.reads, steps += end.steps;
    release(p.costs, graph.s, source, end);
  }
  if (threadIdx.x == 0) {
    p.scalars().counters[kColumnScans] = reads;
    p.scalars().counters[kColumnSteps] = steps;
    p.scalars().counters[kReleased] = count;
  }
}

// Grid (batch). `kLevels`: some problems' columns may be there at 8 bits per cost.
template <class T, int kGroups, bool kLevels>
__global__ void __launch_bounds__(kPathThreads, 1) release_columns(Arguments a) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<T> p(a);
  if (p.failed() || p.n == 0 || !p.scalars().raised) return;
  State s;
  s.carve_for_paths(a.paths_in_shared ? shared : p.work.state, a.max_n(), a.max_m(), kGroups);
  load_state(p, s);
  const int count =
      block_collect(p.m, s.waiting, p.m, [&](int j) { return s.row_of[j] < 0 && s.v[j] < 0.0; });
  const ColumnGraph<T> graph{p.costs, s};
  if (kLevels && p.scalars().with_levels)
    release_listed<T, kGroups>(p, LevelGraph<T>{graph, levels_of<T>(a)}, count);
  else
    release_listed<T, kGroups>(p, graph, count);
  store_state(p, s);
}

}  // namespace croc::gpu
