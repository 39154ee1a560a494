// The columns of a problem, transposed and with 8 bits per cost: a quarter of the costs' memory. A
// column can then be read in whole lines, where its costs lie a row apart.
//
// A level tells between which two numbers a cost is, rounding included:
//
//   fma(level, step, low) <= cost <= fma(level + 1, step, low)
//
// and the same holds for both sides less a row's dual, since rounding keeps order. So the second
// least upper end bounds the second least reduced cost, and only what has a lower end within that
// bound is read from the costs themselves: the result is that of reading all of them.
#pragma once

#include "cluster.cuh"
#include "problem.cuh"

namespace croc::gpu {

constexpr unsigned kNoLevel = 255;  // +inf, or beyond the last row: only the lower end holds
constexpr double kLevels = 254.0;
constexpr int kRowsPerWord = 4;

struct alignas(16) LevelWords {
  unsigned of[kLevelRows / kRowsPerWord];
};

// As a double. The conversion instruction has a fraction of the throughput.
__device__ inline double number_of(unsigned level) {
  return __longlong_as_double(0x4330000000000000LL | level) - 0x1p52;
}

__device__ inline unsigned level_in(unsigned word, int k) { return word >> 8 * k & 255u; }

// Nearly that level, and whether it is.
template <class T>
__device__ unsigned level_near(T cost, T low, T per_step) {
  return static_cast<unsigned>(lesser((cost - low) * per_step, static_cast<T>(kLevels)));
}
__device__ inline bool encloses(unsigned level, double cost, double low, double step) {
  const double x = number_of(level);
  return fma(x, step, low) <= cost && (level == 254 || cost < fma(x + 1.0, step, low));
}

__device__ inline unsigned level_of(double cost, double low, double step, double per_step) {
  if (!is_finite(cost)) return kNoLevel;
  int level = static_cast<int>(fmin(kLevels, (cost - low) * per_step));
  while (level > 0 && fma(static_cast<double>(level), step, low) > cost) --level;
  while (level < 254 && fma(level + 1.0, step, low) <= cost) ++level;
  return static_cast<unsigned>(level);
}

// A lane takes a column, so that a warp reads rows in whole lines. By all warps of the cluster;
// the caller waits for them.
template <class T>
__device__ CROC_NOINLINE void make_levels(Costs<T> costs, Levels<T> levels, Team team) {
  for (int group = team.warp(); group * kWarp < costs.m; group += team.warps()) {
    const int column = group * kWarp + lane_id();
    if (column >= costs.m) continue;
    const T* entries = costs.base + column * costs.column_stride;
    T least = static_cast<T>(infinity()), most = -least;
    for (int first = 0; first < costs.n; first += kLevelRows) {
      T x[kLevelRows];  // all loads before their use; the last row more than once does not matter
#pragma unroll
      for (int k = 0; k < kLevelRows; ++k)
        x[k] = __ldg(entries + min(first + k, costs.n - 1) * costs.row_stride);
#pragma unroll
      for (int k = 0; k < kLevelRows; ++k) {
        const T cost = costs.sign * x[k];
        least = lesser(least, cost);
        most = cost < static_cast<T>(infinity()) ? greater(most, cost) : most;
      }
    }
    const double low = is_finite(least) ? least : 0.0, high = most;
    // A little more than a 254th of the range, so that the last level ends beyond it, with the
    // least double for ranges that have few bits.
    const double range = high > low ? high - low : 0.0;
    const T its_step = rounded_up(T(), range * (0x1.00001p0 / kLevels) + 0x1p-1074);
    const double step = its_step, per_step = step > 0.0 ? 1.0 / step : 0.0;
    levels.low[column] = static_cast<T>(low);
    levels.step[column] = its_step;
    for (int first = 0; first < costs.n; first += kLevelRows) {
      T x[kLevelRows];
#pragma unroll
      for (int k = 0; k < kLevelRows; ++k)
        x[k] = __ldg(entries + min(first + k, costs.n - 1) * costs.row_stride);
      LevelWords words = {};
      unsigned again = 0;
#pragma unroll
      for (int k = 0; k < kLevelRows; ++k) {
        const T cost = first + k < costs.n ? costs.sign * x[k] : static_cast<T>(infinity());
        unsigned level = kNoLevel;
        if (is_finite(static_cast<double>(cost))) {
          level = level_near(cost, static_cast<T>(low), static_cast<T>(per_step));
          again |= static_cast<unsigned>(!encloses(level, cost, low, step)) << k;
        }
        words.of[k / kRowsPerWord] |= level << 8 * (k % kRowsPerWord);
      }
      unsigned char* its_levels = levels.column(column) + first;
      *reinterpret_cast<LevelWords*>(its_levels) = words;
      for (; again != 0; again &= again - 1) {
        const int k = __ffs(static_cast<int>(again)) - 1;
        its_levels[k] =
            static_cast<unsigned char>(level_of(costs.at(first + k, column), low, step, per_step));
      }
    }
  }
}

}  // namespace croc::gpu
