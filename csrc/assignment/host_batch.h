// One problem as the operator sees it (any strides, more rows than columns, maximize) solved by the
// solver, which wants rows <= columns, contiguous rows and the smallest cost. No torch in here.
#pragma once

#include "host_solver.h"

namespace croc {

template <class T>
struct CostView {
  const T* data;
  int64_t row_stride, column_stride;  // in elements
  int rows, columns;
  bool maximize;
};

template <class T>
class BatchSolver {
 public:
  // Fills index (rows; -1: stays free), row_dual (rows), column_dual (columns). Without a solution
  // the indices are -1, the duals 0 and the gap is NaN. The duals are those of the problem as it is
  // stated: for maximize row_dual + column_dual >= cost.
  AssignmentResult solve(const CostView<T>& view, int64_t* index, double* row_dual,
                         double* column_dual) {
    std::fill(index, index + view.rows, int64_t{-1});
    std::fill(row_dual, row_dual + view.rows, 0.0);
    std::fill(column_dual, column_dual + view.columns, 0.0);
    if (view.rows == 0 || view.columns == 0) return {kOk, 0.0};
    const bool transposed = view.rows > view.columns;
    const int n = std::min(view.rows, view.columns), m = std::max(view.rows, view.columns);
    const int64_t stride = transposed ? view.column_stride : view.row_stride;
    const int64_t inner = transposed ? view.row_stride : view.column_stride;
    index_.resize(n), few_.resize(n), many_.resize(m);

    double sign = view.maximize ? -1.0 : 1.0;
    AssignmentResult result{};
    if (inner == 1 && !view.maximize) {
      result = run(view.data, stride, n, m);
    } else {
      result = run(copy(view.data, stride, inner, n, m, static_cast<T>(sign)), m, n, m);
    }
    if (result.status == kTooLarge) {
      // Sums of such costs overflow: a power of two makes room and changes no cost that matters
      // next to them.
      constexpr double kScale = 0x1p-200;
      result = run(copy(view.data, stride, inner, n, m, static_cast<T>(sign * kScale)), m, n, m);
      sign /= kScale;
    }
    if (result.status != kOk) return {result.status, std::numeric_limits<double>::quiet_NaN()};
    for (int i = 0; i < n; ++i) index[transposed ? index_[i] : i] = transposed ? i : index_[i];
    // 0.0 + x: no negative zeros from a negative sign.
    double* few = transposed ? column_dual : row_dual;
    double* many = transposed ? row_dual : column_dual;
    for (int i = 0; i < n; ++i) few[i] = 0.0 + sign * few_[i];
    for (int j = 0; j < m; ++j) many[j] = 0.0 + sign * many_[j];
    return {kOk, std::fabs(sign) * result.gap};
  }

 private:
  AssignmentResult run(const T* cost, int64_t stride, int n, int m) {
    return solver_.solve(cost, stride, n, m, index_.data(), few_.data(), many_.data());
  }

  // Contiguous rows of factor * cost, read in square tiles: one of the two strides may be long.
  const T* copy(const T* data, int64_t stride, int64_t inner, int n, int m, T factor) {
    constexpr int kTile = 16;
    copied_.resize(static_cast<size_t>(n) * m);
    for (int i0 = 0; i0 < n; i0 += kTile)
      for (int j0 = 0; j0 < m; j0 += kTile)
        for (int i = i0; i < std::min(i0 + kTile, n); ++i)
          for (int j = j0; j < std::min(j0 + kTile, m); ++j)
            copied_[static_cast<size_t>(i) * m + j] = factor * data[i * stride + j * inner];
    return copied_.data();
  }

  AssignmentSolver<T> solver_;
  std::vector<int64_t> index_;
  std::vector<double> few_, many_;
  std::vector<T> copied_;
};

}  // namespace croc
