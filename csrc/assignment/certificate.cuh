// The certificate, and the results in the caller's orientation and sign.
//
// For any v <= 0 the row minima u_i = min_j (c_ij - v_j) make (u, v) feasible for the dual problem,
// so
//   sum_i (c_i,a(i) - v_a(i) - u_i) + sum_unmatched (-v_j)
// bounds how far the assignment's cost is above the optimum. Every term is >= 0, and it needs only
// v and a.
#pragma once

#include "warm_start.cuh"

namespace croc::gpu {

// Grid (batch, rows / warps).
template <class T>
__global__ void measure_slack(Arguments a) {
  const Problem<T> p(a);
  const int row = row_of_warp();
  if (row >= p.n || p.failed()) return;
  double least = infinity();
  for_row(p.costs, row, [&](int first, const T(&x)[4]) {
    double v[4];
    four(p.work.v, first, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) least = lesser(least, static_cast<double>(x[k]) - v[k]);
  });
  least = from_ordered(warp_min(ordered(least)));
  if (lane_id() != 0) return;
  const int column = p.work.column_of[row];
  p.work.u[row] = least;
  p.work.row_value[row] = (p.costs.at(row, column) - p.work.v[column]) - least;
}

// Grid (batch): gap, status, indices and duals.
template <class T>
__global__ void write_results(Arguments a) {
  const Problem<T> p(a);
  const int64_t b = blockIdx.x;
  int64_t* index = a.index + b * a.rows;
  double* row_dual = a.row_dual + b * a.rows;
  double* column_dual = a.column_dual + b * a.columns;
  const int status = p.scalars().status;
  const bool ok = status == kOk;
  const double nan = infinity() - infinity();
  const double sign = a.maximize ? -p.unit : p.unit;
  double gap = 0.0;
  if (ok) {
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) gap += p.work.row_value[i];
    for (int j = threadIdx.x; j < p.m; j += blockDim.x)
      if (p.work.row_of[j] < 0) gap -= p.work.v[j];
  }
  gap = block_sum(gap);
  for (int r = threadIdx.x; r < a.rows; r += blockDim.x) {
    const bool used = ok && r < p.used_rows;
    index[r] = !used ? -1 : p.swapped ? p.work.row_of[r] : p.work.column_of[r];
    row_dual[r] = used ? 0.0 + sign * (p.swapped ? p.work.v[r] : p.work.u[r]) : 0.0;
  }
  for (int c = threadIdx.x; c < a.columns; c += blockDim.x)
    column_dual[c] = ok ? 0.0 + sign * (p.swapped ? p.work.u[c] : p.work.v[c]) : 0.0;
  if (threadIdx.x == 0) {
    a.gap[b] = ok ? p.unit * gap : nan;
    a.status[b] = status;
  }
}

}  // namespace croc::gpu
