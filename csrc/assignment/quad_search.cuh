// The searches of paths.cuh and reverse.cuh for up to 4 * kPathThreads columns: every thread owns
// four nodes, and what a step needs of them is in registers.
#pragma once

#include "paths.cuh"

namespace croc::gpu {

struct Quad {
  double dual[4];     // -inf for nodes in the tree: nothing improves them any more
  double open[4];     // distance; +inf for nodes in the tree and those not reached
  double settled[4];  // distance of those in the tree
  int from[4];
  unsigned key[4];  // the node; unmatched columns win ties
  unsigned tree;    // a bit per node

  __device__ void clear() {
#pragma unroll
    for (int k = 0; k < 4; ++k) open[k] = infinity(), settled[k] = 0.0, from[k] = -1;
    tree = 0;
  }
  __device__ void improve(int k, double distance, int its_from) {
    if (distance < open[k]) open[k] = distance, from[k] = its_from;
  }
  __device__ void enter(int k) {
    settled[k] = open[k], open[k] = infinity();
    dual[k] = -infinity();
    tree |= 1u << k;
  }
  __device__ void enter_if(unsigned its_key) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (key[k] == its_key) enter(k);
  }
  __device__ Least nearest() const {
    double least = open[0];
    unsigned its = key[0];
#pragma unroll
    for (int k = 1; k < 4; ++k)
      if (open[k] < least || (open[k] == least && key[k] < its)) least = open[k], its = key[k];
    return is_finite(least) ? Least{ordered(least), its} : Least::none();
  }
};

__device__ inline int first_of_quad() { return 4 * static_cast<int>(threadIdx.x); }

// As for Reached: columns as near as the row just scanned, whose own row has the same costs.
__device__ inline bool absorb_twins(const State& s, Quad& quad, double distance, double base,
                                    int twin) {
  bool any = false;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!(quad.key[k] & kMatched) || !(quad.open[k] <= distance)) continue;
    const int owner = s.row_of[first_of_quad() + k];
    if (s.twin[owner] != twin || !(quad.open[k] - s.u[owner] >= base)) continue;
    quad.enter(k);
    any = true;
  }
  return any;
}

// The row that will probably be next: of the nearest column of another warp than this step's.
__device__ inline int likely_next(const State& s, Least of_warp, Least now) {
  const unsigned high =
      of_warp.key == now.key ? ~0u : static_cast<unsigned>(of_warp.value >> 32);
  const unsigned least = __reduce_min_sync(kAllLanes, high);
  const unsigned votes = __ballot_sync(kAllLanes, high == least);
  const unsigned key =
      __shfl_sync(kAllLanes, of_warp.key, __ffs(static_cast<int>(votes)) - 1);
  return least != ~0u && (key & kMatched) ? s.row_of[key & ~kMatched] : -1;
}

template <class T>
__device__ PathEnd shortest_path(const Costs<T>& costs, const State& s, Quad& quad, int source) {
  const int first = first_of_quad();
  quad.clear();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool exists = first + k < costs.m;
    quad.dual[k] = exists ? s.v[first + k] : 0.0;
    const bool matched = exists && s.row_of[first + k] >= 0;
    quad.key[k] = exists ? static_cast<unsigned>(first + k) | (matched ? kMatched : 0u) : ~0u;
  }
  int row = source, ahead = -1;
  T x[4], x_ahead[4];
  costs.four(row, first, x);
  double distance = 0.0;
  PathEnd end{-1, 0.0, 0};
  while (true) {
    const double base = distance - s.u[row];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      quad.improve(k, base + (static_cast<double>(x[k]) - quad.dual[k]), row);
    Least mine = quad.nearest();
    if (mine.key != ~0u && from_ordered(mine.value) <= distance &&
        absorb_twins(s, quad, distance, base, s.twin[row]))
      mine = quad.nearest();
    Least of_warp;
    const Least next = block_least(mine, end.steps++, of_warp);
    if (next.key == ~0u) return end;
    distance = from_ordered(next.value);
    if (!(next.key & kMatched)) {
      end.column = static_cast<int>(next.key), end.distance = distance;
      break;
    }
    quad.enter_if(next.key);
    row = s.row_of[next.key & ~kMatched];
    if (row == ahead) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = x_ahead[k];
    } else {
      costs.four(row, first, x);
    }
    ahead = likely_next(s, of_warp, next);
    if (ahead >= 0) costs.four(ahead, first, x_ahead);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (first + k < costs.m) s.path[first + k] = quad.from[k];
  return end;
}

template <class T>
__device__ void augment(const Costs<T>&, const State& s, Quad& quad, int source, PathEnd end) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!(quad.tree >> k & 1u)) continue;
    const int j = first_of_quad() + k;
    const double shift = end.distance - quad.settled[k];
    s.v[j] -= shift;
    s.u[s.row_of[j]] += shift;
  }
  __syncthreads();
  flip_path(s, source, end);
}

template <class T>
__device__ Release shortest_release(const Costs<T>& costs, const State& s, Quad& quad,
                                    int source) {
  quad.clear();
  const T* rows[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int i = static_cast<int>(k * blockDim.x + threadIdx.x);
    quad.key[k] = i < costs.n ? static_cast<unsigned>(i) : ~0u;
    quad.dual[k] = i < costs.n ? s.u[i] : -infinity();
    rows[k] = costs.base + (i < costs.n ? i : 0) * costs.row_stride;
  }
  Release best{source, -s.v[source], 0};
  int column = source;
  double distance = 0.0;
  while (true) {
    const double base = distance - s.v[column];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (static_cast<int>(k * blockDim.x) >= costs.n) break;
      const T x = costs.sign * __ldg(rows[k] + column * costs.column_stride);
      quad.improve(k, base + (static_cast<double>(x) - quad.dual[k]), column);
    }
    const Least next = block_least(quad.nearest(), best.steps++);
    const double reach = from_ordered(next.value);
    if (next.key == ~0u || !(reach < best.rise)) break;
    distance = reach;
    quad.enter_if(next.key);
    column = s.column_of[next.key];
    if (distance - s.v[column] < best.rise)
      best.rise = distance - s.v[column], best.column = column;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (quad.key[k] != ~0u) s.path[quad.key[k]] = quad.from[k];
  return best;
}

template <class T>
__device__ void release(const Costs<T>&, const State& s, Quad& quad, int source, Release end) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const double shift = end.rise - quad.settled[k];
    if (!(quad.tree >> k & 1u) || !(shift > 0.0)) continue;
    s.u[quad.key[k]] -= shift;
    s.v[s.column_of[quad.key[k]]] += shift;
  }
  __syncthreads();
  flip_release(s, source, end);
}

}  // namespace croc::gpu
