// The start: column duals that already price the columns everybody wants. Every v <= 0 is a valid
// start, so nothing here has to be exact; it only has to be the same on every run.
#pragma once

#include "problem.cuh"

namespace croc::gpu {

constexpr int kStripe = 4 * kWarp;     // columns of a block in the column passes
constexpr int kStripeThreads = 512;    // and its threads: a warp takes every 16th row
constexpr int kRowThreads = 256;       // row passes: a warp per row
constexpr int kProblemThreads = 1024;  // one block per problem
constexpr int kSampledRows = 64;       // that choose the start
constexpr int kOverload = 1024;        // of these are one row of Scalars::overload

// Visits this block's stripe of columns: visit(row, four costs), first column of the four in
// `first`. Lanes beyond the last column visit nothing.
template <class T, class Visit>
__device__ void for_stripe(const Costs<T>& costs, int first, Visit visit) {
  if (first >= costs.m) return;
  const auto each = [&](auto load) {
#pragma unroll 4
    for (int row = warp_id(); row < costs.n; row += warp_count()) {
      T x[4];
      load(costs.base + row * costs.row_stride, x);
      costs.apply_sign(x);
      visit(row, x);
    }
  };
  if (costs.vectors)
    each([&](const T* p, T(&x)[4]) { Costs<T>::load_vector(p + first, x); });
  else
    each([&](const T* p, T(&x)[4]) { costs.load_each(p, first, x); });
}

// Visits a row with one warp: visit(first of four columns, four costs). Beyond the last column
// costs are +inf.
template <class T, class Visit>
__device__ void for_row(const Costs<T>& costs, int row, Visit visit) {
  const T* p = costs.base + row * costs.row_stride;
  const auto each = [&](auto load) {
#pragma unroll 4
    for (int first = 4 * lane_id(); first < costs.m; first += 4 * kWarp) {
      T x[4];
      load(first, x);
      costs.apply_sign(x);
      visit(first, x);
    }
  };
  if (costs.vectors)
    each([&](int first, T(&x)[4]) { Costs<T>::load_vector(p + first, x); });
  else
    each([&](int first, T(&x)[4]) { costs.load_each(p, first, x); });
}

__device__ inline int stripe_start() { return static_cast<int>(blockIdx.y) * kStripe; }
__device__ inline int stripe_first() { return stripe_start() + 4 * lane_id(); }
__device__ inline int row_of_warp() { return blockIdx.y * warp_count() + warp_id(); }

// log(sum(exp(z / temperature))) over numbers that come four at a time.
template <class T>
struct LogSum {
  T top;
  float sum;  // of exp((z - top) / temperature)

  __device__ static LogSum empty() { return {static_cast<T>(-infinity()), 0.0f}; }
  __device__ void rise(T z, T scale) {
    if (!(z > top)) return;
    sum *= __expf(static_cast<float>((top - z) * scale));
    top = z;
  }
  __device__ void add(const T (&z)[4], T scale) {
    rise(greater(greater(z[0], z[1]), greater(z[2], z[3])), scale);
    if (!(top > static_cast<T>(-infinity()))) return;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += __expf(static_cast<float>((z[k] - top) * scale));
  }
  __device__ void add(LogSum other, T scale) {
    if (!(other.top > static_cast<T>(-infinity()))) return;
    rise(other.top, scale);
    sum += other.sum * __expf(static_cast<float>((other.top - top) * scale));
  }
  // Times the temperature.
  __device__ double value(double temperature) const {
    return static_cast<double>(top) + temperature * static_cast<double>(__logf(sum));
  }
};

template <class T>
__device__ LogSum<T> warp_log_sum(LogSum<T> mine, T scale) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    LogSum<T> other;
    other.top = __shfl_xor_sync(kAllLanes, mine.top, step);
    other.sum = __shfl_xor_sync(kAllLanes, mine.sum, step);
    mine.add(other, scale);
  }
  return mine;
}

// Grid (batch), one thread per entry: the state before anything is known.
template <class T>
__global__ void prepare(Arguments a) {
  const Problem<T> p(a, false);
  for (int j = threadIdx.x; j < padded(p.m); j += blockDim.x)
    p.work.v[j] = 0.0, p.potential()[j] = static_cast<T>(0);
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) p.work.row_of[j] = -1;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) p.work.u[i] = 0.0, p.work.column_of[i] = -1;
  if (threadIdx.x == 0) {
    Scalars& s = p.scalars();
    s = Scalars{};
    s.low_exponent = 2000;
    s.high_exponent = -2000;
  }
}

// The lowest set bit of all numbers, and the largest number, as exponents.
template <class T>
struct Exponents;

template <>
struct Exponents<float> {
  int low = 2000;
  unsigned largest = 0;  // its bits
  __device__ void add(float x) {
    const unsigned bits = __float_as_uint(x) & 0x7fffffffu;
    const unsigned exponent = bits >> 23;
    const unsigned mantissa = (bits & 0x7fffffu) | (exponent > 0 ? 1u << 23 : 0u);
    const int its_low =
        static_cast<int>(max(exponent, 1u)) - 151 + __ffs(static_cast<int>(mantissa));
    low = bits == 0 ? low : min(low, its_low);
    largest = max(largest, bits);
  }
  __device__ int high() const {
    if (largest == 0) return -2000;
    const int exponent = static_cast<int>(largest >> 23);
    return exponent > 0 ? exponent - 127 : -118 - __clz(static_cast<int>(largest));
  }
};

template <>
struct Exponents<double> {
  int low = 2000, highest = -2000;
  __device__ void add(double x) {
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffULL;
    if (bits == 0) return;
    const int exponent = static_cast<int>(bits >> 52);
    const uint64_t mantissa = (bits & 0xfffffffffffffULL) | (exponent > 0 ? uint64_t{1} << 52 : 0);
    const int unit = (exponent > 0 ? exponent : 1) - 1075;
    low = min(low, unit + __ffsll(static_cast<long long>(mantissa)) - 1);
    highest = max(highest, unit + 63 - __clzll(static_cast<long long>(mantissa)));
  }
  __device__ int high() const { return highest; }
};

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
  int invalid = 0;
  Exponents<T> exponents;
  for_stripe(p.costs, stripe_first(), [&](int, const T(&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool finite = x[k] - x[k] == 0;
      const T its = finite ? x[k] : static_cast<T>(0);
      sum[k] += static_cast<double>(its);
      count[k] += finite;
      exponents.add(its);
      invalid |= !finite && !(x[k] > 0);
    }
  });
  Scalars& s = p.scalars();
  const int low = __reduce_min_sync(kAllLanes, exponents.low);
  const int high = __reduce_max_sync(kAllLanes, exponents.high());
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
    p.potential()[column] = static_cast<T>(used > 0 ? total / used : infinity());
  }
}

// v = min(0, potential - tau), tau the potential of rank n: n columns keep a negative dual, as many
// as get a row.
template <class T>
__device__ void threshold(const Problem<T>& p) {
  const T* potential = p.potential();
  double least = infinity();
  for (int j = threadIdx.x; j < p.m; j += blockDim.x)
    least = fmin(least, static_cast<double>(potential[j]));
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

// The k-th row of the sample that chooses the start.
__device__ inline int sampled_row(int k, int n) {
  return n <= kSampledRows ? k : static_cast<int>(static_cast<int64_t>(k) * n / kSampledRows);
}

// Grid (batch, sampled rows / warps): row minima under both starts, and how far the next columns
// lie.
template <class T>
__global__ void compare_rows(Arguments a) {
  const Problem<T> p(a);
  const int k = row_of_warp();
  if (k >= min(p.n, kSampledRows) || p.failed()) return;
  double least = infinity(), least_cost = infinity();
  for_row(p.costs, sampled_row(k, p.n), [&](int first, const T(&x)[4]) {
    double v[4];
    four(p.work.v, first, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      least_cost = lesser(least_cost, static_cast<double>(x[k]));
      least = lesser(least, static_cast<double>(x[k]) - v[k]);
    }
  });
  const double of_row = from_ordered(warp_min(ordered(least)));
  const double of_costs = from_ordered(warp_min(ordered(least_cost)));
  const float spread = ninth_lane(static_cast<float>(least - of_row));
  const float cost_spread = ninth_lane(static_cast<float>(least_cost - of_costs));
  if (lane_id() != 0) return;
  p.work.row_value[k] = of_row - of_costs;
  p.work.row_spread[k] = spread;
  p.work.cost_spread[k] = cost_spread;
}

// Grid (batch): keep the start with the larger dual value, as far as the sample tells, and set the
// temperature of the Sinkhorn steps.
template <class T>
__global__ void choose_start(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0) return;
  const int count = min(p.n, kSampledRows);
  const double weight = static_cast<double>(p.n) / count;
  double gain = 0.0;
  for (int k = threadIdx.x; k < count; k += blockDim.x) gain += weight * p.work.row_value[k];
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) gain += p.work.v[j];
  const bool from_means = block_sum(gain) > 0.0;
  const float* spreads = from_means ? p.work.row_spread : p.work.cost_spread;
  const double spread = block_select(count, count / 2, [&](int k) { return spreads[k]; });
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
    if (!from_means) p.work.v[j] = 0.0;
    p.potential()[j] = static_cast<T>(p.work.v[j]);
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
  const T scale = static_cast<T>(1.0 / temperature);
  const T* potential = p.potential();
  LogSum<T> sum = LogSum<T>::empty();
  if (blockIdx.y + 1 == gridDim.y) {
    if (warp_id() > 0) return;
    for (int first = 4 * lane_id(); first < p.m; first += 4 * kWarp) {
      T z[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        z[k] = first + k < p.m ? potential[first + k] : static_cast<T>(-infinity());
      sum.add(z, scale);
    }
    const double slack = temperature * log(static_cast<double>(p.m - p.n)) -
                         warp_log_sum(sum, scale).value(temperature);
    if (lane_id() == 0) p.scalars().slack = slack, p.scalars().overload = 0;
    return;
  }
  const int row = row_of_warp();
  if (row >= p.n) return;
  for_row(p.costs, row, [&](int first, const T(&x)[4]) {
    T z[4];
    four(potential, first, z);  // beyond the last column x is +inf
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] -= x[k];
    sum.add(z, scale);
  });
  sum = warp_log_sum(sum, scale);
  if (lane_id() == 0) p.work.row_value[row] = -sum.value(temperature);
}

// Grid (batch, stripes): column potentials. With those of the rows just made from them, no exponent
// is positive; columns that no row could want much are wanted as much as a float shows.
template <class T>
__global__ void sinkhorn_columns(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0 || stripe_start() >= p.m) return;
  const double temperature = p.scalars().temperature;
  if (!(temperature > 0.0)) return;
  __shared__ float sums[kStripeThreads / kWarp][kStripe];
  const T scale = static_cast<T>(1.0 / temperature);
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  T before[4] = {0, 0, 0, 0};
  if (stripe_first() < p.m) four(p.potential(), stripe_first(), before);
  for_stripe(p.costs, stripe_first(), [&](int row, const T(&x)[4]) {
    const T f = static_cast<T>(p.work.row_value[row]);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      sum[k] += __expf(static_cast<float>(((f - x[k]) + before[k]) * scale));
  });
#pragma unroll
  for (int k = 0; k < 4; ++k) sums[warp_id()][4 * lane_id() + k] = sum[k];
  __syncthreads();
  if (threadIdx.x >= kStripe) return;
  const int column = stripe_start() + static_cast<int>(threadIdx.x);
  float asked = 0.0f;
  if (column < p.m) {
    const double old = static_cast<double>(p.potential()[column]);
    float total =
        p.m > p.n ? __expf(static_cast<float>((p.scalars().slack + old) / temperature)) : 0.0f;
    asked = -total;
    for (int w = 0; w < warp_count(); ++w) total += sums[w][threadIdx.x];
    asked += total;
    p.potential()[column] =
        static_cast<T>(old - temperature * static_cast<double>(__logf(fmaxf(total, 1e-37f))));
  }
  // In whole numbers: their sum is the same in any order.
  const float beyond = fminf(fmaxf(asked - 1.0f, 0.0f), static_cast<float>(p.n));
  const unsigned of_warp =
      __reduce_add_sync(kAllLanes, static_cast<unsigned>(kOverload * beyond + 0.5f));
  if (lane_id() == 0 && of_warp > 0) atomicAdd(&p.scalars().overload, of_warp);
}

// Grid (batch).
template <class T>
__global__ void start_from_sinkhorn(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n == 0 || !(p.scalars().temperature > 0.0)) return;
  threshold(p);
}

}  // namespace croc::gpu
