// What a search (search.cuh) walks: the nodes that a thread owns, and the two graphs of a problem.
#pragma once

#include "paths.cuh"

namespace croc::gpu {

constexpr int kPathThreads = 512;

// Nodes read per step, where a thread keeps its own in registers and there are no more than four.
// Searches among many rows read hundreds of them; with fewer rows eight lost to four.
constexpr int kFront = 4, kWideFront = 8;
template <int kGroups>
constexpr int kWide = kGroups == 1 ? kWideFront : kFront;

// A thread's nodes, kGroups times kWidth of them, of each a limit and a key. A node comes nearer
// only where base + cost, rounded down, is not above its limit. The key is a lower bound of its
// distance while it waits to be read, else +inf.
template <class T, int kGroups, int kWidth>
struct Nodes {
  T limits[kGroups][kWidth];
  float keys[kGroups][kWidth];

  __device__ Nodes(const State&, int) {}
  __device__ static constexpr int groups() { return kGroups; }
  __device__ T limit(int g, int k) const { return limits[g][k]; }
  __device__ float key(int g, int k) const { return keys[g][k]; }
  __device__ void set_limit(int g, int k, double x) { set(limits, g, k, rounded_up(T(), x)); }
  __device__ void set_key(int g, int k, float x) { set(keys, g, k, x); }

 private:
  // Registers have no index: every entry is written, all but one with itself.
  template <class Value>
  __device__ static void set(Value (&values)[kGroups][kWidth], int g, int k, Value x) {
#pragma unroll
    for (int i = 0; i < kWidth * kGroups; ++i)
      values[i / kWidth][i % kWidth] = i == kWidth * g + k ? x : values[i / kWidth][i % kWidth];
  }
};

// Any number of them, in the workspace.
template <class T>
struct Nodes<T, 0, 4> {
  T* limits;
  float* keys;
  int its_groups;

  __device__ Nodes(const State& s, int count)
      : limits(static_cast<T*>(s.limit)),
        keys(s.key),
        its_groups((count + 4 * blockDim.x - 1) / (4 * blockDim.x)) {}
  __device__ int groups() const { return its_groups; }
  __device__ static int place(int g, int k) { return 4 * (g * blockDim.x + threadIdx.x) + k; }
  __device__ T limit(int g, int k) const { return limits[place(g, k)]; }
  __device__ float key(int g, int k) const { return keys[place(g, k)]; }
  __device__ void set_limit(int g, int k, double x) { limits[place(g, k)] = rounded_up(T(), x); }
  __device__ void set_key(int g, int k, float x) { keys[place(g, k)] = x; }
};

// What a thread reads of a node: the costs to four of its own. Their sign is applied later: with
// the load it would wait for it, and the next load for that.
template <class T>
struct FourCosts {
  T x[4] = {};
  __device__ T sum(T sign, int k, T base) const { return sum_down(sign, x[k], base); }
};

// The same at 8 bits, see levels.cuh: sums are lower bounds.
template <class T>
struct FourLevels {
  unsigned word = 0;
  T low = 0, step = 0;
  __device__ T sum(T, int k, T base) const {
    const T end = sum_down(static_cast<T>(number_of(level_in(word, k))), step, low);
    return sum_down(static_cast<T>(1), end, base);
  }
};

// Blocks have a power of two of threads.
__device__ inline int log2_of(unsigned power) { return 31 - __clz(static_cast<int>(power)); }

// Where threads own four nodes that lie together: whether this one is the thread's, its group and
// place.
__device__ inline bool owns_fours(int node, int& g, int& k) {
  const unsigned ahead = static_cast<unsigned>(node) - 4 * threadIdx.x, round = 4 * blockDim.x;
  g = static_cast<int>(ahead >> log2_of(round)), k = node % 4;
  return (ahead & (round - 1)) < 4;
}

// From a row to the columns; a matched column leads to its row. A path may end at an unmatched one.
template <class T, bool kVectors, int kNodesAtOnce = kFront>
struct RowGraph {
  using Four = FourCosts<T>;
  static constexpr int kWidth = 4, kAtOnce = kNodesAtOnce;
  static constexpr bool kKeeps = false;
  const Costs<T>& costs;
  const State& s;

  __device__ int count() const { return costs.m; }
  __device__ static int node(int g, int k) {
    return 4 * static_cast<int>(g * blockDim.x + threadIdx.x) + k;
  }
  __device__ static bool owns(int node, int& g, int& k) { return owns_fours(node, g, k); }
  __device__ int next(int node) const { return s.row_of[node]; }
  __device__ double dual_of(int row) const { return s.u[row]; }
  __device__ double dual(int node) const { return s.v[node]; }
  __device__ double relief(int node) const { return s.row_of[node] < 0 ? 0.0 : infinity(); }
  __device__ double cost(int row, int node) const { return costs.at(row, node); }
  using Where = int64_t;  // a row's place among the costs
  __device__ Where where(int row) const { return row * costs.row_stride; }
  // Threads beyond the last column read others' again: without a branch all loads go together.
  __device__ void read(Where row, int g, Four& four) const {
    if (kVectors)
      Costs<T>::load_vector(costs.base + row + min(node(g, 0), costs.m - 4), four.x);
    else
      costs.load_each(costs.base + row, node(g, 0), four.x);
  }

  // Whether to read the node later would reach nothing new: it leads nowhere, or to a row with the
  // same costs as the one just read and no nearer.
  __device__ bool leads_nowhere(int node, double distance, int row, double base) const {
    const int owner = s.row_of[node];
    return owner < 0 || (s.twin[owner] == s.twin[row] && distance - s.u[owner] >= base);
  }
};

// From a column to the rows, each of which leads to its column, whose dual may end the rise.
// kNodes of a thread's four can exist: 1 if there are no more rows than threads.
template <class T, int kNodes>
struct ColumnGraph {
  using Four = FourCosts<T>;
  static constexpr int kWidth = kNodes, kAtOnce = kFront;
  static constexpr bool kKeeps = true;
  const Costs<T>& costs;
  const State& s;
  T* copies;

  __device__ int count() const { return costs.n; }
  __device__ static int node(int g, int k) {
    return (4 * g + k) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  __device__ static bool owns(int node, int& g, int& k) {
    const unsigned ahead = static_cast<unsigned>(node) - threadIdx.x;
    const unsigned slot = ahead >> log2_of(blockDim.x);
    g = static_cast<int>(slot / 4), k = static_cast<int>(slot % 4);
    return (ahead & (blockDim.x - 1)) == 0;
  }
  __device__ int next(int node) const { return s.column_of[node]; }
  __device__ double dual_of(int column) const { return s.v[column]; }
  __device__ double dual(int node) const { return s.u[node]; }
  __device__ double relief(int node) const { return -s.v[s.column_of[node]]; }
  __device__ double cost(int column, int node) const {
    if constexpr (kWidth > 1) return costs.at(node, column);
    const Column<T> entries(costs, s, copies, column);  // where it has just been read
    return static_cast<double>(costs.sign * entries.from[node * entries.stride]);
  }
  // The address of a column's first entry, and in bits that are zero there whether its entries lie
  // side by side, and whether they have to be kept.
  using Where = int64_t;
  static constexpr Where kSideBySide = 1, kToBeKept = 2;
  __device__ Where where(int column) const {
    const Column<T> entries(costs, s, copies, column);
    return reinterpret_cast<Where>(entries.from) | (entries.stride == 1 ? kSideBySide : 0) |
           (entries.to != nullptr ? kToBeKept : 0);
  }
  // Threads beyond the last row read its entry: without a branch all loads go together.
  __device__ void read(Where column, int g, Four& four) const {
    const T* from = reinterpret_cast<const T*>(column & ~(kSideBySide | kToBeKept));
    const int64_t stride = (column & kSideBySide) != 0 ? 1 : costs.row_stride;
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      four.x[k] = load_cached(from + min(node(g, k), costs.n - 1) * stride);
  }
  __device__ static bool to_be_kept(Where column) { return (column & kToBeKept) != 0; }
  // What has been read, once all of a step has been: a load waits for the stores before it.
  __device__ void keep(int column, int g, const Four& four) const {
    const Column<T> entries(costs, s, copies, column);
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (node(g, k) < costs.n) entries.to[node(g, k)] = four.x[k];
    if (g == 0) remember(column);
  }
  // Columns that this search has kept: their number, then as many of them as fit.
  __device__ void remember(int column) const {
    if (threadIdx.x == 0 && s.target[0] + 1 < costs.n) s.target[++s.target[0]] = column;
  }
  __device__ bool leads_nowhere(int, double, int, double) const { return false; }
};

// The same, read from the columns' levels: four rows lie together.
template <class T>
struct LevelGraph : ColumnGraph<T, 4> {
  using Four = FourLevels<T>;
  static constexpr int kAtOnce = kWideFront;
  static constexpr bool kKeeps = false;
  Levels<T> levels;

  __device__ static int node(int g, int k) {
    return 4 * static_cast<int>(g * blockDim.x + threadIdx.x) + k;
  }
  __device__ static bool owns(int node, int& g, int& k) { return owns_fours(node, g, k); }
  using Where = int;
  __device__ Where where(int column) const { return column; }
  // As above; a column's levels go on to a multiple of more than four rows.
  __device__ void read(int column, int g, Four& four) const {
    const int first = min(node(g, 0), (this->costs.n - 1) / 4 * 4);
    four.word = load_cached(reinterpret_cast<const unsigned*>(levels.column(column) + first));
    four.low = load_cached(levels.low + column), four.step = load_cached(levels.step + column);
  }
};

}  // namespace croc::gpu
