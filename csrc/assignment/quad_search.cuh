// The searches of paths.cuh for up to 4 * kPathThreads columns: every thread owns four nodes, whose
// state is in registers, and the block reads up to kAtOnce nodes per step.
//
// Dijkstra's algorithm reads the nearest node only. Here the next nearest are read with it, each the
// nearest of its warp; one whose distance falls later is read again. Distances only fall, and the
// nearest of all is final, so it ends with the same distances after at most as many steps, and in
// practice after a third or a quarter of them.
#pragma once

#include "paths.cuh"

namespace croc::gpu {

constexpr int kAtOnce = 4;  // counts of docs/assignment_cuda.md

struct Quad {
  double dual[4];
  double distance[4];
  double relief[4];  // a search may end here at distance + relief
  int from[4];
  unsigned through;  // a bit per node: it leads to further nodes
  unsigned waiting;  // and it has come nearer since it was read

  __device__ void clear() {
#pragma unroll
    for (int k = 0; k < 4; ++k) distance[k] = infinity(), from[k] = -1;
    through = waiting = 0;
  }

  // Paths through `its_from`, which is at distance `start`; returns the nearest end among them. None
  // is shorter than its first part, whatever is rounded: the predecessors never form a circle.
  template <class T>
  __device__ double reach(double start, double base, const T (&x)[4], int its_from) {
    double end = infinity();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      double through_it = base + (static_cast<double>(x[k]) - dual[k]);
      through_it = through_it < start ? start : through_it;
      if (!(through_it < distance[k])) continue;
      distance[k] = through_it, from[k] = its_from;
      waiting |= through & (1u << k);
      end = lesser(end, through_it + relief[k]);
    }
    return end;
  }

  template <class Graph>
  __device__ Least nearest(const Graph& graph) const {
    double least = infinity();
    int its = -1;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if ((waiting >> k & 1u) && distance[k] < least) least = distance[k], its = k;
    return its < 0 ? Least::none() : Least{ordered(least), graph.node(its)};
  }
};

// From a row to the columns; a matched column leads to its row.
template <class T>
struct RowGraph {
  const Costs<T>& costs;
  const State& s;

  __device__ unsigned node(int k) const { return 4 * threadIdx.x + k; }
  __device__ static int slot(unsigned node) {
    return node / 4 == threadIdx.x ? static_cast<int>(node % 4) : -1;
  }
  __device__ int next(unsigned node) const { return s.row_of[node]; }
  __device__ double dual_of(int row) const { return s.u[row]; }
  __device__ void read(int row, T (&x)[4]) const { costs.four(row, 4 * threadIdx.x, x); }

  // Columns as near as a row just read, whose own row has the same costs and no smaller dual: to
  // read that row would reach nothing new.
  __device__ void skip_twins(Quad& quad, int row, double distance, double base) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!(quad.waiting >> k & 1u) || quad.distance[k] != distance) continue;
      const int owner = s.row_of[node(k)];
      if (s.twin[owner] == s.twin[row] && quad.distance[k] - s.u[owner] >= base)
        quad.waiting &= ~(1u << k);
    }
  }
};

// From a column to the rows, each of which leads to its column.
template <class T>
struct ColumnGraph {
  const Costs<T>& costs;
  const State& s;

  __device__ unsigned node(int k) const { return k * blockDim.x + threadIdx.x; }
  __device__ static int slot(unsigned node) {
    return node % blockDim.x == threadIdx.x ? static_cast<int>(node / blockDim.x) : -1;
  }
  __device__ int next(unsigned node) const { return s.column_of[node]; }
  __device__ double dual_of(int column) const { return s.v[column]; }
  __device__ void read(int column, T (&x)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = static_cast<int>(node(k));
      x[k] = row < costs.n ? costs.sign * __ldg(costs.base + row * costs.row_stride +
                                                column * costs.column_stride)
                           : static_cast<T>(infinity());
    }
  }
  __device__ void skip_twins(Quad&, int, double, double) const {}
};

struct Found {
  int node;      // where the nearest path ends, -1: nowhere nearer than the bound given
  double bound;  // its length, or the bound given
  int reads, steps;
};

// Nodes to be read in one step.
struct Front {
  int count;
  int from[kAtOnce];
  double distance[kAtOnce];
};

// The nearest of all warps' nearest, and up to kAtOnce - 1 others: by the upper half of their
// distances, which need not be the right order. Every warp does the same. False: none is waiting.
template <class Graph>
__device__ bool choose_front(const Graph& graph, Quad& quad, const Least* of_warps, double bound,
                             Front& front) {
  Least mine = lane_id() < warp_count() ? of_warps[lane_id()] : Least::none();
  if (!(mine.value < ordered(bound))) mine = Least::none();
  const Least first = warp_least(mine);
  if (first.key == ~0u) return false;
  int lanes[kAtOnce];
  lanes[0] = __ffs(static_cast<int>(__ballot_sync(kAllLanes, mine.key == first.key))) - 1;
  unsigned high = mine.key == first.key ? ~0u : static_cast<unsigned>(mine.value >> 32);
  front.count = 1;
#pragma unroll
  for (int w = 1; w < kAtOnce; ++w) {
    const unsigned least = __reduce_min_sync(kAllLanes, high);
    if (least == ~0u) break;
    lanes[w] = __ffs(static_cast<int>(__ballot_sync(kAllLanes, high == least))) - 1;
    if (lane_id() == lanes[w]) high = ~0u;
    front.count = w + 1;
  }
#pragma unroll
  for (int w = 0; w < kAtOnce; ++w) {
    if (w >= front.count) break;
    const Least chosen = of_warps[lanes[w]];
    const int slot = Graph::slot(chosen.key);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (slot == k) quad.waiting &= ~(1u << k);
    front.from[w] = graph.next(chosen.key);
    front.distance[w] = from_ordered(chosen.value);
  }
  return true;
}

// Shortest paths from `source` until no path can end below the bound. One barrier per step.
template <class T, class Graph>
__device__ Found search(const Graph& graph, Quad& quad, int source, double bound) {
  __shared__ Least nearest[2][kWarp];
  __shared__ uint64_t bounds[2][kWarp];
  Found found{-1, bound, 0, 0};
  Front front;
  front.count = 1, front.from[0] = source, front.distance[0] = 0.0;
  do {
    T x[kAtOnce][4];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w)
      if (w < front.count) graph.read(front.from[w], x[w]);
    double lowest = found.bound;
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      if (w >= front.count) break;
      const double start = front.distance[w], base = start - graph.dual_of(front.from[w]);
      lowest = lesser(lowest, quad.reach(start, base, x[w], front.from[w]));
    }
    Least mine = quad.nearest(graph);
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      if (w >= front.count) break;
      const double start = front.distance[w];
      if (mine.value != ordered(start)) continue;
      graph.skip_twins(quad, front.from[w], start, start - graph.dual_of(front.from[w]));
      mine = quad.nearest(graph);
    }
    const Least of_warp = warp_least(mine);
    uint64_t of_warp_bound = ordered(found.bound);
    if (__any_sync(kAllLanes, lowest < found.bound)) of_warp_bound = warp_min(ordered(lowest));
    const int turn = found.steps & 1;
    if (lane_id() == 0) nearest[turn][warp_id()] = of_warp, bounds[turn][warp_id()] = of_warp_bound;
    found.reads += front.count;
    ++found.steps;
    __syncthreads();
    found.bound = from_ordered(
        warp_min(lane_id() < warp_count() ? bounds[turn][lane_id()] : ~uint64_t{0}));
    if (!choose_front(graph, quad, nearest[turn], found.bound, front)) break;
  } while (true);
  Least end = Least::none();
  if (found.bound < bound) {
#pragma unroll
    for (int k = 3; k >= 0; --k)
      if (quad.distance[k] + quad.relief[k] == found.bound) end = {0, graph.node(k)};
  }
  found.node = static_cast<int>(block_least(end, 0).key);
  return found;
}

template <class T>
__device__ PathEnd shortest_path(const Costs<T>& costs, const State& s, Quad& quad, int source) {
  const RowGraph<T> graph{costs, s};
  quad.clear();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int column = static_cast<int>(graph.node(k));
    const bool exists = column < costs.m, matched = exists && s.row_of[column] >= 0;
    quad.dual[k] = exists ? s.v[column] : 0.0;
    quad.relief[k] = matched ? infinity() : 0.0;
    quad.through |= (matched ? 1u : 0u) << k;
  }
  const Found found = search<T>(graph, quad, source, infinity());
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (static_cast<int>(graph.node(k)) < costs.m) s.path[graph.node(k)] = quad.from[k];
  return {found.node, found.bound, found.reads, found.steps};
}

template <class T>
__device__ void augment(const Costs<T>&, const State& s, Quad& quad, int source, PathEnd end) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const double shift = end.distance - quad.distance[k];
    if (!(quad.through >> k & 1u) || !(shift > 0.0)) continue;
    const int j = static_cast<int>(4 * threadIdx.x) + k;
    s.v[j] -= shift;
    s.u[s.row_of[j]] += shift;
  }
  __syncthreads();
  flip_path(s, source, end);
}

template <class T>
__device__ Release shortest_release(const Costs<T>& costs, const State& s, Quad& quad,
                                    int source) {
  const ColumnGraph<T> graph{costs, s};
  quad.clear();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int row = static_cast<int>(graph.node(k));
    const bool exists = row < costs.n;
    quad.dual[k] = exists ? s.u[row] : 0.0;
    quad.relief[k] = exists ? -s.v[s.column_of[row]] : infinity();
    quad.through |= (exists ? 1u : 0u) << k;
  }
  const Found found = search<T>(graph, quad, source, -s.v[source]);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (static_cast<int>(graph.node(k)) < costs.n) s.path[graph.node(k)] = quad.from[k];
  const int column = found.node < 0 ? source : s.column_of[found.node];
  return {column, found.bound, found.reads, found.steps};
}

template <class T>
__device__ void release(const Costs<T>&, const State& s, Quad& quad, int source, Release end) {
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const double shift = end.rise - quad.distance[k];
    if (!(quad.through >> k & 1u) || !(shift > 0.0)) continue;
    const int row = k * threads + static_cast<int>(threadIdx.x);
    s.u[row] -= shift;
    s.v[s.column_of[row]] += shift;
  }
  __syncthreads();
  flip_release(s, source, end);
}

}  // namespace croc::gpu
