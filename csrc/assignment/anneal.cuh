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

#include "cluster.cuh"
#include "nearest.cuh"

namespace croc::gpu {

constexpr int kAnnealThreads = 256;      // always: the order of sums depends on it
constexpr int kFours = 2;                // of columns per thread
constexpr int kAnnealRows = 272;         // fewer are matched faster than annealed
constexpr int kAnnealColumns = 1 << 15;  // more have no room in what follows
constexpr int kCrowded = 3;              // more than n / 3 rows are not alone, or first in line
constexpr int kParts = 16;               // of the rows: part k has every 16th, from k on
constexpr int kAtOnce = 8;               // rows; sums_of_warp is made for as many
constexpr int kMassSteps = 8;            // of Newton's method, at most
constexpr double kMassPrecision = 0.02;  // of s, in temperatures
constexpr double kMassStep = 16.0;       // and at most at a time
constexpr double kLog2OfE = 1.4426950408889634;
constexpr float kMostPower = 100.0f;  // of two, of a row's share before its sum is known

// From a temperature of kHottest times that of the first steps on it falls by half, so many times,
// with kSteps at each, or fewer once no potential of a column is further from its new value than
// kSettled temperatures; a potential goes kRelaxed times as far as to that.
constexpr double kHottest = 8.0, kHottestMany = 32.0;  // with many rows
constexpr int kHalvings = 6, kHalvingsMany = 8, kSteps = 6;
constexpr double kRelaxed = 1.5, kSettled = 0.15;

// What the blocks write: sums of two steps in turn, since a block may begin the next step while
// another still reads this one's. The copies of columns, or the levels where others of the batch
// have many rows, come later: their memory is free. It takes 192 bytes per column in float32 and
// 256 in float64; both have at least n.
template <class T>
struct AnnealState {
  int pitch;
  float* sums;   // (kParts, padded m)
  T* potential;  // (padded m) this block's, of the columns
  T* demand;     // (padded m) and what the rows alone would make of them, negated

  __device__ AnnealState(const Problem<T>& p, int page) : pitch(padded(p.m)) {
    float* first = static_cast<float*>(p.slots > 0 ? p.work.copies : p.work.level);
    const int64_t page_size = int64_t{kParts} * pitch;
    sums = first + page * page_size;
    potential = reinterpret_cast<T*>(first + 2 * page_size) + 2 * Team::all().rank * pitch;
    demand = potential + pitch;
  }
  __device__ float* sums_of(int part) const { return sums + part * pitch; }
  // Four potentials, -inf beyond the last column.
  __device__ void potentials(int first, T (&out)[4]) const {
    if (first < pitch)
      four(potential, first, out);
    else
      out[0] = out[1] = out[2] = out[3] = static_cast<T>(-infinity());
  }
};

// Whether more than a third of the rows would be left free by a matching of nearest columns, or of
// many rows more than five ninths: with fewer their auction is faster.
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
  const int free = p.n - block_count(served, 0);
  return p.many ? 9 * free > 5 * p.n : kCrowded * free > p.n;
}

// Sums of eight numbers over a warp: lanes 4 k to 4 k + 3 get the k-th.
__device__ inline float sums_of_warp(float (&x)[kAtOnce]) {
#pragma unroll
  for (int half = kAtOnce / 2, step = kWarp / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = (lane_id() & step) != 0;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float given = upper ? x[k] : x[k + half];
      x[k] = (upper ? x[k + half] : x[k]) + __shfl_xor_sync(kAllLanes, given, step);
    }
  }
  x[0] += __shfl_xor_sync(kAllLanes, x[0], 2);
  return x[0] + __shfl_xor_sync(kAllLanes, x[0], 1);
}

// And over the block: lane k gets the k-th, as do those 8, 16 and 24 lanes after it. `turn` as in
// block_least.
__device__ inline float sums_of_block(float (&x)[kAtOnce], int turn) {
  __shared__ float slots[2][kAnnealThreads / kWarp][kAtOnce];
  const float of_warp = sums_of_warp(x);
  if (lane_id() % 4 == 0) slots[turn & 1][warp_id()][lane_id() / 4] = of_warp;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kAnnealThreads / kWarp; w += 4)
    sum += slots[turn & 1][w + lane_id() / kAtOnce][lane_id() % kAtOnce];
  sum += __shfl_xor_sync(kAllLanes, sum, 8);
  return sum + __shfl_xor_sync(kAllLanes, sum, 16);
}

// Shares of a few rows in a thread's columns: `first` to first + 3, and as many again
// 4 * kAnnealThreads further on. Before they are divided by the sums of their rows.
using Shares = float[kAtOnce][kFours][4];

// A few rows of a part: what a thread needs of them. Those beyond the last have a potential of
// -inf, and any costs; so have columns beyond the last.
template <class T, bool kVectors>
struct FewRows {
  const Costs<T>& costs;
  T x[kAtOnce][kFours][4];
  T potential[kAtOnce];

  __device__ void load(int row, int first) {
    const T* from = costs.base + row * costs.row_stride;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r, from += kParts * costs.row_stride) {
      if (row + kParts * r >= costs.n) continue;
#pragma unroll
      for (int f = 0; f < kFours; ++f) {
        const int column = first + 4 * kAnnealThreads * f;
        if (column >= costs.m) continue;
        if (kVectors)
          Costs<T>::load_vector(from + column, x[r][f]);
        else
          costs.load_each(from, column, x[r][f]);
      }
    }
  }
  __device__ void share(const AnnealState<T>& state, int first, T scale, Shares& shares) const {
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      T columns[4];
      state.potentials(first + 4 * kAnnealThreads * f, columns);
#pragma unroll
      for (int c = 0; c < 4; ++c) columns[c] *= scale;
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const T z = (potential[r] - costs.sign * x[r][f][c]) * scale + columns[c];
          shares[r][f][c] = power_of_two(fminf(static_cast<float>(z), kMostPower));
        }
      }
    }
  }
};

__device__ inline void add_shares(const Shares& shares, float (&sums)[kAtOnce]) {
#pragma unroll
  for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
    for (int f = 0; f < kFours; ++f)
      sums[r] += (shares[r][f][0] + shares[r][f][1]) + (shares[r][f][2] + shares[r][f][3]);
  }
}

// Adds them to the sums of a thread's columns, which `begin` with them.
__device__ inline void send_shares(const Shares& shares, const float (&factors)[kAtOnce],
                                   float* sums, int first, int m, bool begin) {
#pragma unroll
  for (int f = 0; f < kFours; ++f) {
    const int column = first + 4 * kAnnealThreads * f;
    if (column >= m) continue;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!begin) four(sums, column, total);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] += shares[r][f][c] * factors[r];
    }
    *reinterpret_cast<float4*>(sums + column) = {total[0], total[1], total[2], total[3]};
  }
}

// Potentials of the rows, and of each column what a part's rows send there. Costs are read once,
// float32 while the rows before are at work; `kWide`: a thread has more columns than it keeps, and
// reads them twice. A row's sum is made under its potential of the step before, and so needs no
// maximum: should that be far off, it takes another step or two to come near.
//
// The phases of a step are not inlined, so that each has the registers to itself.
template <class T, bool kVectors, bool kWide>
__device__ CROC_NOINLINE void anneal_rows(Arguments a, double temperature, int page) {
  constexpr bool kAhead = sizeof(T) == 4 && !kWide;
  const Problem<T> p(a);
  const AnnealState<T> state(p, page);
  const T scale = static_cast<T>(kLog2OfE / temperature);
  const int mine = 4 * static_cast<int>(threadIdx.x);
  FewRows<T, kVectors> rows{p.costs, {}, {}};
  int part = Team::all().rank, row = part;
  if (kAhead) rows.load(row, mine);
  for (int turn = 0; part < kParts; ++turn) {
    int next_part = part, next_row = row + kParts * kAtOnce;
    if (next_row >= p.n) next_part = next_row = part + Team::all().size;
    const int its_row = row + kParts * (lane_id() % kAtOnce);
    const double before = its_row < p.n ? p.work.row_value[its_row] : -infinity();
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      rows.potential[r] = __shfl_sync(kAllLanes, static_cast<T>(before), r);
    Shares shares;
    const auto share = [&](int first) {
      if (!kAhead) rows.load(row, first);
      rows.share(state, first, scale, shares);
      if (kAhead && next_part < kParts) rows.load(next_row, first);
    };
    float factors[kAtOnce] = {};  // the rows' sums, at first
    for (int first = mine; first < p.m; first += 4 * kFours * kAnnealThreads) {
      share(first);
      add_shares(shares, factors);
      if (!kWide) break;
    }
    const float sum = fmaxf(sums_of_block(factors, turn), 1e-37f);
    if (warp_id() == 0 && lane_id() < kAtOnce && its_row < p.n)
      p.work.row_value[its_row] = before - temperature * static_cast<double>(__logf(sum));
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) factors[r] = __shfl_sync(kAllLanes, __fdividef(1.0f, sum), r);
    for (int first = mine; first < p.m; first += 4 * kFours * kAnnealThreads) {
      if (kWide) share(first);
      send_shares(shares, factors, state.sums_of(part), first, p.m, row == part);
      if (!kWide) break;
    }
    part = next_part, row = next_row;
  }
}

// What the row of leftover columns takes at potential s, and by how much more for each temperature
// that s rises. Called by all threads; the same for all.
struct Mass {
  float taken, slope;
};

template <class T>
__device__ Mass mass_at(const AnnealState<T>& state, double s, T scale, int turn) {
  __shared__ Mass slots[2][kWarp];
  Mass mass = {0.0f, 0.0f};
  for (int first = 4 * static_cast<int>(threadIdx.x); first < state.pitch;
       first += 4 * kAnnealThreads) {
    T demand[4];
    four(state.demand, first, demand);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float z = static_cast<float>((demand[c] - static_cast<T>(s)) * scale);
      const float its = __fdividef(1.0f, 1.0f + power_of_two(fminf(z, kMostPower)));
      mass.taken += its, mass.slope += its * (1.0f - its);
    }
  }
  const auto sum = [](float& x, int most) {
#pragma unroll
    for (int step = most; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  };
  sum(mass.taken, kWarp / 2), sum(mass.slope, kWarp / 2);
  if (lane_id() == 0) slots[turn & 1][warp_id()] = mass;
  __syncthreads();
  mass = slots[turn & 1][lane_id() % (kAnnealThreads / kWarp)];
  sum(mass.taken, kAnnealThreads / kWarp / 2), sum(mass.slope, kAnnealThreads / kWarp / 2);
  return mass;
}

// The s at which m - n columns are taken, from that of the step before.
template <class T>
__device__ double leftover_potential(const AnnealState<T>& state, int n, int m, double temperature,
                                     double s) {
  const T scale = static_cast<T>(kLog2OfE / temperature);
  double low = -infinity(), high = infinity();
  for (int turn = 0; turn < kMassSteps; ++turn) {
    const Mass mass = mass_at(state, s, scale, turn);
    const double excess = static_cast<double>(mass.taken) - (m - n);
    const double wanted = -excess / static_cast<double>(fmaxf(mass.slope, 1e-30f));
    const double step = temperature * fmin(fmax(wanted, -kMassStep), kMassStep);
    (excess > 0.0 ? high : low) = s;
    double next = s + step;
    if (fabs(step) < kMassPrecision * temperature) return next;
    if (!(next > low && next < high)) next = low + (high - low) / 2;
    s = next;
  }
  return s;
}

struct Leftover {
  double s;         // the potential of the leftover columns
  float unsettled;  // how far a column's potential was from its new value, at most
};

// Potentials of the columns from the parts' sums, in the same way by every block.
template <class T>
__device__ CROC_NOINLINE Leftover anneal_columns(Arguments a, double temperature, double s,
                                                 int page) {
  const Problem<T> p(a);
  const AnnealState<T> state(p, page);
  const int mine = 4 * static_cast<int>(threadIdx.x), stride = 4 * kAnnealThreads;
  for (int first = mine; first < state.pitch; first += stride) {
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float its[4];
      four(state.sums_of(part), first, its);
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] += its[c];
    }
    T potential[4];
    four(state.potential, first, potential);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const double its = temperature * static_cast<double>(__logf(fmaxf(total[c], 1e-37f)));
      state.demand[first + c] = first + c < p.m ? static_cast<T>(its) - potential[c]
                                                : static_cast<T>(1e30);  // nothing left there
    }
  }
  if (p.m > p.n) s = leftover_potential(state, p.n, p.m, temperature, s);
  const double per_power = kLog2OfE / temperature;
  float unsettled = 0.0f;
  for (int first = mine; first < p.m; first += stride) {
    T demand[4], before[4];
    four(state.demand, first, demand), four(state.potential, first, before);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (first + c >= p.m) continue;
      const double above = static_cast<double>(demand[c]) - (p.m > p.n ? s : 0.0);
      double next = -above;
      if (p.m > p.n) {
        const float far = power_of_two(static_cast<float>(-fabs(above) * per_power));
        next = -fmax(above, 0.0) - temperature * static_cast<double>(__logf(1.0f + far));
      }
      const double its = static_cast<double>(before[c]);
      state.potential[first + c] = static_cast<T>(its + kRelaxed * (next - its));
      unsettled = fmaxf(unsettled, static_cast<float>(fabs(next - its)));
    }
  }
  return {s, block_most(unsettled, page)};
}

// Grid (batch, blocks of a cluster). Problems that the first start serves well return at once.
template <class T>
__global__ void __launch_bounds__(kAnnealThreads, 1) anneal(Arguments a) {
  const Problem<T> p(a);
  if (p.failed() || p.n < kAnnealRows || p.m > kAnnealColumns) return;
  const double hottest = p.many ? kHottestMany : kHottest;
  double temperature = hottest * p.scalars().temperature;
  if (!(temperature > 0.0) || !crowded(p)) return;
  const Team team = Team::all();
  const AnnealState<T> state(p, 0);
  for (int j = threadIdx.x; j < state.pitch; j += blockDim.x)
    state.potential[j] = static_cast<T>(p.work.v[j]);
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    if (i % kParts % team.size == team.rank) p.work.row_value[i] = p.work.u[i];
  __syncthreads();
  const bool vectors = p.costs.vectors, wide = p.m > 4 * kFours * kAnnealThreads;
  const int halvings = p.many ? kHalvingsMany : kHalvings;
  Leftover leftover{0.0, 0.0f};
  int steps = 0;
  for (int halving = 0; halving <= halvings; ++halving, temperature *= 0.5) {
    for (int step = 0; step < kSteps; ++step, ++steps) {
      if (step > 0 && leftover.unsettled < kSettled * temperature) break;
      if (wide)
        vectors ? anneal_rows<T, true, true>(a, temperature, steps & 1)
                : anneal_rows<T, false, true>(a, temperature, steps & 1);
      else
        vectors ? anneal_rows<T, true, false>(a, temperature, steps & 1)
                : anneal_rows<T, false, false>(a, temperature, steps & 1);
      team.wait();
      leftover = anneal_columns<T>(a, temperature, leftover.s, steps & 1);
    }
  }
  if (team.rank != 0) return;
  __syncthreads();
  count(p.scalars(), kAnnealSteps, steps);
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) p.potential()[j] = state.potential[j];
  __syncthreads();
  threshold(p);
}

// Grid (batch, rows / warps): nearest_columns again where the start is another now.
template <class T>
__global__ void nearest_again(Arguments a) {
  const Problem<T> p(a);
  if (p.annealed()) find_nearest(p);
}

}  // namespace croc::gpu
