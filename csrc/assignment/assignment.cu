// croc_kernels::linear_assignment on CUDA: checks, workspace and launches. The algorithm is in
// solver.cuh; schema, documentation and the checks with friendly messages are in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "assignment/launch.cuh"
#include "stable_utils.h"

namespace croc::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct StreamLauncher {
  cudaStream_t stream;

  void operator()(Kernel kernel, dim3 grid, int threads, int64_t shared, const Arguments& arguments,
                  int cluster = 1) const {
    CROC_CUDA_CHECK(launch_kernel(kernel, grid, threads, shared, cluster, stream, arguments));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_assignment(
    const Tensor& cost, const std::optional<Tensor>& num_rows, bool maximize) {
  STD_TORCH_CHECK(cost.dim() == 3, "linear_assignment: cost must be (B, N, M), got rank ",
                  cost.dim());
  const bool wide = cost.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || cost.scalar_type() == ScalarType::Float,
                  "linear_assignment: cost must have dtype float32 or float64");
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(cost.size(0) < kMost && cost.size(1) < kMost && cost.size(2) < kMost,
                  "linear_assignment: cost must have sizes below 2**30");
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  const Tensor costs = torch::stable::contiguous(cost);
  Arguments a{};
  a.batch = static_cast<int>(costs.size(0));
  a.rows = static_cast<int>(costs.size(1));
  a.columns = static_cast<int>(costs.size(2));
  a.maximize = maximize;
  a.cost_bytes = wide ? 8 : 4;
  a.cost = costs.const_data_ptr();
  a.vectors = a.columns % 4 == 0 && reinterpret_cast<uintptr_t>(a.cost) % 16 == 0;
  Tensor rows_used;
  if (num_rows.has_value()) {
    const Tensor& given = *num_rows;
    STD_TORCH_CHECK(given.dim() == 1 && given.size(0) == costs.size(0),
                    "linear_assignment: num_rows must be (B,)");
    a.wide_num_rows = given.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(a.wide_num_rows || given.scalar_type() == ScalarType::Int,
                    "linear_assignment: num_rows must have dtype int32 or int64");
    STD_TORCH_CHECK(given.is_cuda() && given.get_device_index() == costs.get_device_index(),
                    "linear_assignment: num_rows must be on the device of cost");
    rows_used = torch::stable::contiguous(given);
    a.num_rows = rows_used.const_data_ptr();
  }
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(costs, sizes, type);
  };
  Tensor index = make({a.batch, a.rows}, ScalarType::Long);
  Tensor row_dual = make({a.batch, a.rows}, ScalarType::Double);
  Tensor column_dual = make({a.batch, a.columns}, ScalarType::Double);
  Tensor gap = make({a.batch}, ScalarType::Double);
  Tensor status = make({a.batch}, ScalarType::Int);
  a.index = index.mutable_data_ptr<int64_t>();
  a.row_dual = row_dual.mutable_data_ptr<double>();
  a.column_dual = column_dual.mutable_data_ptr<double>();
  a.gap = gap.mutable_data_ptr<double>();
  a.status = status.mutable_data_ptr<int32_t>();

  int shared_limit = 0;
  CROC_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                         costs.get_device_index()));
  int most = 1;
  CROC_CUDA_CHECK(most_blocks(costs.get_device_index(), most));
  const Plan plan = make_plan(a.batch, a.max_n(), a.max_m(), shared_limit, most);
  Tensor workspace = make({plan_workspace(a, plan)}, ScalarType::Byte);
  a.workspace = workspace.mutable_data_ptr<uint8_t>();
  const StreamLauncher launch{
      static_cast<cudaStream_t>(current_cuda_stream(costs.get_device_index()))};
  if (wide)
    solve<double>(launch, a, plan);
  else
    solve<float>(launch, a, plan);
  return {index, row_dual, column_dual, gap, status};
}

}  // namespace
}  // namespace croc::gpu

STABLE_TORCH_LIBRARY_IMPL(croc_kernels, CUDA, m) {
  m.impl("linear_assignment", TORCH_BOX(&croc::gpu::linear_assignment));
}
