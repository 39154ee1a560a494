// Copies of columns. The entries of a column lie in as many rows of the costs, a memory sector
// each: reading it is bound by those, and the phases by columns read the same ones again and again.
// What has been read is kept side by side for the next time, for as many columns as there are
// slots.
#pragma once

#include "bidding.cuh"

namespace croc::gpu {

constexpr int kNoSlot = -1;  // not asked for yet
constexpr int kNoRoom = -2;  // all slots are taken
constexpr int kFilled = 1;   // a slot is twice its number, plus this once it holds its column

// Where a column is read, and where it has to be kept.
template <class T>
struct Column {
  const T* from;
  int64_t stride;
  T* to;  // or null

  __device__ Column(const Costs<T>& costs, const State& s, T* copies, int column)
      : from(costs.base + column * costs.column_stride), stride(costs.row_stride), to(nullptr) {
    const int slot = s.slot[column];
    if (slot < 0) return;
    to = copies + static_cast<int64_t>(slot / 2) * costs.n;
    if (slot & kFilled) from = to, stride = 1, to = nullptr;
  }
};

__device__ inline void clear_slots(const State& s, int m) {
  for (int j = threadIdx.x; j < m; j += blockDim.x) s.slot[j] = kNoSlot;
  if (threadIdx.x == 0) *s.slots = 0;
}

// A slot for a column. Which one depends on who comes first, but not what will be read from it.
__device__ inline void take_slot(const State& s, int column, int slots) {
  if (s.slot[column] != kNoSlot) return;
  const int slot = atomicAdd(s.slots, 1);
  s.slot[column] = slot < slots ? 2 * slot : kNoRoom;
}

// Once all entries of a column that has a slot are kept in it. No one may be reading columns.
__device__ inline void fill_slot(const State& s, int column) {
  atomicOr(&s.slot[column], kFilled);
}

}  // namespace croc::gpu
