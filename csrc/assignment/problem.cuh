// One assignment problem as the kernels see it: its costs, its size, its place in the workspace.
//
// The solver works on n rows <= m columns. A problem with more rows than columns is read through
// swapped strides, decided per problem on the device, since num_rows lives there.
#pragma once

#include "block.cuh"

namespace croc::gpu {

enum Status : int { kOk = 0, kInvalid = 1, kInfeasible = 2, kCapped = 3 };

// Where a phase's work went; read by benchmarks and by the emulation's tests.
enum Counter {
  kAnnealSteps,    // of the second start, see anneal.cuh
  kRounds,         // of bidding by rows
  kBids,           // in them
  kReverseRounds,  // of bidding by columns, in the auction
  kReverseBids,    // in them
  kForests,        // searches from all free rows at once
  kForestScans,    // rows that they read
  kForestSteps,    // in so many steps
  kFreeRows,       // left to the paths
  kRowScans,       // rows that the paths read
  kRowSteps,       // in so many steps
  kRaiseRounds,    // of bidding by columns, in the reverse pass
  kRaiseBids,      // in them
  kReleased,       // columns left to its paths
  kColumnScans,    // columns that it read
  kColumnSteps,    // in so many steps
  kBidTime,        // clock cycles of each phase
  kForestTime,
  kAuctionTime,
  kPathTime,
  kRaiseTime,
  kReleaseTime,
  kCounters
};

// What the kernels of one problem tell each other.
struct Scalars {
  int status;
  int low_exponent;    // every finite cost is a multiple of 2^low_exponent
  int high_exponent;   // and smaller than 2^(high_exponent + 1)
  int with_levels;     // 1 if the columns' levels are there, see levels.cuh
  int from_means;      // the start of the column duals: 1 column means, 0 zero
  double spread;       // local scale: from a row's least reduced cost to about its ninth, median
  double temperature;  // of the Sinkhorn steps; 0: none
  double slack;        // Sinkhorn potential of the row that takes the m - n columns left over
  int copies;          // rows that are not the first with their costs
  unsigned overload;   // rows that the last Sinkhorn step sent to full columns, times kOverload
  int counters[kCounters];
};

struct Arguments {
  const void* cost;      // (batch, rows, columns), contiguous, float or double
  const void* num_rows;  // (batch,) int32 or int64, or null: all rows
  bool wide_num_rows;
  bool vectors;  // 16-byte loads along a row are aligned
  bool maximize;
  int cost_bytes;  // of one cost: 4 or 8
  int batch, rows, columns;
  int64_t* index;       // (batch, rows)
  double* row_dual;     // (batch, rows)
  double* column_dual;  // (batch, columns)
  double* gap;          // (batch,)
  int32_t* status;      // (batch,)
  unsigned char* workspace;
  int64_t workspace_stride;  // bytes per problem
  int many_rows;             // problems with as many rows begin with an auction, see searches.cuh
  int groups;                // of columns that a thread of a search keeps, as in Plan
  int ring_places;           // see anneal_ahead.cuh
  int64_t state_bytes;       // of it, for the sequential phases if shared memory is too small

  __host__ __device__ int max_n() const { return rows < columns ? rows : columns; }
  __host__ __device__ int max_m() const { return rows < columns ? columns : rows; }
  // Columns of a problem that can be copied: a quarter. With many rows there are levels instead.
  __host__ __device__ int slots() const {
    constexpr int kMostSlots = 8192;
    const int quarter = max_m() / 4;
    return max_n() >= many_rows ? 0 : quarter < kMostSlots ? quarter : kMostSlots;
  }
};

using Kernel = void (*)(Arguments);

// Length of an array that is read four entries at a time.
__host__ __device__ inline int padded(int m) { return (m + 3) / 4 * 4; }

constexpr int kMostThreads = 1024;  // of a block
constexpr int kListed = 4;          // candidates per lane of the warp that reads a row
constexpr int kListColumns = 1024;  // with fewer columns a list is no shorter than its row
constexpr int kManyRows = 1024;     // from here on bidding takes most of the time
constexpr int kLevelRows = 16;      // whose levels are written at once

// Hands out consecutive arrays of a memory block, or, with a null base, only counts the bytes.
struct Carver {
  unsigned char* base;
  int64_t used = 0;

  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return array;
  }
};

// State of the sequential phases: in shared memory, or in the workspace if it does not fit.
struct State {
  double* v;       // (padded m) column duals, 0 beyond the last column
  double* u;       // (padded n) row duals
  int* row_of;     // (m) matched row of a column, or -1
  int* column_of;  // (n) matched column of a row, or -1
  int* twin;       // (n) the first row with the same costs
  int* list;       // (n) rows or columns at work
  double* bid;     // (n) the bid of each in the list, in a cluster two rounds' in turn
  int* target;     // (n) and what it is for
  int page;        // from one round's bids to the next's
  int* path;       // (m) searches: predecessor on a shortest path; bidding: the row that wins a
                   // column, kNobody between rounds
  double* reach;   // (m) searches: distances from the sources
  uint64_t* best;  // (m) bidding: the best bid for a column, ~0 between rounds; the same memory
  int* slot;       // (m) of a column's copy, see columns.cuh
  int* slots;      // handed out
  void* limit;     // of nodes, see graphs.cuh, in the costs' type or a wider one,
  float* key;      // and their keys: only without groups, else in registers

  // `groups` and `blocks` as in Plan.
  __host__ __device__ int64_t carve(unsigned char* base, int n, int m, int groups, int blocks) {
    Carver carver{base};
    v = carver.take<double>(padded(m));
    u = carver.take<double>(padded(n));
    row_of = carver.take<int>(m);
    column_of = carver.take<int>(n);
    twin = carver.take<int>(n);
    list = carver.take<int>(n);
    page = blocks > 1 ? n : 0;
    bid = carver.take<double>(n + page);
    target = carver.take<int>(n + page);
    path = carver.take<int>(m);
    reach = carver.take<double>(m);
    best = reinterpret_cast<uint64_t*>(reach);
    slot = carver.take<int>(m);
    slots = carver.take<int>(1);
    const int64_t nodes = groups > 0 ? 0 : m + 4 * int64_t{kMostThreads};
    limit = carver.take<double>(nodes);
    key = carver.take<float>(nodes);
    return carver.used;
  }

  // A block of a cluster may write the next round's bids while another still reads this one's.
  __device__ void turn_page() {
    bid += page, target += page;
    page = -page;
  }
};

// Candidates of every row, see candidates.cuh.
template <class T>
struct Lists {
  T* cost;       // (n, kWarp, kListed)
  int* column;   // the same
  float* bound;  // (n, kWarp)
};

// Columns at 8 bits per cost, see levels.cuh.
template <class T>
struct Levels {
  unsigned char* level;  // (m, pitch), or null: columns are read from the costs
  T* low;                // (m)
  T* step;               // (m)
  int pitch;             // n, padded

  __device__ unsigned char* column(int j) const { return level + static_cast<int64_t>(j) * pitch; }
};

__host__ __device__ inline int level_pitch(int n) {
  return (n + kLevelRows - 1) / kLevelRows * kLevelRows;
}

struct Workspace {
  Scalars* scalars;
  double* v;             // (padded m) column duals, 0 beyond the last column
  double* u;             // (n) row duals; row minima
  void* potential;       // (padded m) column means, then Sinkhorn potentials, in the costs' type
  double* row_value;     // (n) gain of the start in a sampled row; Sinkhorn potentials; slacks
  float* row_spread;     // (n) distance from the least to about the ninth reduced cost, under the
                         // duals from the means
  float* cost_spread;    // (n) the same under zero duals
  int* row_of;           // (m)
  int* column_of;        // (n); first the column of each row's least reduced cost
  unsigned* row_hash;    // (n)
  int* twin;             // (n) the first row with the same costs
  int* order;            // (n) rows by their twins
  void* list_cost;       // (n, kWarp, kListed) candidates, from kListColumns on
  int* list_column;      // the same
  float* list_bound;     // (n, kWarp)
  unsigned char* level;  // (m, level_pitch) columns at 8 bits per cost
  void* level_low;       // (m)
  void* level_step;      // (m)
  void* copies;          // (slots, n) columns
  unsigned char* state;

  __host__ __device__ int64_t carve(unsigned char* base, const Arguments& a) {
    const int64_t n = a.max_n(), m = a.max_m();
    const int64_t candidates = m < kListColumns ? 0 : n * kWarp * kListed;
    Carver carver{base};
    scalars = carver.take<Scalars>(1);
    v = carver.take<double>(padded(a.max_m()));
    u = carver.take<double>(n);
    potential = carver.take<unsigned char>(padded(a.max_m()) * a.cost_bytes);
    row_value = carver.take<double>(n);
    row_spread = carver.take<float>(n);
    cost_spread = carver.take<float>(n);
    row_of = carver.take<int>(m);
    column_of = carver.take<int>(n);
    row_hash = carver.take<unsigned>(n);
    twin = carver.take<int>(n);
    order = carver.take<int>(n);
    list_cost = carver.take<unsigned char>(candidates * a.cost_bytes);
    list_column = carver.take<int>(candidates);
    list_bound = carver.take<float>(candidates / kListed);
    const int64_t levelled = n < a.many_rows ? 0 : m;
    level = carver.take<unsigned char>(levelled * level_pitch(a.max_n()));
    level_low = carver.take<unsigned char>(levelled * a.cost_bytes);
    level_step = carver.take<unsigned char>(levelled * a.cost_bytes);
    copies = carver.take<unsigned char>(int64_t{a.slots()} * n * a.cost_bytes);
    state = carver.take<unsigned char>(a.state_bytes);
    return carver.used;
  }
};

// Entries first..first+3 of an array of padded length.
__device__ inline void four(const double* values, int first, double (&out)[4]) {
  const double2 x = *reinterpret_cast<const double2*>(values + first);
  const double2 y = *reinterpret_cast<const double2*>(values + first + 2);
  out[0] = x.x, out[1] = x.y, out[2] = y.x, out[3] = y.y;
}
__device__ inline void four(const float* values, int first, float (&out)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(values + first);
  out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
}

template <class T>
struct Costs {
  const T* base;
  int64_t row_stride, column_stride;
  int n, m;  // rows <= columns
  T sign;    // times a power of two
  bool vectors;

  __device__ double at(int row, int column) const {
    return static_cast<double>(sign * __ldg(base + row * row_stride + column * column_stride));
  }

  // Columns first..first+3 of a row; +inf beyond the last one.
  __device__ void four(int row, int first, T (&out)[4]) const {
    const T* p = base + row * row_stride;
    if (vectors && first < m)
      load_vector(p + first, out);
    else
      load_each(p, first, out);
    apply_sign(out);
  }

  // The loads below leave the sign to their caller: applied in the branch that chose a load, it
  // waits for that load, and the next one waits for it.
  __device__ void apply_sign(T (&x)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] *= sign;
  }

  __device__ void load_each(const T* p, int first, T (&out)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      out[k] = first + k < m ? __ldg(p + (first + k) * column_stride)
                             : sign * static_cast<T>(infinity());
  }
  __device__ static void load_vector(const float* p, float (&out)[4]) {
    const float4 x = __ldg(reinterpret_cast<const float4*>(p));
    out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
  }
  __device__ static void load_vector(const double* p, double (&out)[4]) {
    const double2 x = __ldg(reinterpret_cast<const double2*>(p));
    const double2 y = __ldg(reinterpret_cast<const double2*>(p) + 1);
    out[0] = x.x, out[1] = x.y, out[2] = y.x, out[3] = y.y;
  }
};

constexpr int kListExponent = 100;  // the lists' bounds are float32
constexpr int kHugeExponent = 900;  // of float64 costs; 100 bits less leave room for every sum

// The block's problem: blockIdx.x in every kernel.
template <class T>
struct Problem {
  Costs<T> costs;
  Workspace work;
  int n, m;
  int used_rows;  // of the caller's matrix
  bool swapped;   // the solver's rows are the caller's columns
  bool many;      // rows
  double unit;    // a power of two: the solver sees the costs divided by it
  int slots;      // for copies of columns

  // `scaled`: once the exponents of the costs are known, their sums are kept from overflowing.
  __device__ explicit Problem(const Arguments& a, bool scaled = true) {
    const int64_t b = blockIdx.x;
    used_rows = a.rows;
    slots = a.slots();
    if (a.num_rows != nullptr) {
      const int64_t given = a.wide_num_rows ? static_cast<const int64_t*>(a.num_rows)[b]
                                            : static_cast<const int32_t*>(a.num_rows)[b];
      used_rows = static_cast<int>(given < 0 ? 0 : given < a.rows ? given : a.rows);
    }
    swapped = used_rows > a.columns;
    n = swapped ? a.columns : used_rows;
    m = swapped ? used_rows : a.columns;
    many = n >= a.many_rows;
    const T* base = static_cast<const T*>(a.cost) + b * a.rows * a.columns;
    const int64_t across = a.columns;
    work.carve(a.workspace + b * a.workspace_stride, a);
    unit = sizeof(T) == 8 && scaled && work.scalars->high_exponent > kHugeExponent ? 0x1p100 : 1.0;
    costs = {base,
             swapped ? 1 : across,
             swapped ? across : 1,
             n,
             m,
             static_cast<T>((a.maximize ? -1.0 : 1.0) / unit),
             a.vectors && !swapped};
  }

  __device__ Scalars& scalars() const { return *work.scalars; }
  __device__ T* potential() const { return static_cast<T*>(work.potential); }
  // Whether rows have lists. It depends on the problem alone, as every result must.
  __device__ bool listed() const {
    return m >= kListColumns && work.scalars->high_exponent < kListExponent;
  }
  __device__ Lists<T> lists() const {
    return {static_cast<T*>(work.list_cost), work.list_column,
            listed() ? work.list_bound : nullptr};
  }
  // `with`: whether they have been made.
  __device__ Levels<T> levels(const Arguments& a, bool with) const {
    return {with ? work.level : nullptr, static_cast<T*>(work.level_low),
            static_cast<T*>(work.level_step), level_pitch(a.max_n())};
  }
  __device__ Levels<T> levels(const Arguments& a) const {
    return levels(a, work.scalars->with_levels != 0);
  }
  __device__ T* copies() const { return static_cast<T*>(work.copies); }
  __device__ bool failed() const { return work.scalars->status != kOk; }
  __device__ bool alike() const { return work.scalars->copies > 0; }
  __device__ bool annealed() const { return work.scalars->counters[kAnnealSteps] > 0; }
};

// What the sequential phases start from; match_nearest makes the rest.
template <class T>
__device__ void load_state(const Problem<T>& p, const State& s) {
  for (int j = threadIdx.x; j < padded(p.m); j += blockDim.x) s.v[j] = p.work.v[j];
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    s.u[i] = p.work.u[i];
    s.column_of[i] = p.work.column_of[i];
    s.twin[i] = p.work.twin[i];
  }
  __syncthreads();
}

template <class T>
__device__ void store_state(const Problem<T>& p, const State& s) {
  for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
    p.work.v[j] = s.v[j];
    p.work.row_of[j] = s.row_of[j];
  }
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) p.work.column_of[i] = s.column_of[i];
}

// Adds to a counter, without waiting for it. Called by all threads.
__device__ inline void count(Scalars& scalars, Counter which, int more) {
  if (threadIdx.x == 0) atomicAdd(&scalars.counters[which], more);
}

// Rounds a column dual to the grid of the costs: where their range spans fewer than 50 bits of it,
// all later sums and differences are exact. Any number <= 0 is a valid start; what is not one
// becomes 0.
__device__ inline double on_grid(double x, const Scalars& s) {
  if (!(x < 0.0) || !is_finite(x)) return 0.0;
  if (s.high_exponent - s.low_exponent > 50 || s.low_exponent < -1000 ||
      s.high_exponent > kHugeExponent)
    return x;
  return ldexp(rint(ldexp(x, -s.low_exponent)), s.low_exponent);
}

}  // namespace croc::gpu
