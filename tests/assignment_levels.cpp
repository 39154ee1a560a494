// The CPU solver at a chosen instruction set, with its counts, for
// test_linear_assignment_levels.py.
#include "host_solver.h"

extern "C" __attribute__((visibility("default"))) int32_t
solve(const float* cost, int32_t n, int32_t m, int32_t level, int32_t rows_for_auction,
      int64_t* index, double* row_dual, double* column_dual, double* gap, int64_t* counts) {
  croc::AssignmentSolver<float> solver(level);
  solver.tuning.rows_for_auction = rows_for_auction;
  if (rows_for_auction == 0) solver.tuning.scans_for_auction = 0;
  const croc::AssignmentResult result = solver.solve(cost, m, n, m, index, row_dual, column_dual);
  *gap = result.gap;
  std::memcpy(counts, &solver.counts, sizeof(solver.counts));
  return result.status;
}

extern "C" __attribute__((visibility("default"))) int32_t best_level() {
  return croc::AssignmentSolver<float>::best_level();
}
