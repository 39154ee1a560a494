// Shortest augmenting paths (Dijkstra over reduced costs) from the rows that bidding left free. The
// whole block scans one row per step; a step has one barrier and one dependent load from the costs.
#pragma once

#include "auction.cuh"

namespace croc::gpu {

constexpr int kPathThreads = 512;

// Where the search keeps its distances. With kGroups > 0 every thread owns 4 * kGroups nodes, in
// registers; with 0 they are in the workspace, whatever their number. Predecessors are always in
// s.path: they are written, not read.
template <int kGroups>
struct Reached {
  static constexpr int kSlots = 4 * kGroups;
  double distance[kSlots];
  unsigned tree, taken;  // a bit per slot

  __device__ void clear(const State&, int) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) distance[k] = infinity();
    tree = taken = 0;
  }
  // Which columns are matched does not change during a search.
  __device__ void note_matched(const State& s, int slot, int column) {
    if (s.row_of[column] >= 0) taken |= 1u << slot;
  }
  __device__ bool matched(const State&, int slot, int) const { return taken >> slot & 1u; }
  __device__ bool in_tree(const State&, int slot, int) const { return tree >> slot & 1u; }
  __device__ void enter(const State&, int slot, int) { tree |= 1u << slot; }
  __device__ double get(const State&, int slot, int) const { return distance[slot]; }
  __device__ double open(const State&, int slot, int) const {
    return tree >> slot & 1u ? infinity() : distance[slot];
  }
  __device__ void improve(const State& s, int slot, int node, double x, int from) {
    if (!(x < distance[slot]) || (tree >> slot & 1u)) return;
    distance[slot] = x;
    s.path[node] = from;
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
  __device__ bool in_tree(const State& s, int, int node) const { return s.tree[node] != 0; }
  __device__ void enter(const State& s, int, int node) { s.tree[node] = 1; }
  __device__ double get(const State& s, int, int node) const { return s.reach[node]; }
  __device__ double open(const State& s, int, int node) const {
    return s.tree[node] != 0 ? infinity() : s.reach[node];
  }
  __device__ void improve(const State& s, int, int node, double x, int from) {
    if (!(x < s.reach[node]) || s.tree[node] != 0) return;
    s.reach[node] = x;
    s.path[node] = from;
  }
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
  int reads, steps;  // rows read, in how many steps
};

// The matching along the path, once the duals of the tree have moved.
__device__ inline void flip_path(const State& s, int source, PathEnd end) {
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

struct Release {
  int column;   // ends with dual zero and without a row
  double rise;  // of the first column's dual
  int reads, steps;
};

// The same for a column that is released.
__device__ inline void flip_release(const State& s, int source, Release end) {
  if (threadIdx.x == 0) {
    s.v[source] += end.rise;
    s.v[end.column] = 0.0;
    if (end.column != source) {
      int row = s.row_of[end.column], column;
      s.row_of[end.column] = -1;
      do {
        column = s.path[row];
        const int next = s.row_of[column];
        s.row_of[column] = row;
        s.column_of[row] = column;
        row = next;
      } while (column != source);
    }
  }
  __syncthreads();
}

// Columns as near as the row just scanned, whose own row has the same costs, join the tree at once:
// scanning that row would reach nothing new. Returns whether there were any among these four.
template <int kGroups>
__device__ bool absorb_twins(const State& s, Reached<kGroups>& reached, int slot, int first, int m,
                             double distance, double base, int twin) {
  bool any = false;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int j = first + k;
    if (j >= m || !reached.matched(s, slot + k, j)) continue;
    const double now = reached.open(s, slot + k, j);
    if (!(now <= distance)) continue;
    const int owner = s.row_of[j];
    if (s.twin[owner] != twin || !(now - s.u[owner] >= base)) continue;
    reached.enter(s, slot + k, j);
    any = true;
  }
  return any;
}

template <class T, int kGroups>
__device__ PathEnd shortest_path(const Costs<T>& costs, const State& s, Reached<kGroups>& reached,
                                 int source) {
  reached.clear(s, costs.m);
  for_own_fours<kGroups>(costs.m, [&](int slot, int first) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (first + k < costs.m) reached.note_matched(s, slot + k, first + k);
  });
  int row = source;
  double distance = 0.0;
  for (int step = 0;; ++step) {
    const double base = distance - s.u[row];
    const int twin = s.twin[row];
    double least = infinity();
    unsigned key = ~0u;
    for_own_fours<kGroups>(costs.m, [&](int slot, int first) {
      double x[4], v[4];
      costs.four(row, first, x);
      four(s.v, first, v);
      double nearest = infinity();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // Beyond the last column x is +inf, which improves nothing.
        reached.improve(s, slot + k, first + k, base + (x[k] - v[k]), row);
        if (first + k < costs.m) nearest = lesser(nearest, reached.open(s, slot + k, first + k));
      }
      if (nearest <= distance &&
          absorb_twins(s, reached, slot, first, costs.m, distance, base, twin))
        nearest = distance;  // no longer known; at least that
      if (nearest > least) return;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (first + k >= costs.m) continue;
        const double now = reached.open(s, slot + k, first + k);
        const unsigned mine = static_cast<unsigned>(first + k) |
                              (reached.matched(s, slot + k, first + k) ? kMatched : 0u);
        if (now < least || (now == least && mine < key)) least = now, key = mine;
      }
    });
    const Least next = block_least({ordered(least), key}, step);
    distance = from_ordered(next.value);
    if (!is_finite(distance)) return {-1, 0.0, step + 1, step + 1};
    const int taken = static_cast<int>(next.key & ~kMatched);
    if (!(next.key & kMatched)) return {taken, distance, step + 1, step + 1};
    for_own_fours<kGroups>(costs.m, [&](int slot, int first) {
      if (first == (taken & ~3)) reached.enter(s, slot + (taken & 3), taken);
    });
    row = s.row_of[taken];
  }
}

// Moves the duals along the tree, then the matching along the path.
template <class T, int kGroups>
__device__ void augment(const Costs<T>& costs, const State& s, Reached<kGroups>& reached,
                        int source, PathEnd end) {
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
    }
  });
  __syncthreads();
  flip_path(s, source, end);
}

// Dijkstra over columns, from one that is unmatched with a negative dual, until no column closer to
// zero can be found.
template <class T, int kGroups>
__device__ Release shortest_release(const Costs<T>& costs, const State& s,
                                    Reached<kGroups>& reached, int source) {
  reached.clear(s, costs.n);
  Release best{source, -s.v[source], 0, 0};
  int column = source;
  double distance = 0.0;
  while (true) {
    const double base = distance - s.v[column];
    double least = infinity();
    unsigned key = ~0u;
    for_own_rows<kGroups>(costs.n, [&](int slot, int i) {
      const double through = base + (costs.at(i, column) - s.u[i]);
      reached.improve(s, slot, i, through, column);
      const double now = reached.open(s, slot, i);
      if (now < least) least = now, key = static_cast<unsigned>(i);
    });
    const Least next = block_least({ordered(least), key}, best.steps++);
    best.reads = best.steps;
    const double reach = from_ordered(next.value);
    if (next.key == ~0u || !(reach < best.rise)) return best;
    distance = reach;
    const int row = static_cast<int>(next.key);
    for_own_rows<kGroups>(costs.n, [&](int slot, int i) {
      if (i == row) reached.enter(s, slot, i);
    });
    column = s.column_of[row];
    if (distance - s.v[column] < best.rise)
      best.rise = distance - s.v[column], best.column = column;
  }
}

template <class T, int kGroups>
__device__ void release(const Costs<T>& costs, const State& s, Reached<kGroups>& reached,
                        int source, Release end) {
  for_own_rows<kGroups>(costs.n, [&](int slot, int i) {
    const double shift = end.rise - reached.get(s, slot, i);
    if (!reached.in_tree(s, slot, i) || !(shift > 0.0)) return;
    s.u[i] -= shift;
    s.v[s.column_of[i]] += shift;
  });
  __syncthreads();
  flip_release(s, source, end);
}

}  // namespace croc::gpu
