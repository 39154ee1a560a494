// Searches from all free rows at once, for rows that bid in vain: many of them want fewer columns,
// whose prices then rise by no more than the next best column among themselves. A forest of
// shortest paths raises all of these prices at once, to where as many unmatched columns come into
// reach as half of the free rows need, and matches one row per tree.
//
// Duals stay feasible and matched pairs tight, as after one path. But columns that a tree has
// reached beyond its first keep a price without a row: later rows take most of them, the reverse
// pass has the rest.
#pragma once

#include "search.cuh"

namespace croc::gpu {

// A path may go on past the first unmatched column found.
template <class T, bool kVectors, int kNodesAtOnce>
struct ForestGraph : RowGraph<T, kVectors, kNodesAtOnce> {
  __device__ double relief(int) const { return infinity(); }
};

struct Forest {
  double distance;  // within which the wanted columns lie; infinite: there are none
  int reads, steps;
};

// The smallest distance within which `wanted` unmatched columns lie, or as many as can be reached;
// distances beyond `settled` are not final and do not count.
template <class T>
__device__ double distance_of(const Costs<T>& costs, const State& s, int wanted, double settled) {
  const auto reached = [&](int j) {
    return s.row_of[j] < 0 && s.reach[j] <= settled && is_finite(s.reach[j]);
  };
  const float most = block_select(costs.m, wanted - 1, [&](int j) {
    return reached(j) ? __double2float_ru(s.reach[j]) : static_cast<float>(infinity());
  });
  double furthest = -infinity();
  for (int j = threadIdx.x; j < costs.m; j += blockDim.x)
    if (reached(j) && __double2float_ru(s.reach[j]) <= most) furthest = fmax(furthest, s.reach[j]);
  furthest = -block_min(-furthest);
  return is_finite(furthest) ? furthest : infinity();
}

// Which of this thread's columns are unmatched, one bit each; of those beyond 32 none.
template <class Nodes, class Graph>
__device__ unsigned unmatched_nodes(const Graph& graph, const Nodes& nodes) {
  unsigned unmatched = 0;
#pragma unroll
  for (int g = 0; g < min(nodes.groups(), 32 / Graph::kWidth); ++g) {
#pragma unroll
    for (int k = 0; k < Graph::kWidth; ++k) {
      const int node = graph.node(g, k);
      const bool is = node < graph.count() && graph.s.row_of[node] < 0;
      unmatched |= static_cast<unsigned>(is) << (Graph::kWidth * g + k);
    }
  }
  return unmatched;
}

// This thread's unmatched columns within `distance`.
template <class Nodes, class Graph>
__device__ unsigned ends_within(const Graph& graph, const Nodes& nodes, unsigned unmatched,
                                double distance) {
  unsigned ends = 0;
  for (unsigned rest = unmatched; rest != 0; rest &= rest - 1) {
    const int place = __ffs(static_cast<int>(rest)) - 1;
    ends += graph.s.reach[graph.node(place / Graph::kWidth, place % Graph::kWidth)] <= distance;
  }
  for (int g = 32 / Graph::kWidth; g < nodes.groups(); ++g) {
#pragma unroll
    for (int k = 0; k < Graph::kWidth; ++k) {
      const int node = graph.node(g, k);
      ends += node < graph.count() && graph.s.row_of[node] < 0 && graph.s.reach[node] <= distance;
    }
  }
  return ends;
}

// Shortest paths from the listed rows until `wanted` unmatched columns are in reach.
template <class T, int kGroups, bool kVectors, int kNodesAtOnce>
__device__ Forest grow(const Costs<T>& costs, const State& s, int count, int wanted) {
  using Graph = ForestGraph<T, kVectors, kNodesAtOnce>;
  using Its = Nodes<T, kGroups, Graph::kWidth>;
  constexpr int kAtOnce = nodes_at_once<kGroups, Graph>();
  SearchSlots& slots = search_slots();
  const Graph graph{{costs, s}};
  Its nodes(s, graph.count());
  forget(graph, nodes, infinity());
  Forest forest{infinity(), count, (count + kAtOnce - 1) / kAtOnce};
  read_sources(graph, nodes, s.list, count, infinity());
  __syncthreads();
  const double bound = distance_of(costs, s, wanted, infinity());  // it only falls from here on
  tighten(graph, nodes, bound);
  const unsigned unmatched = unmatched_nodes(graph, nodes);
  double settled = 0.0;  // no distance below it changes any more
  for (int turn = 0;; turn ^= 1) {
    const int told = tell_nearest(graph, nodes, slots.nearest[turn]);
    const unsigned ends =
        __reduce_add_sync(kAllLanes, ends_within(graph, nodes, unmatched, settled));
    if (lane_id() == 0) slots.values[turn][warp_id()] = ends;
    __syncthreads();
    const bool exists = lane_id() < warp_count();
    const unsigned all = __reduce_add_sync(
        kAllLanes, exists ? static_cast<unsigned>(slots.values[turn][lane_id()]) : 0u);
    if (static_cast<int>(all) >= wanted) break;
    settled = __uint_as_float(
        __reduce_min_sync(kAllLanes, exists ? slots.nearest[turn][lane_id()].key : ~0u));
    Front<T, Graph> front{graph, slots.nearest[turn]};
    if (!front.template choose<kAtOnce>(bound)) break;
    if (front.has(warp_id())) stop_waiting(graph, nodes, told);
    read_front(graph, nodes, front, bound);
    forest.reads += front.count;
    ++forest.steps;
  }
  __syncthreads();
  forest.distance = distance_of(costs, s, wanted, settled);
  return forest;
}

// Moves the duals of the forest by `distance`, then matches the root of every tree in which an
// unmatched column is within it, the lowest one.
template <class T>
__device__ void harvest(const Costs<T>& costs, const State& s, int count, double distance) {
  for (int j = threadIdx.x; j < costs.m; j += blockDim.x) {
    const double shift = distance - s.reach[j];
    if (!(shift > 0.0)) continue;
    s.v[j] -= shift;
    if (s.row_of[j] >= 0) s.u[s.row_of[j]] += shift;
  }
  for (int k = threadIdx.x; k < count; k += blockDim.x) s.u[s.list[k]] += distance;
  for (int i = threadIdx.x; i < costs.n; i += blockDim.x) s.target[i] = kNobody;
  __syncthreads();
  for (int j = threadIdx.x; j < costs.m; j += blockDim.x) {
    if (s.row_of[j] >= 0 || !(s.reach[j] <= distance)) continue;
    int root = s.path[j];
    while (s.column_of[root] >= 0) root = s.path[s.column_of[root]];
    atomicMin(&s.target[root], j);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += blockDim.x)
    if (s.target[s.list[k]] != kNobody) flip(s, s.target[s.list[k]]);
  __syncthreads();
}

}  // namespace croc::gpu
