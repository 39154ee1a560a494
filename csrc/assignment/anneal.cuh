// A better start for problems whose first one sends many rows to the same columns: more Sinkhorn
// steps, from a hot temperature down to a cold one, all in one launch by a cluster of blocks.
//
// Given the rows' potentials, those of the columns and of the row that takes the m - n columns left
// over are found together: sum_j left_j(s) = m - n has one unknown, s. Taken in turn, as in
// warm_start.cuh, the two move towards each other by a temperature per step where the wanted
// columns have to rise by many.
//
// As before, any result is a valid start. It is the same for every number of blocks: rows are in
// kParts parts whose sums are added in one order.
#pragma once

#include "levels.cuh"
#include "nearest.cuh"

namespace croc::gpu {

constexpr int kAnnealThreads = 512;
constexpr int kAnnealRows = 272;         // fewer are matched faster than annealed
constexpr int kAnnealColumns = 1 << 15;  // more have no room in what follows
constexpr int kCrowded = 3;              // more than n / 3 rows are not alone, or first in line
constexpr int kParts = 16;               // of the rows: part k has every 16th, from k on
constexpr int kMassSteps = 8;            // of Newton's method, at most
constexpr double kMassPrecision = 0.02;  // of s, in temperatures

// From a temperature of kHottest times that of the first steps on it falls by half, so many times,
// with kSteps at each; a potential goes kRelaxed times as far as to its new value.
constexpr double kHottest = 16.0;
constexpr int kHalvings = 6, kSteps = 6;
constexpr double kRelaxed = 1.5;

// What the blocks write: sums of two steps in turn, since a block may begin the next step while
// another still reads this one's. The copies of columns, or the levels where others of the batch
// have many rows, come later: their memory is free. It takes 192 bytes per column in float32 and
// 256 in float64; both have at least n.
template <class T>
struct AnnealState {
  float* sums;       // (2, kParts, padded m)
  T* potential;      // (padded m) this block's, of the columns
  T* demand;         // (padded m) and what the rows alone would make of them, negated
  int pitch, page;

  __device__ AnnealState(const Problem<T>& p, Team team, int page)
      : pitch(padded(p.m)), page(page) {
    void* room = p.slots > 0 ? p.work.copies : p.work.level;
    Carver carver{static_cast<unsigned char*>(room)};
    sums = carver.take<float>(int64_t{2} * kParts * pitch);
    for (int rank = 0; rank <= team.rank; ++rank) {
      potential = carver.take<T>(pitch);
      demand = carver.take<T>(pitch);
    }
  }
  __device__ float* sums_of(int part) const {
    return sums + static_cast<int64_t>(page * kParts + part) * pitch;
  }
};

// The parts of the rows that a block works on.
struct Parts {
  Team team;
  int count;

  __device__ explicit Parts(Team team)
      : team(team), count((kParts - team.rank + team.size - 1) / team.size) {}
  __device__ int of(int k) const { return team.rank + k * team.size; }
};

// Whether more than a third of the rows would be left free by a matching of nearest columns.
template <class T>
__device__ bool crowded(const Problem<T>& p) {
  __shared__ unsigned taken[kAnnealColumns / kWarp];
  const int words = (p.m + kWarp - 1) / kWarp;
  for (int w = threadIdx.x; w < words; w += blockDim.x) taken[w] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    const int column = p.work.column_of[i];
    atomicOr(&taken[column / kWarp], 1u << column % kWarp);
  }
  __syncthreads();
  int served = 0;
  for (int w = threadIdx.x; w < words; w += blockDim.x) served += __popc(taken[w]);
  return kCrowded * (p.n - block_count(served, 0)) > p.n;
}

// The three phases of a step are not inlined, so that each has the registers to itself.
template <class T>
__device__ CROC_NOINLINE void anneal_rows(Arguments a, double temperature) {
  const Problem<T> p(a);
  const AnnealState<T> state(p, Team::all(), 0);
  const Parts parts(Team::all());
  const T scale = static_cast<T>(1.0 / temperature);
  for (int k = warp_id();; k += warp_count()) {
    const int row = parts.of(k % parts.count) + kParts * (k / parts.count);
    if (kParts * (k / parts.count) >= p.n) break;
    if (row >= p.n) continue;
    LogSum<T> sum = LogSum<T>::empty();
    for_row(p.costs, row, [&](int first, const T(&x)[4]) {
      T z[4];
      four(state.potential, first, z);  // beyond the last column x is +inf
#pragma unroll
      for (int c = 0; c < 4; ++c) z[c] -= x[c];
      sum.add(z, scale);
    });
    sum = warp_log_sum(sum, scale);
    if (lane_id() == 0) p.work.row_value[row] = -sum.value(temperature);
  }
  __syncthreads();
}

// Of each column what a part's rows send there. No exponent is positive, as in sinkhorn_columns.
template <class T>
__device__ CROC_NOINLINE void anneal_columns(Arguments a, double temperature, int page) {
  const Problem<T> p(a);
  const AnnealState<T> state(p, Team::all(), page);
  const Parts parts(Team::all());
  const T scale = static_cast<T>(1.0 / temperature);
  const auto each = [&](int part, int first, auto load) {
    T g[4];
    four(state.potential, first, g);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int row = part; row < p.n; row += kParts) {
      T x[4];
      load(p.costs.base + row * p.costs.row_stride, x);
      p.costs.apply_sign(x);
      const T f = static_cast<T>(p.work.row_value[row]);
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sum[c] += __expf(static_cast<float>(((f - x[c]) + g[c]) * scale));
    }
    float* to = state.sums_of(part) + first;
#pragma unroll
    for (int c = 0; c < 4; ++c) to[c] = sum[c];
  };
  const int quads = state.pitch / 4;
  for (int t = threadIdx.x; t < parts.count * quads; t += blockDim.x) {
    const int part = parts.of(t / quads), first = 4 * (t % quads);
    if (p.costs.vectors)
      each(part, first, [&](const T* from, T(&x)[4]) { Costs<T>::load_vector(from + first, x); });
    else
      each(part, first, [&](const T* from, T(&x)[4]) { p.costs.load_each(from, first, x); });
  }
}

// What the row of leftover columns takes at potential s, and by how much more for each unit of s.
struct Mass {
  double taken, slope;
};

// Called by all threads; the same for all.
template <class T>
__device__ Mass mass_at(const AnnealState<T>& state, int m, double s, double temperature,
                        int turn) {
  __shared__ double slots[2][2][kWarp];
  double taken = 0.0, slope = 0.0;
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    const float z = static_cast<float>((static_cast<double>(state.demand[j]) - s) / temperature);
    const double its = static_cast<double>(1.0f / (1.0f + __expf(z)));
    taken += its;
    slope += its * (1.0 - its);
  }
  taken = warp_sum(taken), slope = warp_sum(slope);
  if (lane_id() == 0)
    slots[turn & 1][0][warp_id()] = taken, slots[turn & 1][1][warp_id()] = slope;
  __syncthreads();
  const bool exists = lane_id() < warp_count();
  return {warp_sum(exists ? slots[turn & 1][0][lane_id()] : 0.0),
          warp_sum(exists ? slots[turn & 1][1][lane_id()] : 0.0) / temperature};
}

// The s at which m - n columns are taken.
template <class T>
__device__ double leftover_potential(const AnnealState<T>& state, int n, int m,
                                     double temperature) {
  double least = infinity(), most = -infinity();
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    const double its = static_cast<double>(state.demand[j]);
    least = lesser(least, its), most = greater(most, its);
  }
  constexpr double kBeyond = 30.0;  // temperatures
  double low = block_min(least) - kBeyond * temperature;
  double high = -block_min(-most) + kBeyond * temperature;
  double s = fmin(fmax(0.0, low), high);
  for (int turn = 0; turn < kMassSteps; ++turn) {
    const Mass mass = mass_at(state, m, s, temperature, turn);
    const double excess = mass.taken - (m - n);
    (excess > 0.0 ? high : low) = s;
    double next = s - excess / fmax(mass.slope, 1e-300);
    if (!(next > low && next < high)) next = low + (high - low) / 2;
    const bool near = fabs(next - s) < kMassPrecision * temperature;
    s = next;
    if (near) break;
  }
  return s;
}

// Potentials of the columns from the parts' sums, in the same way by every block.
template <class T>
__device__ CROC_NOINLINE void anneal_potentials(Arguments a, double temperature, int page) {
  const Problem<T> p(a);
  const AnnealState<T> state(p, Team::all(), page);
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) total += state.sums_of(part)[j];
    const double its = temperature * static_cast<double>(__logf(fmaxf(total, 1e-37f)));
    state.demand[j] = static_cast<T>(its - static_cast<double>(state.potential[j]));
  }
  const double s = p.m > p.n ? leftover_potential(state, p.n, p.m, temperature) : 0.0;
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
    const double above = static_cast<double>(state.demand[j]) - s;
    double next = -above;
    if (p.m > p.n) {
      const float far = __expf(static_cast<float>(-fabs(above) / temperature));
      next = -fmax(above, 0.0) - temperature * static_cast<double>(__logf(1.0f + far));
    }
    const double before = static_cast<double>(state.potential[j]);
    state.potential[j] = static_cast<T>(before + kRelaxed * (next - before));
  }
  __syncthreads();
}

// Grid (batch, blocks of a cluster). Problems that the first start serves well return at once.
template <class T>
__global__ void __launch_bounds__(kAnnealThreads, 1) anneal(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.many || p.n < kAnnealRows || p.m > kAnnealColumns) return;
  double temperature = kHottest * p.scalars().temperature;
  if (!(temperature > 0.0) || !crowded(p)) return;
  const Team team = Team::all();
  const AnnealState<T> state(p, team, 0);
  for (int j = threadIdx.x; j < state.pitch; j += blockDim.x)
    state.potential[j] = static_cast<T>(p.work.v[j]);
  __syncthreads();
  constexpr int kAll = (kHalvings + 1) * kSteps;
  for (int step = 0; step < kAll; ++step) {
    if (step > 0 && step % kSteps == 0) temperature *= 0.5;
    anneal_rows<T>(a, temperature);
    anneal_columns<T>(a, temperature, step & 1);
    team.wait();
    anneal_potentials<T>(a, temperature, step & 1);
  }
  if (team.rank != 0) return;
  count(p.scalars(), kAnnealSteps, kAll);
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) p.potential()[j] = state.potential[j];
  __syncthreads();
  threshold(p);
}

// Grid (batch, rows / warps): nearest_columns again where the start is another now.
template <class T>
__global__ void nearest_again(Arguments a) {
  const Problem<T> p(a);
  if (p.scalars().counters[kAnnealSteps] > 0) find_nearest(p);
}

}  // namespace croc::gpu
