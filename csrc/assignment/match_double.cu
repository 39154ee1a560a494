// match_rows for double costs, its state in shared memory.
#include "assignment/searches.cuh"

template croc::gpu::Kernel croc::gpu::matching_kernel<double, true>();
