// Exact rectangular assignment on a CPU: the dispatch over instruction sets. No torch in here.
//
// The files that are included below are compiled once per instruction set, each time in
// a namespace of its own, and the best one that the processor has is chosen at run time: the wheel
// is built without -march.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace croc {

// Shared with csrc/assignment/assignment.cu and croc_kernels/assignment/api.py. This solver needs
// no cap on its iterations (every phase is bounded by the size of the problem), so it never
// returns 3. kTooLarge stays inside: sums of these float64 costs may overflow, scale them.
enum AssignmentStatus : int32_t {
  kTooLarge = -1,
  kOk = 0,
  kInvalid = 1,
  kInfeasible = 2,
  kIterationCap = 3
};

struct AssignmentResult {
  AssignmentStatus status;
  double gap;
};

// Counts of one problem, for tests and for tuning: a scan reads one row (or column) of costs.
struct AssignmentCounts {
  int64_t free_rows, bids, free_after_bids, row_scans, column_scans, auction_bids;
};

// Chosen by measurement: docs/assignment.md says what else was tried.
struct HostTuning {
  bool means = true;             // start from column means where their dual value is higher
  int spreads = 2;               // Sinkhorn steps behind that
  double temperature = 0.25;     // of the local scale
  double bids_per_row = 16;      // limit, per row that is free after the tight matching
  int rows_for_auction = 64;     // an auction needs more rows that are free after the bids
  double scans_for_auction = 8;  // per row: steps of paths before it, if the bids ended in ties
  int auction_phases = 3;
  double epsilon = 8, epsilon_factor = 0.125;  // of the local scale, from phase to phase
  int auction_bids = 60;                       // limit, per row and column
};

namespace host {
constexpr int kFewRows = 32;    // fewer rows: Sinkhorn steps take longer than they save
constexpr int kScaleRows = 32;  // rows that the local scale is estimated from
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kBlock = 64;  // columns per block; a multiple of every vector length
}  // namespace host
}  // namespace croc

#define CROC_INLINE inline __attribute__((always_inline))
#define CROC_LAMBDA __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define CROC_MULTIVERSION 1
#include <immintrin.h>
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors cross no boundary that isn't inlined
namespace croc::host {
namespace baseline {
#define CROC_LANES 2
#include "host_kernels.h"
#include "host_start.h"
#include "host_paths.h"
#include "host_auction.h"
#include "host_solve.h"
#undef CROC_LANES
}  // namespace baseline
#ifdef CROC_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define CROC_LANES 4
#include "host_kernels.h"
#include "host_start.h"
#include "host_paths.h"
#include "host_auction.h"
#include "host_solve.h"
#undef CROC_LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define CROC_LANES 8
#include "host_kernels.h"
#include "host_start.h"
#include "host_paths.h"
#include "host_auction.h"
#include "host_solve.h"
#undef CROC_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif
}  // namespace croc::host
#pragma GCC diagnostic pop

namespace croc {

// Solves problems with n <= m for the smallest total cost, costs row by row, `stride` elements
// apart; +inf forbids a pair. Keeps its memory from one problem to the next: one per thread.
template <class T>
class AssignmentSolver {
 public:
  HostTuning tuning;
  AssignmentCounts counts{};

  // 0: what every processor has, 1: AVX2, 2: AVX-512. Results are the same.
  static int best_level() {
#ifdef CROC_MULTIVERSION
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? 2 : avx2 ? 1 : 0;
#else
    return 0;
#endif
  }

  explicit AssignmentSolver(int level = best_level()) : level_(std::min(level, best_level())) {}

  // Fills index (n), row_dual (n) and column_dual (m) where the status is kOk.
  AssignmentResult solve(const T* cost, int64_t stride, int n, int m, int64_t* index,
                         double* row_dual, double* column_dual) {
    const auto run = [&](auto& work) {
      work.prepare(cost, stride, n, m);
      const AssignmentResult result = solve_prepared(work, tuning, index, row_dual, column_dual);
      counts = work.counts;
      return result;
    };
#ifdef CROC_MULTIVERSION
    if (level_ == 2) return run(avx512_);
    if (level_ == 1) return run(avx2_);
#endif
    return run(baseline_);
  }

 private:
  int level_;
  host::baseline::Work<T> baseline_;
#ifdef CROC_MULTIVERSION
  host::avx2::Work<T> avx2_;
  host::avx512::Work<T> avx512_;
#endif
};

}  // namespace croc
