// Shortest augmenting paths (Dijkstra over reduced costs) from the rows that bidding left free. The whole block
// scans one row per step; a step has one barrier and one dependent load from the costs.
#pragma once

#include "auction.cuh"

namespace croc::gpu {

constexpr int kPathThreads = 512;

// Where the search keeps its distances. With kGroups > 0 every thread owns 4 * kGroups nodes, in registers; with 0
// they are in the workspace, whatever their number.
template <int kGroups>
struct Reached {
  static constexpr int kSlots = 4 * kGroups;
  double distance[kSlots];
  int before[kSlots];
  unsigned tree, taken;  // a bit per slot

  __device__ void clear(const State&, int) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) distance[k] = infinity(), before[k] = -1;
    tree = taken = 0;
  }
  // Which columns are matched does not change during a search.
  __device__ void note_matched(const State& s, int slot, int column) {
    if (s.row_of[column] >= 0) taken |= 1u << slot;
  }
  __device__ bool matched(const State&, int slot, int) const { return taken >> slot & 1u; }
  __device__ double get(const State&, int slot, int) const { return distance[slot]; }
  __device__ void set(const State&, int slot, int, double x, int from) {
    distance[slot] = x;
    before[slot] = from;
  }
  __device__ bool in_tree(const State&, int slot, int) const { return tree >> slot & 1u; }
  __device__ void enter(const State& s, int slot, int node) {
    tree |= 1u << slot;
    s.path[node] = before[slot];
  }
};

template <>
struct Reached<0> {
  __device__ void clear(const State& s, int count) {
    for (int j = threadIdx.x; j < count; j += blockDim.x) s.reach[j] = infinity(), s.tree[j] = 0;
    __syncthreads();
  }
  __device__ void note_matched(const State&, int, int) {}
  __device__ bool matched(const State& s, int, int column) const { return s.row_of[column] >= 0; }
  __device__ double get(const State& s, int, int node) const { return s.reach[node]; }
  __device__ void set(const State& s, int, int node, double x, int from) {
    s.reach[node] = x;
    s.path[node] = from;
  }
  __device__ bool in_tree(const State& s, int, int node) const { return s.tree[node] != 0; }
  __device__ void enter(const State& s, int, int node) { s.tree[node] = 1; }
};

// Visits the columns of this thread: visit(slot, first of four columns).
template <int kGroups, class Visit>
__device__ void for_own_fours(int m, Visit visit) {
  if constexpr (kGroups > 0) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int first = 4 * static_cast<int>(g * blockDim.x + threadIdx.x);
      if (first < m) visit(4 * g, first);
    }
  } else {
    for (int first = 4 * threadIdx.x; first < m; first += 4 * blockDim.x) visit(0, first);
  }
}

// Visits the rows of this thread: visit(slot, row).
template <int kGroups, class Visit>
__device__ void for_own_rows(int n, Visit visit) {
  if constexpr (kGroups > 0) {
#pragma unroll
    for (int k = 0; k < 4 * kGroups; ++k) {
      const int i = static_cast<int>(k * blockDim.x + threadIdx.x);
      if (i < n) visit(k, i);
    }
  } else {
    for (int i = threadIdx.x; i < n; i += blockDim.x) visit(0, i);
  }
}

struct PathEnd {
  int column;       // unmatched; -1: no column can be reached
  double distance;  // from the source
  int steps;
};

template <class T, int kGroups>
__device__ PathEnd shortest_path(const Costs<T>& costs, const State& s, Reached<kGroups>& reached,
                                 int source) {
  constexpr unsigned kMatched = 1u << 31;
  reached.clear(s, costs.m);
  for_own_fours<kGroups>(costs.m, [&](int slot, int first) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (first + k < costs.m) reached.note_matched(s, slot + k, first + k);
  });
  int row = source, taken = -1;
  double distance = 0.0;
  for (int step = 0;; ++step) {
    const double base = distance - s.u[row];
    const int twin = s.twin[row];
    double least = infinity();
    unsigned key = ~0u;
    for_own_fours<kGroups>(costs.m, [&](int slot, int first) {
      double x[4];
      costs.four(row, first, x);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int j = first + k;
        if (j >= costs.m) continue;
        if (j == taken) reached.enter(s, slot + k, j);
        if (reached.in_tree(s, slot + k, j)) continue;
        const double through = base + (x[k] - s.v[j]);
        double now = reached.get(s, slot + k, j);
        if (through < now) reached.set(s, slot + k, j, now = through, row);
        if (now > least) continue;
        const bool matched = reached.matched(s, slot + k, j);
        // As near as this row, and its own row has the same costs: scanning that one would reach nothing new.
        if (matched && now <= distance && s.twin[s.row_of[j]] == twin && now - s.u[s.row_of[j]] >= base) {
          reached.enter(s, slot + k, j);
          continue;
        }
        const unsigned mine = static_cast<unsigned>(j) | (matched ? kMatched : 0u);
        if (now < least || mine < key) least = now, key = mine;
      }
    });
    const Least next = block_least({ordered(least), key}, step);
    distance = from_ordered(next.value);
    if (!is_finite(distance)) return {-1, 0.0, step + 1};
    taken = static_cast<int>(next.key & ~kMatched);
    if (!(next.key & kMatched)) return {taken, distance, step + 1};
    row = s.row_of[taken];
  }
}

// Moves the duals along the tree, then the matching along the path.
template <class T, int kGroups>
__device__ void augment(const Costs<T>& costs, const State& s, Reached<kGroups>& reached, int source,
                        PathEnd end) {
  for_own_fours<kGroups>(costs.m, [&](int slot, int first) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int j = first + k;
      if (j >= costs.m) continue;
      if (reached.in_tree(s, slot + k, j)) {
        const double shift = end.distance - reached.get(s, slot + k, j);
        s.v[j] -= shift;
        s.u[s.row_of[j]] += shift;
      }
      if (j == end.column) reached.enter(s, slot + k, j);
    }
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    s.u[source] += end.distance;
    int column = end.column, row;
    do {
      row = s.path[column];
      const int next = s.column_of[row];
      s.row_of[column] = row;
      s.column_of[row] = column;
      column = next;
    } while (row != source);
  }
  __syncthreads();
}

// Grid (batch): bidding, then one shortest path per row still free.
template <class T, int kGroups>
__global__ void __launch_bounds__(kPathThreads, 1) match_rows(Arguments a) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<T> p(a);
  if (p.failed() || p.n == 0) return;
  State s;
  s.carve(kGroups > 0 ? shared : p.work.state, a.max_n(), a.max_m(), kGroups == 0);
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) s.v[j] = p.work.v[j];
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    s.u[i] = p.work.u[i];
    s.column_of[i] = p.work.column_of[i];
    s.twin[i] = p.work.twin[i];
  }
  __syncthreads();
  match_nearest(s, p.n, p.m);
  int counters[kCounters] = {};
  const int num_free = bid_all(p.costs, s, p.scalars(), counters);
  counters[kFreeRows] = num_free;
  settle_rows(p.costs, s, num_free);
  Reached<kGroups> reached;
  for (int k = 0; k < num_free; ++k) {
    const int source = s.list[k];
    const PathEnd end = shortest_path<T>(p.costs, s, reached, source);
    counters[kRowScans] += end.steps;
    if (end.column < 0) {
      if (threadIdx.x == 0) p.scalars().status = kInfeasible;
      return;
    }
    augment(p.costs, s, reached, source, end);
  }
  int raised = 0;
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
    p.work.v[j] = s.v[j];
    p.work.row_of[j] = s.row_of[j];
    raised |= s.row_of[j] < 0 && s.v[j] < 0.0;
  }
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    p.work.u[i] = s.u[i];
    p.work.column_of[i] = s.column_of[i];
  }
  raised = __syncthreads_or(raised);
  if (threadIdx.x == 0) {
    p.scalars().raised = raised;
    for (int c = 0; c < kCounters; ++c) p.scalars().counters[c] = counters[c];
  }
}

}  // namespace croc::gpu
