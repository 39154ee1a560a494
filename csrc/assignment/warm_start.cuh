// The start: column duals that already price the columns everybody wants. Every v <= 0 is a valid
// start, so nothing here has to be exact; it only has to be the same on every run.
#pragma once

#include "problem.cuh"

namespace croc::gpu {

constexpr int kStripe = 4 * kWarp;     // columns of a block in the column passes
constexpr int kStripeThreads = 512;    // and its threads: a warp takes every 16th row
constexpr int kRowThreads = 256;       // row passes: a warp per row
constexpr int kProblemThreads = 1024;  // one block per problem

// Visits this block's stripe of columns: visit(row, four costs), first column of the four in
// `first`.
template <class T, class Visit>
__device__ void for_stripe(const Costs<T>& costs, int first, Visit visit) {
#pragma unroll 4
  for (int row = warp_id(); row < costs.n; row += warp_count()) {
    double x[4];
    costs.four(row, first, x);
    visit(row, x);
  }
}

// Visits a row with one warp: visit(first of four columns, four costs). Beyond the last column
// costs are +inf.
template <class T, class Visit>
__device__ void for_row(const Costs<T>& costs, int row, Visit visit) {
#pragma unroll 4
  for (int first = 4 * lane_id(); first < costs.m; first += 4 * kWarp) {
    double x[4];
    costs.four(row, first, x);
    visit(first, x);
  }
}

__device__ inline int stripe_start() { return static_cast<int>(blockIdx.y) * kStripe; }
__device__ inline int stripe_first() { return stripe_start() + 4 * lane_id(); }
__device__ inline int row_of_warp() { return blockIdx.y * warp_count() + warp_id(); }

// log(sum(exp(x))), one x at a time.
struct LogSum {
  double top;
  float sum;

  __device__ static LogSum empty() { return {-infinity(), 0.0f}; }
  __device__ void add(double x, float weight) {
    if (x > top) {
      sum = sum * __expf(static_cast<float>(top - x)) + weight;
      top = x;
    } else if (x > -infinity()) {
      sum += weight * __expf(static_cast<float>(x - top));
    }
  }
  __device__ void add(double x) { add(x, 1.0f); }
  __device__ void add(LogSum other) { add(other.top, other.sum); }
  __device__ double value() const { return top + static_cast<double>(__logf(sum)); }
};

__device__ inline LogSum warp_log_sum(LogSum mine) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    LogSum other;
    other.top = __shfl_xor_sync(kAllLanes, mine.top, step);
    other.sum = __shfl_xor_sync(kAllLanes, mine.sum, step);
    mine.add(other);
  }
  return mine;
}

// Grid (batch), one thread per entry: the state before anything is known.
template <class T>
__global__ void prepare(Arguments a) {
  const Problem<T> p(a, false);
  for (int j = threadIdx.x; j < padded(p.m); j += blockDim.x) p.work.v[j] = 0.0;
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) p.work.row_of[j] = -1;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) p.work.u[i] = 0.0, p.work.column_of[i] = -1;
  if (threadIdx.x == 0) {
    Scalars& s = p.scalars();
    s = Scalars{};
    s.low_exponent = 2000;
    s.high_exponent = -2000;
  }
}

// Exponents of the lowest and of the highest set bit of x.
__device__ inline void exponents(double x, int& low, int& high) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffULL;
  if (bits == 0) return;
  const int exponent = static_cast<int>(bits >> 52);
  const uint64_t mantissa = (bits & 0xfffffffffffffULL) | (exponent > 0 ? uint64_t{1} << 52 : 0);
  const int unit = (exponent > 0 ? exponent : 1) - 1075;
  low = min(low, unit + __ffsll(static_cast<long long>(mantissa)) - 1);
  high = max(high, unit + 63 - __clzll(static_cast<long long>(mantissa)));
}

// Grid (batch, stripes): column means over the finite costs; the grid of the costs; what must not
// be there.
template <class T>
__global__ void column_means(Arguments a) {
  const Problem<T> p(a, false);
  if (stripe_start() >= p.m || p.n == 0) return;
  __shared__ double sums[kStripeThreads / kWarp][kStripe];
  __shared__ int counts[kStripeThreads / kWarp][kStripe];
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  int count[4] = {0, 0, 0, 0};
  int low = 2000, high = -2000, invalid = 0;
  const int first = stripe_first();
  for_stripe(p.costs, first, [&](int, const double (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (is_finite(x[k])) {
        sum[k] += x[k];
        ++count[k];
        exponents(x[k], low, high);
      } else if (!(x[k] > 0.0)) {
        invalid = 1;
      }
    }
  });
  Scalars& s = p.scalars();
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  invalid = __any_sync(kAllLanes, invalid);
  if (lane_id() == 0) {
    atomicMin(&s.low_exponent, low);
    atomicMax(&s.high_exponent, high);
    if (invalid) atomicMax(&s.status, static_cast<int>(kInvalid));
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    sums[warp_id()][4 * lane_id() + k] = sum[k];
    counts[warp_id()][4 * lane_id() + k] = count[k];
  }
  __syncthreads();
  const int column = stripe_start() + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kStripe && column < p.m) {
    double total = 0.0;
    int used = 0;
    for (int w = 0; w < warp_count(); ++w)
      total += sums[w][threadIdx.x], used += counts[w][threadIdx.x];
    p.work.potential[column] = used > 0 ? total / used : infinity();
  }
}

// v = min(0, potential - tau), tau the potential of rank n: n columns keep a negative dual, as many
// as get a row.
template <class T>
__device__ void threshold(const Problem<T>& p) {
  const double* potential = p.work.potential;
  double least = infinity();
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) least = fmin(least, potential[j]);
  least = block_min(least);
  const float rank_n = block_select(p.m, min(p.n, p.m - 1), [&](int j) {
    return fmaxf(static_cast<float>(potential[j] - least), 0.0f);
  });
  const double tau = least + static_cast<double>(rank_n);
  for (int j = threadIdx.x; j < p.m; j += blockDim.x)
    p.work.v[j] = on_grid(potential[j] - tau, p.scalars());
}

// Grid (batch).
template <class T>
__global__ void start_from_means(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0) return;
  threshold(p);
}

// The ninth of the lanes' values, 0 if there are fewer finite ones. For the lanes' minima of a row
// it stands for the ninth value of the row, closely enough for a temperature.
__device__ inline float ninth_lane(float x) {
  int rank = 0;
  for (int other = 0; other < kWarp; ++other) {
    const float theirs = __shfl_sync(kAllLanes, x, other);
    rank += theirs < x || (theirs == x && other < lane_id());
  }
  const unsigned ninth = __ballot_sync(kAllLanes, rank == 8);
  const float found =
      __shfl_sync(kAllLanes, x, ninth == 0 ? 0 : __ffs(static_cast<int>(ninth)) - 1);
  return is_finite(found) && found > 0.0f ? found : 0.0f;
}

// Grid (batch, rows / warps): row minima under both starts, and how far the next columns lie.
template <class T>
__global__ void compare_rows(Arguments a) {
  const Problem<T> p(a);
  const int row = row_of_warp();
  if (row >= p.n || p.failed()) return;
  double least = infinity(), least_cost = infinity();
  for_row(p.costs, row, [&](int first, const double (&x)[4]) {
    double v[4];
    four(p.work.v, first, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      least_cost = lesser(least_cost, x[k]);
      least = lesser(least, x[k] - v[k]);
    }
  });
  const double of_row = from_ordered(warp_min(ordered(least)));
  const double of_costs = from_ordered(warp_min(ordered(least_cost)));
  const float spread = ninth_lane(static_cast<float>(least - of_row));
  const float cost_spread = ninth_lane(static_cast<float>(least_cost - of_costs));
  if (lane_id() != 0) return;
  p.work.row_value[row] = of_row;
  p.work.row_least[row] = of_costs;
  p.work.row_spread[row] = spread;
  p.work.cost_spread[row] = cost_spread;
}

// Grid (batch): keep the start with the larger dual value, and set the temperature of the Sinkhorn
// steps.
template <class T>
__global__ void choose_start(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0) return;
  double gain = 0.0;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    gain += p.work.row_value[i] - p.work.row_least[i];
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) gain += p.work.v[j];
  const bool from_means = block_sum(gain) > 0.0;
  const float* spreads = from_means ? p.work.row_spread : p.work.cost_spread;
  const double spread = block_select(p.n, p.n / 2, [&](int i) { return spreads[i]; });
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
    if (!from_means) p.work.v[j] = 0.0;
    p.work.potential[j] = p.work.v[j];
  }
  if (threadIdx.x == 0) {
    p.scalars().from_means = from_means;
    p.scalars().spread = spread;
    p.scalars().temperature = from_means ? 0.25 * spread : 0.0;
  }
}

// Grid (batch, rows / warps + 1): row potentials; the last block of a problem does the row of
// leftover columns.
template <class T>
__global__ void sinkhorn_rows(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0) return;
  const double temperature = p.scalars().temperature;
  if (!(temperature > 0.0)) return;
  const double scale = 1.0 / temperature;
  const double* potential = p.work.potential;
  LogSum sum = LogSum::empty();
  if (blockIdx.y + 1 == gridDim.y) {
    if (warp_id() > 0) return;
    for (int j = lane_id(); j < p.m; j += kWarp) sum.add(potential[j] * scale);
    const double slack = log(static_cast<double>(p.m - p.n)) - warp_log_sum(sum).value();
    if (lane_id() == 0) p.scalars().slack = slack * temperature;
    return;
  }
  const int row = row_of_warp();
  if (row >= p.n) return;
  for_row(p.costs, row, [&](int first, const double (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (first + k < p.m) sum.add((potential[first + k] - x[k]) * scale);
  });
  sum = warp_log_sum(sum);
  if (lane_id() == 0) p.work.row_value[row] = -temperature * sum.value();
}

// Grid (batch, stripes): column potentials.
template <class T>
__global__ void sinkhorn_columns(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0 || stripe_start() >= p.m) return;
  const double temperature = p.scalars().temperature;
  if (!(temperature > 0.0)) return;
  __shared__ LogSum sums[kStripeThreads / kWarp][kStripe];
  const double scale = 1.0 / temperature;
  LogSum sum[4] = {LogSum::empty(), LogSum::empty(), LogSum::empty(), LogSum::empty()};
  for_stripe(p.costs, stripe_first(), [&](int row, const double (&x)[4]) {
    const double f = p.work.row_value[row];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k].add((f - x[k]) * scale);
  });
#pragma unroll
  for (int k = 0; k < 4; ++k) sums[warp_id()][4 * lane_id() + k] = sum[k];
  __syncthreads();
  const int column = stripe_start() + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kStripe && column < p.m) {
    LogSum total = LogSum::empty();
    if (p.m > p.n) total.add(p.scalars().slack * scale);
    for (int w = 0; w < warp_count(); ++w) total.add(sums[w][threadIdx.x]);
    p.work.potential[column] = -temperature * total.value();
  }
}

// Grid (batch).
template <class T>
__global__ void start_from_sinkhorn(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0 || !(p.scalars().temperature > 0.0)) return;
  threshold(p);
}

}  // namespace croc::gpu
