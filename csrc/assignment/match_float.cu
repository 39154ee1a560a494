// match_rows for float costs, its state in shared memory.
#include "assignment/searches.cuh"

template croc::gpu::Kernel croc::gpu::matching_kernel<float, true>();
