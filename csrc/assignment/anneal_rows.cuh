// A step of annealing (anneal.cuh) by rows: their potentials, and what they send to each column.
#pragma once

#include "cluster.cuh"
#include "problem.cuh"

namespace croc::gpu {

constexpr int kAnnealThreads = 256;  // always: the order of sums depends on it
constexpr int kFours = 2;            // of columns per thread, at a time
constexpr int kParts = 8;            // of the rows: part k has every 8th, from k on
constexpr int kAtOnce = 8;           // rows; sums_of_warp is made for as many
constexpr double kLog2OfE = 1.4426950408889634;
constexpr float kMostPower = 100.0f;  // of two, of a row's share before its sum is known

// What the blocks write: sums of two steps in turn, since a block may begin the next step while
// another still reads this one's. The copies of columns, or the levels where others of the batch
// have many rows, come later: their memory is free. It takes 128 bytes per column in float32 and
// 192 in float64; both have at least n.
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

// The rows of a block, kAtOnce at a time, again and again.
struct Turn {
  int part, row;

  __device__ explicit Turn(Team team) : part(team.rank), row(team.rank) {}
  // False: back at the first.
  __device__ bool advance(Team team, int n) {
    row += kParts * kAtOnce;
    if (row < n) return true;
    part += team.size;
    const bool more = part < kParts;
    if (!more) part = team.rank;
    row = part;
    return more;
  }
};

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

// Potentials of the rows, and of each column what a part's rows send there. A row's sum is made
// under its potential of the step before, and so needs no maximum: should that be far off, it takes
// another step or two to come near. Costs are read twice.
//
// The phases of a step are not inlined, so that each has the registers to itself.
template <class T, bool kVectors>
__device__ CROC_NOINLINE void anneal_rows(Arguments a, double temperature, int page) {
  const Problem<T> p(a);
  const AnnealState<T> state(p, page);
  const Team team = Team::all();
  const T scale = static_cast<T>(kLog2OfE / temperature);
  const int mine = 4 * static_cast<int>(threadIdx.x);
  FewRows<T, kVectors> rows{p.costs, {}, {}};
  Turn now(team);
  bool more = true;
  for (int turn = 0; more; ++turn) {
    const Turn at = now;
    const int its_row = at.row + kParts * (lane_id() % kAtOnce);
    const double before = its_row < p.n ? p.work.row_value[its_row] : -infinity();
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      rows.potential[r] = __shfl_sync(kAllLanes, static_cast<T>(before), r);
    Shares shares;
    float factors[kAtOnce] = {};  // the rows' sums, at first
    for (int first = mine; first < p.m; first += 4 * kFours * kAnnealThreads) {
      rows.load(at.row, first);
      rows.share(state, first, scale, shares);
      add_shares(shares, factors);
    }
    const float sum = fmaxf(sums_of_block(factors, turn), 1e-37f);
    if (warp_id() == 0 && lane_id() < kAtOnce && its_row < p.n)
      p.work.row_value[its_row] = before - temperature * static_cast<double>(__logf(sum));
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) factors[r] = __shfl_sync(kAllLanes, __fdividef(1.0f, sum), r);
    for (int first = mine; first < p.m; first += 4 * kFours * kAnnealThreads) {
      rows.load(at.row, first);
      rows.share(state, first, scale, shares);
      send_shares(shares, factors, state.sums_of(at.part), first, p.m, at.row == at.part);
    }
    more = now.advance(team, p.n);
  }
}

}  // namespace croc::gpu
