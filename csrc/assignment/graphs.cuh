// What a search (search.cuh) walks: the nodes that a thread owns, and the two graphs of a problem.
#pragma once

#include "paths.cuh"

namespace croc::gpu {

__device__ inline float rounded_down(float, double x) { return __double2float_rd(x); }
__device__ inline double rounded_down(double, double x) { return x; }
__device__ inline float rounded_up(float, double x) { return __double2float_ru(x); }
__device__ inline double rounded_up(double, double x) { return x; }
__device__ inline float sum_down(float sign, float x, float y) { return __fmaf_rd(sign, x, y); }
__device__ inline double sum_down(double sign, double x, double y) { return __fma_rd(sign, x, y); }

// A thread's nodes, kGroups fours of them, of each a limit and a key. A node comes nearer only
// where base + cost, rounded down, is not above its limit. The key is a lower bound of its distance
// while it waits to be read, else +inf.
template <class T, int kGroups>
struct Nodes {
  static constexpr int kAtOnce = kGroups == 1 ? 4 : 1;  // nodes read per step: registers
  T limits[kGroups][4];
  float keys[kGroups][4];

  __device__ Nodes(const State&, int) {}
  __device__ static constexpr int groups() { return kGroups; }
  __device__ T limit(int g, int k) const { return limits[g][k]; }
  __device__ float key(int g, int k) const { return keys[g][k]; }
  __device__ void set_limit(int g, int k, double x) { set(limits, g, k, rounded_up(T(), x)); }
  __device__ void set_key(int g, int k, float x) { set(keys, g, k, x); }

 private:
  // Registers have no index: every entry is written, all but one with itself.
  template <class Value>
  __device__ static void set(Value (&values)[kGroups][4], int g, int k, Value x) {
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i)
      values[i / 4][i % 4] = i == 4 * g + k ? x : values[i / 4][i % 4];
  }
};

// Any number of them, in the workspace.
template <class T>
struct Nodes<T, 0> {
  static constexpr int kAtOnce = 1;
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

// Blocks have a power of two of threads.
__device__ inline int log2_of(unsigned power) { return 31 - __clz(static_cast<int>(power)); }

// From a row to the columns; a matched column leads to its row. A path may end at an unmatched one.
template <class T, bool kVectors>
struct RowGraph {
  const Costs<T>& costs;
  const State& s;

  __device__ int count() const { return costs.m; }
  __device__ static int node(int g, int k) {
    return 4 * static_cast<int>(g * blockDim.x + threadIdx.x) + k;
  }
  // The group and place of a node if it is this thread's.
  __device__ static bool owns(int node, int& g, int& k) {
    const unsigned ahead = static_cast<unsigned>(node) - 4 * threadIdx.x, round = 4 * blockDim.x;
    g = static_cast<int>(ahead >> log2_of(round)), k = node % 4;
    return (ahead & (round - 1)) < 4;
  }
  __device__ int next(int node) const { return s.row_of[node]; }
  __device__ double dual_of(int row) const { return s.u[row]; }
  __device__ double dual(int node) const { return s.v[node]; }
  __device__ double relief(int node) const { return s.row_of[node] < 0 ? 0.0 : infinity(); }
  __device__ double cost(int row, int node) const { return costs.at(row, node); }
  __device__ void read(int row, int g, T (&x)[4]) const {
    const T* p = costs.base + row * costs.row_stride;
    const int first = node(g, 0);
    if (!kVectors)
      costs.load_each(p, first, x);
    else if (first < costs.m)
      Costs<T>::load_vector(p + first, x);
  }
  __device__ void keep(int, int, const T (&)[4]) const {}

  // Whether to read the node later would reach nothing new: it leads nowhere, or to a row with the
  // same costs as the one just read and no nearer.
  __device__ bool leads_nowhere(int node, double distance, int row, double base) const {
    const int owner = s.row_of[node];
    return owner < 0 || (s.twin[owner] == s.twin[row] && distance - s.u[owner] >= base);
  }
};

// From a column to the rows, each of which leads to its column, whose dual may end the rise.
template <class T>
struct ColumnGraph {
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
  __device__ double cost(int column, int node) const { return costs.at(node, column); }
  __device__ void read(int column, int g, T (&x)[4]) const {
    const Column<T> entries(costs, s, copies, column);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (node(g, k) < costs.n) x[k] = entries.from[node(g, k) * entries.stride];
  }
  // What has been read, once all of a step has been: a load waits for the stores before it.
  __device__ void keep(int column, int g, const T (&x)[4]) const {
    const Column<T> entries(costs, s, copies, column);
    if (entries.to == nullptr) return;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (node(g, k) < costs.n) entries.to[node(g, k)] = x[k];
    if (g == 0) remember(column);
  }
  // Columns that this search has kept: their number, then as many of them as fit.
  __device__ void remember(int column) const {
    if (threadIdx.x == 0 && s.target[0] + 1 < costs.n) s.target[++s.target[0]] = column;
  }
  __device__ bool leads_nowhere(int, double, int, double) const { return false; }
};

}  // namespace croc::gpu
