// Rows with the same costs bid as one (Bertsekas, Castanon 1989: similar persons). Each for itself
// they all want the same column: one of them gets it, and a round later the others want the next.
//
// A kind is all rows with the same costs. If f of them are free, the kind's level is the f + 1st
// least reduced cost of the columns that none of them has. The f nearer columns are bid for down to
// that level (plus epsilon), one by each free row, and those that the kind has are bid for again,
// down to the same level, or another kind would find them cheaper than they are to this one. Then
// no column is nearer to any of these rows than the level: all of them are as after a bid by one.
#pragma once

#include "candidates.cuh"
#include "cluster.cuh"

namespace croc::gpu {

constexpr int kNobody = 0x7fffffff;
constexpr int kFewCopies = 3;  // of a row, itself among them, that bid each for itself
constexpr int kKeys = 64;      // columns per lane that are chosen from at once
constexpr int kWindowColumns = kKeys * kWarp;

// What is at work in a round: the listed rows, and of which kinds.
struct Listed {
  int free, rows, kinds;
};

// Lists the rows of every kind that has a free row, kind by kind, and where in the list each kind
// begins in s.path, which nobody needs until bids are awarded. `order`: all rows by kind.
__device__ inline Listed list_kinds(const State& s, const int* order, int n) {
  Listed listed{};
  int* kinds = s.path;
  __syncthreads();  // bids have been awarded
  for (int i = threadIdx.x; i < n; i += blockDim.x) kinds[i] = 0;
  __syncthreads();
  int free = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (s.column_of[i] >= 0) continue;
    atomicOr(&kinds[s.twin[i]], 1);
    ++free;
  }
  listed.free = block_count(free, 0);
  listed.rows = block_collect(n, s.list, n, [&](int k) { return kinds[s.twin[order[k]]] != 0; });
  for (int k = threadIdx.x; k < listed.rows; k += blockDim.x) s.list[k] = order[s.list[k]];
  __syncthreads();
  listed.kinds = block_collect(listed.rows, kinds, n, [&](int k) {
    return k == 0 || s.twin[s.list[k]] != s.twin[s.list[k - 1]];
  });
  return listed;
}

__device__ inline void forget_kinds(const State& s, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) s.path[i] = kNobody;
  __syncthreads();
}

__device__ inline void outbid(const State& s, int column, double price) {
  atomicMin(reinterpret_cast<unsigned long long*>(&s.best[column]),
            static_cast<unsigned long long>(ordered(price)));
}

__device__ inline int bit_count(uint64_t x) {
  return __popc(static_cast<unsigned>(x)) + __popc(static_cast<unsigned>(x >> 32));
}

__device__ inline int warp_total(int x) {
  return static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(x)));
}

// The sum over the lanes before this one.
__device__ inline int sum_before(int mine) {
  int sum = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_sync(kAllLanes, sum, (lane_id() - step) & (kWarp - 1));
    if (lane_id() >= step) sum += other;
  }
  return sum - mine;
}

// The columns that no row of a kind has, by a warp.
template <class T>
struct KindColumns {
  const Costs<T>& costs;
  const State& s;
  int row, kind;

  __device__ KindColumns(const Costs<T>& costs, const State& s, int row)
      : costs(costs), s(s), row(row), kind(s.twin[row]) {}
  __device__ double reduced(int column) const { return costs.at(row, column) - s.v[column]; }
  __device__ bool has(int column) const {
    const int owner = s.row_of[column];
    return owner < 0 || s.twin[owner] != kind;
  }
  // The nearest of those from first to last - 1.
  __device__ Least nearest(int first, int last) const {
    Least least = Least::none();
#pragma unroll 8
    for (int column = first + lane_id(); column < last; column += kWarp) {
      const double x = reduced(column);
      const Least mine{ordered(x), static_cast<unsigned>(column)};
      if (is_finite(x) && has(column) && mine < least) least = mine;
    }
    return warp_least(least);
  }
};

// As many of them as a warp can choose from at once. A lane has every 32nd; a bit stands for each.
template <class T>
struct Window {
  int first;            // the lane's first column
  double least;         // the least reduced cost, infinite if there is no column
  unsigned key[kKeys];  // how much further a column is, as a float rounded down; ~0: none

  __device__ Window(const KindColumns<T>& of, int start) : first(start + lane_id()) {
    const Costs<T>& costs = of.costs;
    const int room = costs.m - first;
    const T* from = costs.base + of.row * costs.row_stride + first * costs.column_stride;
    const int64_t step = kWarp * costs.column_stride;
    const double* v = of.s.v + first;
    T cost[kKeys];
#pragma unroll
    for (int h = 0; h < kKeys; ++h)
      cost[h] = h * kWarp < room ? __ldg(from + h * step) : static_cast<T>(0);
    const auto reduced = [&](int h) {
      return static_cast<double>(costs.sign * cost[h]) - (h * kWarp < room ? v[h * kWarp] : 0.0);
    };
    uint64_t there = 0;
    double mine = infinity();
#pragma unroll
    for (int h = 0; h < kKeys; ++h) {
      const double x = reduced(h);
      const bool is = h * kWarp < room && is_finite(x) && of.has(first + h * kWarp);
      there |= static_cast<uint64_t>(is) << h;
      mine = is ? lesser(mine, x) : mine;
    }
    least = from_ordered(warp_min(ordered(mine)));
    __syncwarp();  // the duals are read again: there are no registers to keep them in
#pragma unroll
    for (int h = 0; h < kKeys; ++h) key[h] = (there >> h & 1) != 0 ? key_of(reduced(h)) : ~0u;
  }
  __device__ unsigned key_of(double reduced) const {
    return __float_as_uint(__double2float_rd(reduced - least + 0.0));  // minus zero is no key
  }
  __device__ int column(uint64_t bits) const {
    return first + (__ffsll(static_cast<long long>(bits)) - 1) * kWarp;
  }
  __device__ uint64_t below(unsigned threshold) const {
    uint64_t bits = 0;
#pragma unroll
    for (int h = 0; h < kKeys; ++h) bits |= static_cast<uint64_t>(key[h] < threshold) << h;
    return bits;
  }
  __device__ int count_below(unsigned threshold) const {
    int count[4] = {};  // side by side
#pragma unroll
    for (int h = 0; h < kKeys; ++h) count[h % 4] += key[h] < threshold;
    return warp_total((count[0] + count[1]) + (count[2] + count[3]));
  }
  // The largest threshold with at most `most` keys below it.
  __device__ unsigned threshold(int most) const {
    unsigned low = 0, high = 0x7f800000u;  // of infinity
    if (count_below(high) <= most) return high;
#pragma unroll 1
    for (int count = 0; high - low > 1 && count != most;) {
      const unsigned middle = low + (high - low) / 2;
      const int its = count_below(middle);
      if (its > most)
        high = middle;
      else
        low = middle, count = its;
    }
    return low;
  }
  // Those of the least key that is not below.
  __device__ uint64_t next(unsigned threshold) const {
    unsigned least_key = ~0u;
#pragma unroll
    for (int h = 0; h < kKeys; ++h)
      least_key = key[h] >= threshold ? min(least_key, key[h]) : least_key;
    least_key = __reduce_min_sync(kAllLanes, least_key);
    uint64_t bits = 0;
#pragma unroll
    for (int h = 0; h < kKeys; ++h) bits |= static_cast<uint64_t>(key[h] == least_key) << h;
    return least_key == ~0u ? 0 : bits;
  }
};

// What a kind bids for: so many columns, down to a level, and by how much beyond it.
struct KindBid {
  int columns;
  double level, epsilon;
};

// Adds columns of the level itself, unmatched ones and, with an epsilon, matched ones, until
// as many are chosen as rows are free. They are left in `chosen`; returns how many are there.
template <class T>
__device__ int add_equal(const KindColumns<T>& of, const Window<T>& window, uint64_t nearest,
                         double level, bool matched_too, int* chosen, int count, int free) {
#pragma unroll 1
  for (int matched = 0; matched <= static_cast<int>(matched_too) && count < free; ++matched) {
    uint64_t equal = 0;
    for (uint64_t bits = nearest; bits != 0; bits &= bits - 1) {
      const int column = window.column(bits);
      if ((of.s.row_of[column] >= 0) == (matched != 0) && of.reduced(column) == level)
        equal |= bits & (~bits + 1);
    }
    // Kinds begin at lanes of their own, or all would bid for the same of these.
    const int before = sum_before(bit_count(equal)), all = warp_total(bit_count(equal));
    const int start = __shfl_sync(kAllLanes, before, rotation(of.kind, kWarp));
    int rank = count + before - start + (before < start ? all : 0);
    for (uint64_t bits = equal; bits != 0 && rank < free; bits &= bits - 1)
      chosen[rank++] = window.column(bits);
    count = min(count + all, free);
  }
  return count;
}

// Chooses columns for `free` rows of a kind and leaves them in `chosen`.
template <class T>
__device__ KindBid choose_columns(const KindColumns<T>& of, int* chosen, int free, double epsilon) {
  const int m = of.costs.m;
  int start = 0;  // beyond a window's columns, the window with the nearest
  if (m > kWindowColumns) {
    const unsigned nearest = min(of.nearest(0, m).key, static_cast<unsigned>(m - 1));
    start = static_cast<int>(nearest) / kWindowColumns * kWindowColumns;
  }
  const Window<T> window(of, start);
  if (!is_finite(window.least)) return {0, -infinity(), 0.0};
  double level = infinity();
  unsigned threshold = window.threshold(free);
  if (m > kWindowColumns) {  // no column of another window may be nearer than one that is chosen
    const Least before = of.nearest(0, start), after = of.nearest(start + kWindowColumns, m);
    const Least beyond = before < after ? before : after;
    if (beyond.key != ~0u) {
      level = from_ordered(beyond.value);
      threshold = min(threshold, window.key_of(level));
    }
  }
  const uint64_t nearer = window.below(threshold), nearest = window.next(threshold);
  double mine = infinity();
  for (uint64_t bits = nearest; bits != 0; bits &= bits - 1)
    mine = lesser(mine, of.reduced(window.column(bits)));
  level = lesser(level, from_ordered(warp_min(ordered(mine))));
  const int count = warp_total(bit_count(nearer));
  int rank = sum_before(bit_count(nearer));
  for (uint64_t bits = nearer; bits != 0; bits &= bits - 1) chosen[rank++] = window.column(bits);
  if (is_finite(level)) {
    const bool matched_too = epsilon > 0.0;
    return {add_equal(of, window, nearest, level, matched_too, chosen, count, free), level,
            epsilon};
  }
  // No other column is left: any level is right, so none is made up.
  double furthest = -infinity();
  for (uint64_t bits = nearer; bits != 0; bits &= bits - 1)
    furthest = greater(furthest, of.reduced(window.column(bits)));
  return {count, -from_ordered(warp_min(ordered(-furthest))), 0.0};
}

// Bids of a kind, whose rows are s.list[first..end-1]. By one warp; returns whether any was made.
// Copies of its arguments leave the caller's own in registers.
template <class T>
__device__ CROC_NOINLINE bool kind_bids(Costs<T> costs, State s, Team team, int first, int end,
                                       double epsilon) {
  const KindColumns<T> of(costs, s, s.list[first]);
  const auto is_free = [&](int k) { return k < end && s.column_of[s.list[k]] < 0; };
  int free = 0;
  for (int k = first; k < end; k += kWarp)
    free += __popc(__ballot_sync(kAllLanes, is_free(k + lane_id())));
  int* chosen = s.target + first;  // until the rows' own are written
  const KindBid bid = choose_columns(of, chosen, free, epsilon);
  __syncwarp();
  bool made = false;
  int before = free;  // free rows before those at work, which begin with the last
  for (int start = first + (end - first - 1) / kWarp * kWarp; start >= first; start -= kWarp) {
    const int k = start + lane_id(), row = k < end ? s.list[k] : -1;
    const bool bids = is_free(k);
    const unsigned votes = __ballot_sync(kAllLanes, bids);
    before -= __popc(votes);
    const int rank = before + __popc(votes & ((1u << lane_id()) - 1u));
    int column = -1;
    if (bids && rank < bid.columns) column = chosen[rank];  // from no later place than k
    if (row >= 0 && !bids) column = s.column_of[row];
    __syncwarp();
    const double reduced = column >= 0 ? of.reduced(column) : bid.level;
    const double step = bid.level - reduced;
    // What the kind has stays if it is no nearer than the level; see place_bid for what is taken.
    const bool taken = column >= 0 && s.row_of[column] >= 0;
    if (bids ? taken && !(step + bid.epsilon > 0.0) : !(step > 0.0)) column = -1;
    const double price = column >= 0 ? s.v[column] - (step + bid.epsilon) : 0.0;
    if (row >= 0) {
      team.tell_each(&s.target[k], column);
      team.tell_each(&s.bid[k], price);
      if (bids && is_finite(reduced)) team.tell_each(&s.u[row], reduced);
      if (team.size == 1 && column >= 0) outbid(s, column, price);
    }
    made |= column >= 0;
    __syncwarp();
  }
  return __any_sync(kAllLanes, made) != 0;
}

}  // namespace croc::gpu
