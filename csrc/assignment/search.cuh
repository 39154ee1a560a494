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

// How many nodes a step reads: registers decide.
template <int kGroups, class Graph>
__device__ constexpr int nodes_at_once() {
  return kGroups == 1 ? Graph::kAtOnce : 1;
}

// Where a step's paths go on.
struct Origin {
  int from;
  double distance;
};

// The nodes to be read in one step: those that some of the warps have told. Lane w holds what
// becomes of that of warp w, whether it is read or not.
template <class T, class Graph>
struct Front {
  static_assert(kPathThreads <= 16 * kWarp && Graph::kAtOnce <= 8, "four bits name a warp");
  const Graph& graph;
  const Waiting* of_warps;
  int count = 0;
  unsigned chosen = 0;            // a bit per warp
  unsigned warps = 0;             // four bits for each that is chosen
  int next = 0;                   // this lane's
  typename Graph::Where where{};  // its place
  T base = 0;                     // its distance less its dual, rounded down

  // The least keys, up to kAtOnce of them, which is nearly the order of the distances; keys that
  // differ in their last four bits count as equal. Every warp does the same. False: none is waiting
  // below the bound.
  template <int kAtOnce>
  __device__ bool choose(double bound) {
    const int lane = lane_id();
    Waiting mine{0.0, ~0u, 0};
    if (lane < warp_count()) mine = of_warps[lane];
    // NaN is beyond it too.
    const bool waits =
        lane < warp_count() && static_cast<double>(__uint_as_float(mine.key)) < bound;
    next = waits ? graph.next(mine.node) : 0;
    where = graph.where(next);
    base = waits ? rounded_down(T(), mine.distance - graph.dual_of(next)) : static_cast<T>(0);
    unsigned key = waits ? (mine.key & ~15u) | static_cast<unsigned>(lane) : ~0u;
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      const unsigned least = __reduce_min_sync(kAllLanes, key);
      if (least == ~0u) break;
      if (key == least) key = ~0u;
      chosen |= 1u << (least & 15u);
      warps |= (least & 15u) << 4 * w;
      count = w + 1;
    }
    return count > 0;
  }
  __device__ bool has(int warp) const { return (chosen >> warp & 1u) != 0; }
  __device__ int warp(int w) const { return static_cast<int>(warps >> 4 * w & 15u); }
  // By all lanes of a warp; beyond the last one what some node has.
  __device__ int from(int w) const { return __shfl_sync(kAllLanes, next, warp(w)); }
  __device__ auto place(int w) const { return __shfl_sync(kAllLanes, where, warp(w)); }
  __device__ T base_of(int w) const { return __shfl_sync(kAllLanes, base, warp(w)); }
  // By any.
  __device__ Origin origin(int w) const {
    const Waiting waiting = of_warps[warp(w)];
    return {graph.next(waiting.node), waiting.distance};
  }
};

// The same for the sources of a search, at distance zero.
template <class T, class Graph>
struct SourceFront {
  const Graph& graph;
  const int* sources;
  int count;

  __device__ int from(int w) const { return sources[min(w, count - 1)]; }
  __device__ auto place(int w) const { return graph.where(from(w)); }
  __device__ T base_of(int w) const { return rounded_down(T(), -graph.dual_of(from(w))); }
  __device__ Origin origin(int w) const { return {sources[w], 0.0}; }
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

// A path through a node that was read to this thread's node (g, k), if it is shorter than `bound`;
// returns the end it leads to. It is never shorter than its first part,
// whatever is rounded, so the predecessors never form a circle.
template <class Nodes, class Graph>
__device__ double reach(const Graph& graph, Nodes& nodes, int g, int k, Origin origin,
                        double bound) {
  const State& s = graph.s;
  const int from = origin.from;
  const double start = origin.distance;
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

// Reads the nodes of the front; returns the nearest end that this thread knows.
template <class T, int kGroups, class Graph, class Nearest>
__device__ double read_front(const Graph& graph, Nodes<T, kGroups, Graph::kWidth>& nodes,
                             const Nearest& front, double lowest) {
  constexpr int kWidth = Graph::kWidth, kAtOnce = nodes_at_once<kGroups, Graph>();
  const T sign = graph.costs.sign;
  if constexpr (kGroups == 0) {
    const T base = front.base_of(0);
    const Origin origin = front.origin(0);
    for (int g = 0; g < nodes.groups(); ++g) {
      typename Graph::Four four;
      const auto place = graph.where(origin.from);
      graph.read(place, g, four);
      if constexpr (Graph::kKeeps)
        if (graph.to_be_kept(place)) graph.keep(origin.from, g, four);
      unsigned rest = promising<kWidth>(nodes, g, sign, base, four);
      for (; rest != 0; rest &= rest - 1)
        lowest = lesser(lowest,
                        reach(graph, nodes, g, __ffs(static_cast<int>(rest)) - 1, origin, lowest));
    }
    return lowest;
  } else {
    typename Graph::Four fours[kAtOnce][kGroups];
    typename Graph::Where places[kAtOnce];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      places[w] = front.place(w);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) graph.read(places[w], g, fours[w][g]);
    }
    if constexpr (Graph::kKeeps) {
#pragma unroll
      for (int w = 0; w < kAtOnce; ++w) {
        if (w >= front.count || !graph.to_be_kept(places[w])) continue;
        const int from = front.from(w);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) graph.keep(from, g, fours[w][g]);
      }
    }
    unsigned rest = 0;  // a bit per cost: few, or all of them
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      const T base = front.base_of(w);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const unsigned found = promising<kWidth>(nodes, g, sign, base, fours[w][g]);
        rest |= w < front.count ? found << (kWidth * (w * kGroups + g)) : 0u;
      }
    }
    for (; rest != 0; rest &= rest - 1) {
      const int place = __ffs(static_cast<int>(rest)) - 1, w = place / (kWidth * kGroups);
      lowest = lesser(lowest, reach(graph, nodes, place / kWidth % kGroups, place % kWidth,
                                    front.origin(w), lowest));
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

// Each warp tells the others its nearest node. Returns it in the lane that has it, else -1.
template <class Nodes, class Graph>
__device__ int tell_nearest(const Graph& graph, const Nodes& nodes, Waiting* of_warps) {
  const Waiting mine = nearest_node(graph, nodes);
  const unsigned least = __reduce_min_sync(kAllLanes, mine.key);
  const unsigned votes = __ballot_sync(kAllLanes, mine.key == least);
  if (lane_id() != __ffs(static_cast<int>(votes)) - 1) return -1;
  const double distance = mine.node < graph.count() ? graph.s.reach[mine.node] : infinity();
  of_warps[warp_id()] = {distance, mine.key, mine.node};
  return mine.node;
}

// A node that is read waits no longer; `told` by this lane, or -1.
template <class Nodes, class Graph>
__device__ void stop_waiting(const Graph&, Nodes& nodes, int told) {
  int g = 0, k = 0;
  if (told >= 0 && Graph::owns(told, g, k)) nodes.set_key(g, k, static_cast<float>(infinity()));
}

// Reads the sources; nobody waits for anybody in between.
template <class T, int kGroups, class Graph>
__device__ double read_sources(const Graph& graph, Nodes<T, kGroups, Graph::kWidth>& nodes,
                               const int* sources, int count, double lowest) {
  constexpr int kAtOnce = nodes_at_once<kGroups, Graph>();
  for (int first = 0; first < count; first += kAtOnce) {
    const SourceFront<T, Graph> front{graph, sources + first, min(kAtOnce, count - first)};
    lowest = read_front(graph, nodes, front, lowest);
  }
  return lowest;
}

// Shortest paths from the sources until no path can end below the bound; their lengths are in
// s.reach, the node before each in s.path. One barrier per step.
template <class T, int kGroups, class Graph>
__device__ Found search(const Graph& graph, const int* sources, int count, double bound) {
  using Its = Nodes<T, kGroups, Graph::kWidth>;
  constexpr int kAtOnce = nodes_at_once<kGroups, Graph>();
  SearchSlots& slots = search_slots();
  Its nodes(graph.s, graph.count());
  forget(graph, nodes, bound);
  Found found{-1, bound, count, (count + kAtOnce - 1) / kAtOnce};
  double lowest = read_sources(graph, nodes, sources, count, bound);
  for (int turn = 0;; turn ^= 1) {
    const int told = tell_nearest(graph, nodes, slots.nearest[turn]);
    uint64_t of_warp = ordered(found.bound);
    if (__any_sync(kAllLanes, lowest < found.bound)) of_warp = warp_min(ordered(lowest));
    if (lane_id() == 0) slots.values[turn][warp_id()] = of_warp;
    __syncthreads();
    lowest = from_ordered(
        warp_min(lane_id() < warp_count() ? slots.values[turn][lane_id()] : ~uint64_t{0}));
    const bool nearer = lowest < found.bound;  // in every thread, or in none
    found.bound = lowest;
    Front<T, Graph> front{graph, slots.nearest[turn]};
    if (!front.template choose<kAtOnce>(lowest)) break;
    if (front.has(warp_id())) stop_waiting(graph, nodes, told);
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

template <class T, int kGroups, class Graph>
__device__ PathEnd shortest_path(const Graph& graph, const int* source) {
  const Found found = search<T, kGroups>(graph, source, 1, infinity());
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
