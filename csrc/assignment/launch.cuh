// How a kernel of the solver is launched on a device, for assignment.cu and the benchmarks.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "solver.cuh"

namespace croc::gpu {

// Blocks that a cluster may have on the device, at most; 1 where there are none.
inline cudaError_t most_blocks(int device, int& most) {
  int clusters = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  most = error == cudaSuccess && clusters != 0 ? kMostBlocks : 1;
  return error;
}

// How many clusters run at once, each of as many blocks as the grid has along y. A part of a device
// may have no room for so many blocks side by side. None of a kernel that the driver made of PTX for
// an older chip: its blocks do not wait for each other (CROC_CLUSTERS). Asked once per kernel and
// shape.
inline cudaError_t clusters_at_once(Kernel kernel, const cudaLaunchConfig_t& config, int& fit) {
  static std::mutex lock;
  using Shape = std::tuple<int, Kernel, unsigned, unsigned, size_t>;
  static std::map<Shape, int> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const Shape shape{device, kernel, config.gridDim.y, config.blockDim.x, config.dynamicSmemBytes};
  const std::lock_guard<std::mutex> guard(lock);
  if (const auto place = known.find(shape); place != known.end()) {
    fit = place->second;
    return cudaSuccess;
  }
  cudaFuncAttributes compiled{};
  error = cudaFuncGetAttributes(&compiled, kernel);
  fit = 0;
  if (error == cudaSuccess && compiled.ptxVersion >= 90)
    error = cudaOccupancyMaxActiveClusters(&fit, kernel, &config);
  if (error == cudaSuccess) known[shape] = fit;
  return error;
}

// `cluster` blocks along the grid's y axis, all of it, are one cluster: fewer where they would wait
// for each other. No result depends on how many they are.
inline cudaError_t launch_kernel(Kernel kernel, dim3 grid, int threads, int64_t shared, int cluster,
                                 cudaStream_t stream, const Arguments& arguments) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shared > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  config.attrs = &together;
  for (; cluster > 1; --cluster) {
    together.val.clusterDim = {1, static_cast<unsigned>(cluster), 1};
    config.gridDim.y = cluster, config.numAttrs = 1;
    int fit = 0;
    const cudaError_t error = clusters_at_once(kernel, config, fit);
    if (error != cudaSuccess) return error;
    if (fit >= static_cast<int>(grid.x)) break;
    config.gridDim.y = 1, config.numAttrs = 0;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace croc::gpu
