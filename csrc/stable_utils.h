// What torch 2.11's stable ABI leaves out and the operators need. Host code only; device code includes no torch.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

// Weak: libtorch_cuda.so owns the symbol, and a CPU-only torch has no such library. Linking that library instead
// would make the module unloadable there. TODO(torch>=2.13): accelerator::getCurrentStream(index).nativeHandle().
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);

namespace croc {

// The cudaStream_t, as void*, that torch currently uses on the device.
inline void* current_cuda_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "the installed torch must be built with CUDA, got a CPU-only build");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
                  "the current CUDA stream must be readable, got an error for device ", device_index);
  return stream;
}

}  // namespace croc

#ifdef __CUDACC__
#include <cuda_runtime.h>

// torch's own macro needs a symbol of libtorch_cuda; this one needs only the static CUDA runtime.
#define CROC_CUDA_CHECK(expression)                                                        \
  do {                                                                                     \
    const cudaError_t croc_error = (expression);                                           \
    STD_TORCH_CHECK(croc_error == cudaSuccess, #expression, ": ", cudaGetErrorString(croc_error)); \
  } while (0)

// After every launch: reports a bad launch configuration, waits for nothing.
#define CROC_CUDA_LAUNCH_CHECK() CROC_CUDA_CHECK(cudaGetLastError())
#endif
