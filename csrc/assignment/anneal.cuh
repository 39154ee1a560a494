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

#include "anneal_ahead.cuh"
#include "nearest.cuh"

namespace croc::gpu {

constexpr int kAnnealRows = 272;         // fewer are matched faster than annealed
constexpr int kAnnealColumns = 1 << 15;  // more have no room in what follows
constexpr int kMassSteps = 8;            // of Newton's method, at most
constexpr double kMassPrecision = 0.02;  // of s, in temperatures
constexpr double kMassStep = 16.0;       // and at most at a time

// From a temperature of kHottest times that of the first steps on it falls by half, so many times,
// with kSteps at each, or fewer once no potential of a column is further from its new value than so
// many temperatures; a potential goes kRelaxed times as far as to that. Where it is hot most rows
// find out how far they have to go: the last kCold temperatures settle what is near.
constexpr double kHottest = 8.0, kHottestMany = 32.0;  // with many rows
constexpr int kHalvings = 6, kHalvingsMany = 8, kSteps = 6, kCold = 3;
constexpr double kRelaxed = 1.5, kSettled = 0.03, kSettledCold = 0.3, kSettledMany = 0.15;

// Whether the first start crowds the columns. Of many rows more than five ninths would be left free
// by a matching of nearest columns: with fewer their auction is faster. Of others more than a
// third, and the last Sinkhorn step, too, still sent more rows than 3 n / 16 to columns that were
// full: rows that wait, but whose next columns are about as near, are matched faster than annealed.
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
  if (p.many) return 9 * free > 5 * p.n;
  return 3 * free > p.n && 16 * p.scalars().overload > 3u * kOverload * p.n;
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

// Whether costs come ahead of their time.
template <class T>
__device__ bool ahead(const Problem<T>& p) {
  return sizeof(T) == 4 && p.m <= kKeptColumns;
}

// A step by rows. The ring, if there is one, is at `place`, and later at what is returned.
template <class T>
__device__ int anneal_all_rows(const Arguments& a, const Problem<T>& p, double temperature,
                               int page, int place) {
  if constexpr (sizeof(T) == 4) {
    if (ahead(p))
      return p.costs.vectors ? anneal_rows_ahead<true>(a, temperature, page, place)
                             : anneal_rows_ahead<false>(a, temperature, page, place);
  }
  p.costs.vectors ? anneal_rows<T, true>(a, temperature, page)
                  : anneal_rows<T, false>(a, temperature, page);
  return place;
}

// Grid (batch, blocks of a cluster). Problems that the first start serves well return at once.
template <class T>
__global__ void __launch_bounds__(kAnnealThreads, 1) anneal(Arguments a) {
  CROC_DYNAMIC_SHARED(shared);
  const Problem<T> p(a);
  if (p.failed() || p.n < kAnnealRows || p.m > kAnnealColumns) return;
  const double hottest = p.many ? kHottestMany : kHottest;
  double temperature = hottest * p.scalars().temperature;
  if (!(temperature > 0.0) || !crowded(p)) return;
  const Team team = Team::all();
  const AnnealState<T> state(p, 0);
  if constexpr (sizeof(T) == 4) {
    const Ring ring(shared, a.ring_places);
    if (ahead(p)) p.costs.vectors ? fill<true>(ring, p, team) : fill<false>(ring, p, team);
  }
  for (int j = threadIdx.x; j < state.pitch; j += blockDim.x)
    state.potential[j] = static_cast<T>(p.work.v[j]);
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    if (i % kParts % team.size == team.rank) p.work.row_value[i] = p.work.u[i];
  __syncthreads();
  const int halvings = p.many ? kHalvingsMany : kHalvings;
  Leftover leftover{0.0, 0.0f};
  int steps = 0, place = 0;
#pragma unroll 1
  for (int halving = 0; halving <= halvings; ++halving, temperature *= 0.5) {
    const double settled = p.many                       ? kSettledMany
                           : halving + kCold > halvings ? kSettledCold
                                                        : kSettled;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step, ++steps) {
      if (step > 0 && leftover.unsettled < settled * temperature) break;
      place = anneal_all_rows(a, p, temperature, steps & 1, place);
      team.wait();
      leftover = anneal_columns<T>(a, temperature, leftover.s, steps & 1);
    }
  }
  wait_for_copies(0);
  if (team.rank != 0) return;
  __syncthreads();
  count(p.scalars(), kAnnealSteps, steps);
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) p.potential()[j] = state.potential[j];
  __syncthreads();
  threshold(p);
}

// Grid (batch, rows / warps): nearest_columns again where the start is another now; the order of
// rows where some are alike.
template <class T>
__global__ void nearest_again(Arguments a) {
  Workspace work;
  work.carve(a.workspace + blockIdx.x * a.workspace_stride, a);
  const int steps = work.scalars->counters[kAnnealSteps], copies = work.scalars->copies;
  if ((steps | copies) == 0) return;  // one wait for both
  const Problem<T> p(a);
  if (p.annealed()) find_nearest(p);
  if (p.alike()) order_row(p);
}

}  // namespace croc::gpu
