// What a column offers: its nearest row and how near the second one is, from its costs, a copy of
// them, or its levels.
#pragma once

#include "columns.cuh"
#include "levels.cuh"

namespace croc::gpu {

// (n) row duals rounded down, where columns have levels: there are no copies then, and the memory
// of their slots is free.
__device__ inline float* low_duals(const State& s) { return reinterpret_cast<float*>(s.slot); }

struct Offer {
  double least, second;  // the two smallest reduced costs of the column
  int row;
};

// The least and second least of both, given what the rows of this warp's lanes offer.
__device__ inline Offer warp_offer(double least, double second, unsigned key) {
  const Least found = warp_least({ordered(least), key});
  const bool winner = found.key == key && found.value == ordered(least);
  const uint64_t runner_up = warp_min(ordered(winner ? second : least));
  return {from_ordered(found.value), from_ordered(runner_up), static_cast<int>(found.key)};
}

__device__ inline void add_offer(double reduced, int row, double& least, double& second,
                                 unsigned& key) {
  const bool nearer = reduced < least;
  second = nearer ? least : lesser(second, reduced);
  key = nearer ? static_cast<unsigned>(row) : key;
  least = nearer ? reduced : least;
}

constexpr int kLoads = 8;   // of a column that a lane has under way
constexpr int kWords = 16;  // the same of levels, four to a word: all of 2048 rows
constexpr int kExact = 4;   // and of the costs that levels leave in question

// One warp reads every `parts`-th group of rows of a column, from group `part` on. All loads of a
// batch come before its stores, which they could not overtake.
template <class T>
__device__ Offer find_offer(const Costs<T>& costs, const State& s, T* copies, int column, int part,
                            int parts) {
  const Column<T> entries(costs, s, copies, column);
  double least = infinity(), second = infinity();
  unsigned key = ~0u;
  for (int first = part * kWarp + lane_id(); first < costs.n; first += kLoads * parts * kWarp) {
    T x[kLoads];
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      const int i = first + b * parts * kWarp;
      x[b] = i < costs.n ? entries.from[i * entries.stride] : static_cast<T>(0);
    }
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      const int i = first + b * parts * kWarp;
      if (i >= costs.n) break;
      if (entries.to != nullptr) entries.to[i] = x[b];
      const double reduced = static_cast<double>(costs.sign * x[b]) - s.u[i];
      add_offer(reduced, i, least, second, key);
    }
  }
  return warp_offer(least, second, key);
}

// The ends of a level's costs, less a dual. In float64 as they are; in float32, a fraction of the
// work, upper ends rounded up and lower ends down, from a dual rounded down.
struct ExactEnds {
  using Number = double;
  double low, step;
  __device__ static double of(unsigned word, int k) { return number_of(level_in(word, k)); }
  __device__ double upper(double level, double dual) const {
    return fma(level + 1.0, step, low) - dual;
  }
  __device__ double lower(double level, double dual) const { return fma(level, step, low) - dual; }
  __device__ double bound(double x) const { return x; }
};
struct RoundedEnds {
  using Number = float;
  float low, step;
  __device__ static float of(unsigned word, int k) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + k)) - 0x1p23f;
  }
  __device__ float upper(float level, float dual) const {
    return sum_up(-1.0f, dual, sum_up(level + 1.0f, step, low));
  }
  // Too large by the last place of the dual, which is of no more than both numbers it is between.
  __device__ float lower(float level, float dual) const {
    return sum_down(-1.0f, dual, sum_down(level, step, low));
  }
  __device__ float bound(float x) const {
    const float most = greater(x, -x) + 2.0f * (greater(low, -low) + 255.0f * step);
    return sum_up(0x1p-21f, most, x) + 0x1p-140f;
  }
};

// Four levels at a time, kWords times, `stride` rows apart: each(place of a level among all, level,
// dual of its row). By a whole warp, so that all loads come before their use.
template <class Ends, class Each>
__device__ void for_levels(const unsigned char* levels, const typename Ends::Number* row_dual,
                           int from, int stride, int n, Each each) {
  unsigned words[kWords];
#pragma unroll
  for (int j = 0; j < kWords; ++j)
    words[j] = load_cached(
        reinterpret_cast<const unsigned*>(levels + min(from + j * stride, n - 1) / 4 * 4));
  __syncwarp();  // no load may wait until its level is used
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const int i = from + j * stride;
    const unsigned word = i < n ? words[j] : ~0u;  // kNoLevel
    typename Ends::Number dual[kRowsPerWord];
    four(row_dual, i < n ? i : 0, dual);
#pragma unroll
    for (int k = 0; k < kRowsPerWord; ++k) each(kRowsPerWord * j + k, Ends::of(word, k), dual[k]);
  }
}

// What the rows of a bit each offer, `place` being that of a level among those of for_levels.
template <class T>
__device__ void add_exact(const Costs<T>& costs, const double* row_dual, int column, int from,
                          int stride, uint64_t places, double& least, double& second,
                          unsigned& key) {
  const T* entries = costs.base + column * costs.column_stride;
  while (places != 0) {
    int rows[kExact];
    T x[kExact];
#pragma unroll
    for (int k = 0; k < kExact; ++k) {
      const int place = places != 0 ? __ffsll(static_cast<long long>(places)) - 1 : 0;
      const int row = from + place / kRowsPerWord * stride + place % kRowsPerWord;
      rows[k] = places != 0 && row < costs.n ? row : -1;
      places &= places - 1;
      x[k] = __ldg(entries + max(rows[k], 0) * costs.row_stride);
    }
#pragma unroll
    for (int k = 0; k < kExact; ++k) {
      if (rows[k] < 0) continue;
      const double reduced = static_cast<double>(costs.sign * x[k]) - row_dual[rows[k]];
      add_offer(reduced, rows[k], least, second, key);
    }
  }
}

// The same from the column's levels.
template <class T, class Ends>
__device__ CROC_NOINLINE Offer find_offer(Costs<T> costs, const unsigned char* levels, Ends ends,
                                          const double* row_dual,
                                          const typename Ends::Number* its_dual, int column,
                                          int part, int parts) {
  using Number = typename Ends::Number;
  const int start = kRowsPerWord * (part * kWarp + lane_id());
  const int stride = kRowsPerWord * parts * kWarp;
  Number nearest = static_cast<Number>(infinity());  // upper end
  for (int from = start; from - start < costs.n; from += kWords * stride)
    for_levels<Ends>(levels, its_dual, from, stride, costs.n, [&](int, Number level, Number dual) {
      const Number upper = ends.upper(level, dual);
      nearest = level != static_cast<Number>(kNoLevel) ? lesser(nearest, upper) : nearest;
    });
  // Of two lanes' nearest, the further: at least two rows are that near.
  const unsigned lane = static_cast<unsigned>(lane_id());
  const Least found = warp_least({ordered(nearest), lane});
  const Number bound = ends.bound(static_cast<Number>(
      from_ordered(warp_min(ordered(found.key == lane ? infinity() : nearest)))));
  double least = infinity(), second = infinity();
  unsigned key = ~0u;
  for (int from = start; from - start < costs.n; from += kWords * stride) {
    uint64_t promising = 0;
    for_levels<Ends>(levels, its_dual, from, stride, costs.n,
                     [&](int place, Number level, Number dual) {
                       const bool is = ends.lower(level, dual) <= bound;
                       promising |= static_cast<uint64_t>(is) << place;
                     });
    add_exact(costs, row_dual, column, from, stride, promising, least, second, key);
  }
  return warp_offer(least, second, key);
}

// From levels, where there are some.
template <class T>
__device__ Offer find_offer(const Problem<T>& p, const Levels<T>& levels, const State& s,
                            int column, int part, int parts) {
  if (levels.level == nullptr) return find_offer(p.costs, s, p.copies(), column, part, parts);
  const T low = levels.low[column], step = levels.step[column];
  if constexpr (sizeof(T) == sizeof(float))
    return find_offer(p.costs, levels.column(column), RoundedEnds{low, step}, s.u, low_duals(s),
                      column, part, parts);
  else
    return find_offer(p.costs, levels.column(column), ExactEnds{low, step}, s.u, s.u, column, part,
                      parts);
}

}  // namespace croc::gpu
