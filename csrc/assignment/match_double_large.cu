// match_rows for double costs, its state in the workspace.
#include "assignment/searches.cuh"

template croc::gpu::Kernel croc::gpu::matching_kernel<double, false>();
