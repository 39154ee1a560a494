// croc_kernels::linear_assignment for CPU tensors: the schema is in croc_kernels/ops.py, the
// algorithm in host_solver.h. The problems of a batch are spread over torch's intra-op threads.
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "host_batch.h"

namespace croc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Outputs {
  int64_t* index;
  double *row_dual, *column_dual, *gap;
  int32_t* status;
};

// Rows of problem b that take part.
int64_t rows_of(const std::optional<Tensor>& num_rows, int64_t b, int64_t n) {
  if (!num_rows.has_value()) return n;
  const int64_t offset = b * num_rows->strides()[0];
  const int64_t rows = num_rows->scalar_type() == ScalarType::Int
                           ? static_cast<const int32_t*>(num_rows->data_ptr())[offset]
                           : static_cast<const int64_t*>(num_rows->data_ptr())[offset];
  return std::clamp<int64_t>(rows, 0, n);
}

template <class T>
void solve_batch(const Tensor& cost, const std::optional<Tensor>& num_rows, bool maximize,
                 const Outputs& out) {
  const int64_t batch = cost.sizes()[0], n = cost.sizes()[1], m = cost.sizes()[2];
  const int64_t stride_b = cost.strides()[0], stride_n = cost.strides()[1],
                stride_m = cost.strides()[2];
  const T* data = static_cast<const T*>(cost.data_ptr());
  // Problems differ in difficulty: every thread takes the next one, whatever range it was given.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, batch, 1, [&](int64_t, int64_t) {
    BatchSolver<T> solver;
    for (int64_t b; (b = next.fetch_add(1)) < batch;) {
      int64_t* index = out.index + b * n;
      double* row_dual = out.row_dual + b * n;
      const int64_t used = rows_of(num_rows, b, n);
      std::fill(index + used, index + n, int64_t{-1});
      std::fill(row_dual + used, row_dual + n, 0.0);
      const CostView<T> view{data + b * stride_b, stride_n, stride_m, static_cast<int>(used),
                             static_cast<int>(m), maximize};
      const AssignmentResult result = solver.solve(view, index, row_dual, out.column_dual + b * m);
      out.gap[b] = result.gap;
      out.status[b] = result.status;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_assignment(
    const Tensor& cost, const std::optional<Tensor>& num_rows, bool maximize) {
  STD_TORCH_CHECK(cost.dim() == 3, "linear_assignment: cost must be (B, N, M), got rank ",
                  cost.dim());
  const ScalarType dtype = cost.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "linear_assignment: cost must have dtype float32, float64");
  const int64_t batch = cost.sizes()[0], n = cost.sizes()[1], m = cost.sizes()[2];
  constexpr int64_t kLargest = int64_t{1} << 30;
  STD_TORCH_CHECK(n <= kLargest && m <= kLargest,
                  "linear_assignment: cost must have at most 2^30 rows and columns");
  if (num_rows.has_value()) {
    const ScalarType type = num_rows->scalar_type();
    STD_TORCH_CHECK(num_rows->dim() == 1 && num_rows->sizes()[0] == batch && num_rows->is_cpu() &&
                        (type == ScalarType::Int || type == ScalarType::Long),
                    "linear_assignment: num_rows must be (B,) int32 or int64 on the CPU");
  }
  Tensor index = torch::stable::new_empty(cost, {batch, n}, ScalarType::Long);
  Tensor row_dual = torch::stable::new_empty(cost, {batch, n}, ScalarType::Double);
  Tensor column_dual = torch::stable::new_empty(cost, {batch, m}, ScalarType::Double);
  Tensor gap = torch::stable::new_empty(cost, {batch}, ScalarType::Double);
  Tensor status = torch::stable::new_empty(cost, {batch}, ScalarType::Int);
  const Outputs out{static_cast<int64_t*>(index.data_ptr()),
                    static_cast<double*>(row_dual.data_ptr()),
                    static_cast<double*>(column_dual.data_ptr()),
                    static_cast<double*>(gap.data_ptr()), static_cast<int32_t*>(status.data_ptr())};
  if (dtype == ScalarType::Float) {
    solve_batch<float>(cost, num_rows, maximize, out);
  } else {
    solve_batch<double>(cost, num_rows, maximize, out);
  }
  return {index, row_dual, column_dual, gap, status};
}

}  // namespace
}  // namespace croc

STABLE_TORCH_LIBRARY_IMPL(croc_kernels, CPU, m) {
  m.impl("linear_assignment", TORCH_BOX(&croc::linear_assignment));
}
