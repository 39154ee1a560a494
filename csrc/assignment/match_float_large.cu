// match_rows for float costs, its state in the workspace.
#include "assignment/searches.cuh"

template croc::gpu::Kernel croc::gpu::matching_kernel<float, false>();
