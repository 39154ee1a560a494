// The reverse pass. After the forward phases every row is matched, but a column that nobody took
// may still have a negative dual: it was priced for a demand that did not come. Each such column is
// raised to zero, or takes a row.
#pragma once

#include "paths.cuh"

namespace croc::gpu {

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
  for_stripe(p.costs, stripe_first(), [&](int row, const double (&x)[4]) {
    const double u = p.work.u[row];
#pragma unroll
    for (int k = 0; k < 4; ++k) room[k] = lesser(room[k], x[k] - u);
  });
#pragma unroll
  for (int k = 0; k < 4; ++k) rooms[warp_id()][4 * lane_id() + k] = room[k];
  __syncthreads();
  if (!mine) return;
  double least = infinity();
  for (int w = 0; w < warp_count(); ++w) least = fmin(least, rooms[w][threadIdx.x]);
  p.work.v[column] = fmin(0.0, fmax(p.work.v[column], least));
}

struct Release {
  int column;   // ends with dual zero and without a row
  double rise;  // of the first column's dual
  int steps;
};

// Dijkstra over columns, from one that is unmatched with a negative dual, until no column closer to
// zero can be found.
template <class T, int kGroups>
__device__ Release shortest_release(const Costs<T>& costs, const State& s,
                                    Reached<kGroups>& reached, int source) {
  reached.clear(s, costs.n);
  Release best{source, -s.v[source], 0};
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

// Grid (batch).
template <class T, int kGroups>
__global__ void __launch_bounds__(kMostPathThreads<kGroups>, 1) release_columns(Arguments a) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<T> p(a);
  if (p.failed() || p.n == 0 || !p.scalars().raised) return;
  State s;
  s.carve_for_paths(kGroups > 0 ? shared : p.work.state, a.max_n(), a.max_m(), kGroups == 0);
  load_state(p, s);
  const int count =
      block_collect(p.m, s.waiting, p.m, [&](int j) { return s.row_of[j] < 0 && s.v[j] < 0.0; });
  int steps = 0;
  Reached<kGroups> reached;
  for (int k = 0; k < count; ++k) {
    const int source = s.waiting[k];
    const Release end = shortest_release<T>(p.costs, s, reached, source);
    steps += end.steps;
    release(p.costs, s, reached, source, end);
  }
  store_state(p, s);
  if (threadIdx.x == 0) {
    p.scalars().counters[kColumnScans] = steps;
    p.scalars().counters[kReleased] = count;
  }
}

}  // namespace croc::gpu
