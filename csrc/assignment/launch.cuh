// How a kernel of the solver is launched on a device, for assignment.cu and the benchmarks.
#pragma once

#include "solver.cuh"

namespace croc::gpu {

// Blocks that a cluster may have on the device, at most; 1 where there are none.
inline cudaError_t most_blocks(int device, int& most) {
  int clusters = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  most = error == cudaSuccess && clusters != 0 ? kMostBlocks : 1;
  return error;
}

// `cluster` blocks along the grid's y axis, all of it, are one cluster. No result depends on how
// many they are.
inline cudaError_t launch_kernel(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared,
                                 int cluster, cudaStream_t stream, const Arguments& arguments) {
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
  // A part of a device may have no room for so many blocks side by side.
  for (; cluster > 1; cluster /= 2) {
    together.val.clusterDim = {1, static_cast<unsigned>(cluster), 1};
    config.gridDim.y = cluster, config.numAttrs = 1;
    int fit = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&fit, kernel, &config);
    if (error != cudaSuccess) return error;
    if (fit > 0) break;
    config.gridDim.y = 1, config.numAttrs = 0;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace croc::gpu
