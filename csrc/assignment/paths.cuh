// What a shortest path (for a row that bidding left free) or a release (of a column that kept a
// price) does to the matching once search.cuh has found it.
#pragma once

#include "auction.cuh"

namespace croc::gpu {

struct PathEnd {
  int column;        // unmatched; -1: no column can be reached
  double distance;   // from the source
  int reads, steps;  // rows read, in how many steps
};

// Matches the rows and columns of a path, from its last column to the free row it begins at.
__device__ inline void flip(const State& s, int column) {
  do {
    const int row = s.path[column];
    const int next = s.column_of[row];
    s.row_of[column] = row;
    s.column_of[row] = column;
    column = next;
  } while (column >= 0);
}

struct Release {
  int column;   // ends with dual zero and without a row
  double rise;  // of the first column's dual
  int reads, steps;
};

// The same for a column that is released.
__device__ inline void flip_release(const State& s, int source, Release end) {
  if (threadIdx.x == 0) {
    s.v[source] += end.rise;
    s.v[end.column] = 0.0;
    if (end.column != source) {
      int row = s.row_of[end.column], column;
      s.row_of[end.column] = -1;
      do {
        column = s.path[row];
        const int next = s.row_of[column];
        s.row_of[column] = row;
        s.column_of[row] = column;
        row = next;
      } while (column != source);
    }
  }
  __syncthreads();
}

}  // namespace croc::gpu
