// A step of annealing by rows, as in anneal_rows.cuh, for float32 costs of no more columns than a
// warp keeps: each warp has a row, and costs come ahead of their time, through shared memory.
#pragma once

#include "anneal_rows.cuh"

namespace croc::gpu {

constexpr int kKept = 16;  // fours of columns per lane: in registers, three times
constexpr int kKeptColumns = 4 * kKept * kWarp;
constexpr int kMostPlaces = 3;  // of the ring; what wait_for_copies can wait for
static_assert(kAtOnce == kAnnealThreads / kWarp, "a row per warp");

// Costs on their way into dynamic shared memory: each place is for a row per warp. A lane asks for
// what it will read itself, so that none waits for another.
struct Ring {
  float4* rows;
  int places;

  static constexpr int kRow = kKept * kWarp;
  static constexpr int kPlace = kAtOnce * kRow;
  static constexpr int kBytes = kPlace * static_cast<int>(sizeof(float4));

  __device__ Ring(unsigned char* shared, int places)
      : rows(reinterpret_cast<float4*>(shared)), places(places) {}
  __device__ int after(int place) const { return place + 1 < places ? place + 1 : 0; }
  __device__ int before(int place) const { return (place > 0 ? place : places) - 1; }
  // Of this lane, the first four of a row.
  __device__ float4* mine(int place) const {
    return rows + place * kPlace + warp_id() * kRow + lane_id();
  }
  // What this lane reads of a row; costs of rows and columns beyond the last are 0.
  template <bool kVectors>
  __device__ void ask(const Costs<float>& costs, int row, int place) const {
    const int column = 4 * lane_id();
    const float* from = costs.base + row * costs.row_stride + column * costs.column_stride;
    float4* to = mine(place);
#pragma unroll
    for (int k = 0; k < kKept; ++k, to += kWarp) {
      const int further = 4 * kWarp * k, left = row < costs.n ? costs.m - column - further : 0;
      float* numbers = reinterpret_cast<float*>(to);
      if (kVectors)
        copy_ahead<16>(numbers, from + further, left > 0);
      else
        for (int c = 0; c < 4; ++c)
          copy_ahead<4>(numbers + c, from + (further + c) * costs.column_stride, left > c);
    }
    close_copies();
  }
  // For all but what was asked for last, as often as there are places besides the one at work.
  __device__ void wait() const { wait_for_copies(places - 1); }
};

// How many places fit into so many bytes. Every device has room for one.
inline int places_within(int bytes) {
  const int fit = bytes / Ring::kBytes;
  return fit < 1 ? 1 : fit < kMostPlaces ? fit : kMostPlaces;
}

__device__ inline int row_of_warp(Turn at) { return at.row + kParts * warp_id(); }

// Before the first step: all places but one.
template <bool kVectors>
__device__ void fill(const Ring& ring, const Problem<float>& p, Team team) {
  Turn ahead(team);
  for (int place = 0; place + 1 < ring.places; ++place, ahead.advance(team, p.n))
    ring.ask<kVectors>(p.costs, row_of_warp(ahead), place);
}

// Of a lane's columns the potentials, in powers of two, and what the warp's rows send there.
struct Columns {
  float potential[kKept][4], total[kKept][4];

  __device__ Columns(const AnnealState<float>& state, int m, float scale) : total{} {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int first = 4 * (lane_id() + kWarp * k);
      state.potentials(first, potential[k]);
#pragma unroll
      for (int c = 0; c < 4; ++c)
        potential[k][c] = first + c < m ? potential[k][c] * scale : static_cast<float>(-infinity());
    }
  }
  // Shares of a row with this potential; returns their sum over the warp.
  __device__ float share(const float4* costs, float sign, float row, float scale,
                         float (&shares)[kKept][4]) const {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kKept; ++k, costs += kWarp) {
      const float x[4] = {costs->x, costs->y, costs->z, costs->w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float z = (row - sign * x[c]) * scale + potential[k][c];
        shares[k][c] = power_of_two(fminf(z, kMostPower));
        sums[c] += shares[k][c];
      }
    }
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return fmaxf(sum, 1e-37f);
  }
  __device__ void add(const float (&shares)[kKept][4], float factor) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
#pragma unroll
      for (int c = 0; c < 4; ++c) total[k][c] += shares[k][c] * factor;
    }
  }
  // At the end of a part, to `sums`, through a place whose costs have been used.
  __device__ void send(const Ring& ring, int place, float* sums, int m) {
    float4* to = ring.mine(place);
#pragma unroll
    for (int k = 0; k < kKept; ++k, to += kWarp) {
      *to = {total[k][0], total[k][1], total[k][2], total[k][3]};
      total[k][0] = total[k][1] = total[k][2] = total[k][3] = 0.0f;
    }
    __syncthreads();
    for (int four = threadIdx.x; 4 * four < m; four += kAnnealThreads) {
      const float4* from = ring.rows + place * Ring::kPlace + four;
      float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < kAtOnce; ++w, from += Ring::kRow)
        sum.x += from->x, sum.y += from->y, sum.z += from->z, sum.w += from->w;
      reinterpret_cast<float4*>(sums)[four] = sum;
    }
    __syncthreads();
  }
};

// `place` is where the first rows' costs are; returns where those of the next step will be, of
// which some have been asked for.
template <bool kVectors>
__device__ CROC_NOINLINE int anneal_rows_ahead(Arguments a, double temperature, int page,
                                               int place) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<float> p(a);
  const AnnealState<float> state(p, page);
  const Team team = Team::all();
  const Ring ring(shared, a.ring_places);
  const float scale = static_cast<float>(kLog2OfE / temperature);
  Columns columns(state, p.m, scale);
  // Known to the first lane, which also writes it.
  const auto potential_of = [&](int row) {
    return lane_id() == 0 && row < p.n ? p.work.row_value[row] : -infinity();
  };
  Turn now(team), ahead = now;
  for (int k = 1; k < ring.places; ++k) ahead.advance(team, p.n);
  double before = potential_of(row_of_warp(now));
  for (bool more = true; more; place = ring.after(place)) {
    ring.ask<kVectors>(p.costs, row_of_warp(ahead), ring.before(place));
    ahead.advance(team, p.n);
    const Turn at = now;
    more = now.advance(team, p.n);
    const double next = more ? potential_of(row_of_warp(now)) : 0.0;  // on its way meanwhile
    ring.wait();
    float shares[kKept][4];
    const float potential = __shfl_sync(kAllLanes, static_cast<float>(before), 0);
    const float sum = columns.share(ring.mine(place), p.costs.sign, potential, scale, shares);
    columns.add(shares, __fdividef(1.0f, sum));
    if (lane_id() == 0 && row_of_warp(at) < p.n)
      p.work.row_value[row_of_warp(at)] = before - temperature * static_cast<double>(__logf(sum));
    before = next;
    if (!more || now.part != at.part) columns.send(ring, place, state.sums_of(at.part), p.m);
  }
  return place;
}

}  // namespace croc::gpu
