// Shortest paths over reduced costs, by a block. Every thread owns the same nodes throughout, and
// several nodes are read per step.
//
// Dijkstra's algorithm reads the nearest node only. Here further near ones are read with it, each
// the nearest of its warp; one that comes nearer later is read again. Distances only fall, so the
// search ends with the same ones, in practice after a third or a quarter of the steps.
//
// A step is bound by the instructions of all threads, so nearly all costs are dismissed by one
// addition and one comparison in the costs' own type, rounded so that none is dismissed wrongly.
// Distances, exact in float64, are in shared memory and touched by the few that remain.
#pragma once

#include "graphs.cuh"

namespace croc::gpu {

struct Found {
  int node;      // where the nearest path ends, -1: nowhere nearer than the bound given
  double bound;  // its length, or the bound given
  int reads, steps;
};

// A node that waits to be read.
struct Waiting {
  double distance;
  unsigned key;  // bits of a float, which are in the order of such floats
  int node;
};

// What the warps tell each other, in turns. One for all searches of a kernel.
struct SearchSlots {
  Waiting nearest[2][kWarp];
  uint64_t values[2][kWarp];
};
__device__ inline SearchSlots& search_slots() {
  __shared__ SearchSlots slots;
  return slots;
}

// Nodes to be read in one step.
template <int kAtOnce>
struct Front {
  int count;
  int from[kAtOnce];
  double distance[kAtOnce];
};

// The nodes of kWidth that a path through the node just read may bring nearer.
template <int kWidth, class T, class Nodes, class Four>
__device__ unsigned promising(const Nodes& nodes, int g, T sign, T base, const Four& four) {
  unsigned found = 0;
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    if (four.sum(sign, k, base) <= nodes.limit(g, k)) found |= 1u << k;
  return found;
}

// A path through `from`, which is at distance `start`, to this thread's node (g, k), if it is
// shorter than `bound`; returns the end it leads to. It is never shorter than its first part,
// whatever is rounded, so the predecessors never form a circle.
template <class Nodes, class Graph>
__device__ double reach(const Graph& graph, Nodes& nodes, int g, int k, int from, double start,
                        double bound) {
  const State& s = graph.s;
  const int node = graph.node(g, k);
  const double base = start - graph.dual_of(from), dual = graph.dual(node);
  const double cost = graph.cost(from, node), before = s.reach[node];
  double distance = base + (cost - dual);
  if (distance < start) distance = start;
  if (!(distance < bound) || distance > before) return infinity();
  const bool useless = graph.leads_nowhere(node, distance, from, base);
  double end = infinity();
  if (distance < before) {
    s.reach[node] = distance;
    s.path[node] = from;
    nodes.set_limit(g, k, distance + dual);
    nodes.set_key(g, k, rounded_down(float(), distance));
    end = distance + graph.relief(node);
  }
  if (useless) nodes.set_key(g, k, static_cast<float>(infinity()));
  return end;
}

// This thread's node with the least key.
template <class Nodes, class Graph>
__device__ Waiting nearest_node(const Graph& graph, const Nodes& nodes) {
  float least = nodes.key(0, 0);
  int node = graph.node(0, 0);
#pragma unroll
  for (int g = 0; g < nodes.groups(); ++g) {
#pragma unroll
    for (int k = 0; k < Graph::kWidth; ++k)
      if (nodes.key(g, k) < least) least = nodes.key(g, k), node = graph.node(g, k);
  }
  return {0.0, __float_as_uint(least), node};
}

// The least keys of the warps, up to kAtOnce of them, which is nearly the order of the distances.
// Every warp does the same. False: none is waiting below the bound.
template <class Nodes, class Graph, int kAtOnce>
__device__ bool choose_front(const Graph& graph, Nodes& nodes, const Waiting* of_warps,
                             double bound, Front<kAtOnce>& front) {
  unsigned key = lane_id() < warp_count() ? of_warps[lane_id()].key : ~0u;
  if (!(static_cast<double>(__uint_as_float(key)) < bound)) key = ~0u;  // NaN too
  front.count = 0;
#pragma unroll
  for (int w = 0; w < kAtOnce; ++w) {
    const unsigned least = __reduce_min_sync(kAllLanes, key);
    if (least == ~0u) break;
    const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, key == least))) - 1;
    if (lane_id() == lane) key = ~0u;
    const Waiting waiting = of_warps[lane];
    int its_g, its_k;
    if (Graph::owns(waiting.node, its_g, its_k))
      nodes.set_key(its_g, its_k, static_cast<float>(infinity()));
    front.from[w] = graph.next(waiting.node);
    front.distance[w] = waiting.distance;
    front.count = w + 1;
  }
  return front.count > 0;
}

// Reads the nodes of the front; returns the nearest end that this thread knows.
template <class T, int kGroups, class Graph, int kAtOnce>
__device__ double read_front(const Graph& graph, Nodes<T, kGroups, Graph::kWidth>& nodes,
                             const Front<kAtOnce>& front, double lowest) {
  constexpr int kWidth = Graph::kWidth;
  const T sign = graph.costs.sign;
  const auto base_of = [&](int w) {
    return rounded_down(T(), front.distance[w] - graph.dual_of(front.from[w]));
  };
  if constexpr (kGroups == 0) {
    const T base = base_of(0);
    for (int g = 0; g < nodes.groups(); ++g) {
      typename Graph::Four four;
      graph.read(front.from[0], g, four);
      graph.keep(front.from[0], g, four);
      unsigned rest = promising<kWidth>(nodes, g, sign, base, four);
      for (; rest != 0; rest &= rest - 1)
        lowest = lesser(lowest, reach(graph, nodes, g, __ffs(static_cast<int>(rest)) - 1,
                                      front.from[0], front.distance[0], lowest));
    }
    return lowest;
  } else {
    typename Graph::Four fours[kAtOnce][kGroups];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      if (w >= front.count) break;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) graph.read(front.from[w], g, fours[w][g]);
    }
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      if (w >= front.count) break;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) graph.keep(front.from[w], g, fours[w][g]);
    }
    unsigned rest = 0;  // a bit per cost: few, or all of them
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      if (w >= front.count) break;
      const T base = base_of(w);
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        rest |= promising<kWidth>(nodes, g, sign, base, fours[w][g])
                << (kWidth * (w * kGroups + g));
    }
    for (; rest != 0; rest &= rest - 1) {
      const int place = __ffs(static_cast<int>(rest)) - 1, w = place / (kWidth * kGroups);
      int from = front.from[0];
      double start = front.distance[0];
#pragma unroll
      for (int other = 1; other < kAtOnce; ++other)
        if (w == other) from = front.from[other], start = front.distance[other];
      lowest = lesser(lowest, reach(graph, nodes, place / kWidth % kGroups, place % kWidth, from,
                                    start, lowest));
    }
    return lowest;
  }
}

// No node has been reached.
template <class Nodes, class Graph>
__device__ void forget(const Graph& graph, Nodes& nodes, double bound) {
#pragma unroll
  for (int g = 0; g < nodes.groups(); ++g) {
#pragma unroll
    for (int k = 0; k < Graph::kWidth; ++k) {
      const int node = graph.node(g, k);
      const bool exists = node < graph.count();
      if (exists) graph.s.reach[node] = infinity();
      nodes.set_limit(g, k, exists ? bound + graph.dual(node) : -infinity());
      nodes.set_key(g, k, static_cast<float>(infinity()));
    }
  }
}

// No node beyond the bound matters.
template <class Nodes, class Graph>
__device__ void tighten(const Graph& graph, Nodes& nodes, double bound) {
#pragma unroll
  for (int g = 0; g < nodes.groups(); ++g) {
#pragma unroll
    for (int k = 0; k < Graph::kWidth; ++k) {
      const int node = graph.node(g, k);
      if (node < graph.count())
        nodes.set_limit(g, k,
                        lesser(static_cast<double>(nodes.limit(g, k)), bound + graph.dual(node)));
    }
  }
}

// Each warp tells the others its nearest node.
template <class Nodes, class Graph>
__device__ void tell_nearest(const Graph& graph, const Nodes& nodes, Waiting* of_warps) {
  const Waiting mine = nearest_node(graph, nodes);
  const unsigned least = __reduce_min_sync(kAllLanes, mine.key);
  const unsigned votes = __ballot_sync(kAllLanes, mine.key == least);
  if (lane_id() != __ffs(static_cast<int>(votes)) - 1) return;
  const double distance = mine.node < graph.count() ? graph.s.reach[mine.node] : infinity();
  of_warps[warp_id()] = {distance, mine.key, mine.node};
}

// Reads the sources, at distance zero; nobody waits for anybody in between.
template <class T, int kGroups, class Graph, int kAtOnce>
__device__ double read_sources(const Graph& graph, Nodes<T, kGroups, Graph::kWidth>& nodes,
                               const int* sources, int count, Front<kAtOnce>& front,
                               double lowest) {
  for (int first = 0; first < count; first += kAtOnce) {
    front.count = min(kAtOnce, count - first);
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      front.from[w] = sources[min(first + w, count - 1)];
      front.distance[w] = 0.0;
    }
    lowest = read_front(graph, nodes, front, lowest);
  }
  return lowest;
}

// Shortest paths from the sources until no path can end below the bound; their lengths are in
// s.reach, the node before each in s.path. One barrier per step.
template <class T, int kGroups, class Graph>
__device__ Found search(const Graph& graph, const int* sources, int count, double bound) {
  using Its = Nodes<T, kGroups, Graph::kWidth>;
  constexpr int kAtOnce = Its::kAtOnce;
  SearchSlots& slots = search_slots();
  Its nodes(graph.s, graph.count());
  forget(graph, nodes, bound);
  Front<kAtOnce> front;
  Found found{-1, bound, count, (count + kAtOnce - 1) / kAtOnce};
  double lowest = read_sources(graph, nodes, sources, count, front, bound);
  for (int turn = 0;; turn ^= 1) {
    tell_nearest(graph, nodes, slots.nearest[turn]);
    uint64_t of_warp = ordered(found.bound);
    if (__any_sync(kAllLanes, lowest < found.bound)) of_warp = warp_min(ordered(lowest));
    if (lane_id() == 0) slots.values[turn][warp_id()] = of_warp;
    __syncthreads();
    lowest = from_ordered(
        warp_min(lane_id() < warp_count() ? slots.values[turn][lane_id()] : ~uint64_t{0}));
    const bool nearer = lowest < found.bound;  // in every thread, or in none
    found.bound = lowest;
    if (!choose_front(graph, nodes, slots.nearest[turn], lowest, front)) break;
    if (nearer) tighten(graph, nodes, lowest);
    lowest = read_front(graph, nodes, front, lowest);
    found.reads += front.count;
    ++found.steps;
  }
  Least end = Least::none();
  for (int g = nodes.groups() - 1; g >= 0 && found.bound < bound; --g) {
#pragma unroll
    for (int k = Graph::kWidth - 1; k >= 0; --k) {
      const int node = graph.node(g, k);
      if (node < graph.count() && graph.s.reach[node] + graph.relief(node) == found.bound)
        end = {0, static_cast<unsigned>(node)};
    }
  }
  found.node = static_cast<int>(block_least(end, 0).key);
  return found;
}

template <class T, int kGroups, bool kVectors>
__device__ PathEnd shortest_path(const Costs<T>& costs, const State& s, const int* source) {
  const Found found = search<T, kGroups>(RowGraph<T, kVectors>{costs, s}, source, 1, infinity());
  return {found.node, found.bound, found.reads, found.steps};
}

// Moves the duals along the tree, then the matching along the path.
template <class T>
__device__ void augment(const Costs<T>& costs, const State& s, int source, PathEnd end) {
  for (int j = threadIdx.x; j < costs.m; j += blockDim.x) {
    const double shift = end.distance - s.reach[j];
    if (!(shift > 0.0) || s.row_of[j] < 0) continue;
    s.v[j] -= shift;
    s.u[s.row_of[j]] += shift;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    s.u[source] += end.distance;
    flip(s, end.column);
  }
  __syncthreads();
}

// From a column that is unmatched with a negative dual, until no column closer to zero can be
// found.
template <class T, int kGroups, class Graph>
__device__ Release shortest_release(const Graph& graph, const int* source) {
  const State& s = graph.s;
  const Found found = search<T, kGroups>(graph, source, 1, -s.v[*source]);
  const int column = found.node < 0 ? *source : s.column_of[found.node];
  return {column, found.bound, found.reads, found.steps};
}

template <class T>
__device__ void release(const Costs<T>& costs, const State& s, int source, Release end) {
  for (int i = threadIdx.x; i < costs.n; i += blockDim.x) {
    const double shift = end.rise - s.reach[i];
    if (!(shift > 0.0)) continue;
    s.u[i] -= shift;
    s.v[s.column_of[i]] += shift;
  }
  const int kept = s.target[0];
  for (int k = threadIdx.x; k < kept; k += blockDim.x) fill_slot(s, s.target[k + 1]);
  __syncthreads();
  if (threadIdx.x == 0) s.target[0] = 0;
  flip_release(s, source, end);
}

}  // namespace croc::gpu
