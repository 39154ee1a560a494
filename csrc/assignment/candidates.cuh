// Short lists of each row's nearest columns, from which nearly every bid is made: a round then
// costs a fraction of what reading its rows would.
//
// A row is shared out among the 32 lanes of a warp as in for_row. Of its share a lane keeps the
// kListed nearest columns and a bound: no other column of the share has a smaller reduced cost.
// That stays true while column duals only fall, since reduced costs then only rise. A bid whose two
// best listed columns are within all bounds is the one the whole row gives; otherwise the shares in
// doubt are read again.
#pragma once

#include "warm_start.cuh"

namespace croc::gpu {

constexpr int kRefills = 3;  // with more shares in doubt the whole row is read

// A row's own order of the columns, for ties: it starts at `turn`, far from where its neighbours
// start.
__device__ inline int rotation(int row, int m) {
  return static_cast<int>((static_cast<uint64_t>(row) * 2654435769u & 0xffffffffu) * m >> 32);
}
__device__ inline unsigned rotated(int column, int turn, int m) {
  return static_cast<unsigned>(column >= turn ? column - turn : column - turn + m);
}
__device__ inline int unrotated(unsigned key, int turn, int m) {
  const int column = static_cast<int>(key) + turn;
  return column >= m ? column - m : column;
}

struct Bid {
  double least, second;  // the two smallest reduced costs of the row
  int column;            // of the least; an unmatched one if there is a choice
};

constexpr unsigned kMatched = 1u << 31;  // of a key: unmatched columns win ties

// The nearest columns of a share, while it is read. They are chosen by reduced costs rounded down,
// so the bound holds for the exact ones.
struct Nearest {
  float reduced[kListed];
  int column[kListed];
  float bound;

  __device__ static Nearest none() {
    Nearest nearest;
#pragma unroll
    for (int k = 0; k < kListed; ++k) nearest.reduced[k] = infinity(), nearest.column[k] = -1;
    nearest.bound = infinity();
    return nearest;
  }
  __device__ void add(double exact, int its_column) {
    float x = __double2float_rd(exact);
    if (!(x < bound)) return;
#pragma unroll
    for (int k = 0; k < kListed; ++k) {
      if (!(x < reduced[k])) continue;
      const float further = reduced[k];
      const int its = column[k];
      reduced[k] = x, column[k] = its_column;
      x = further, its_column = its;
    }
    bound = x;
  }
};

// A lane's part of a row's list.
template <class T>
struct Share {
  T cost[kListed];
  int column[kListed];  // -1: none, at infinite cost
  float bound;

  __device__ void load(const Lists<T>& lists, int row, int lane) {
    const int64_t at = static_cast<int64_t>(row) * kWarp + lane;
    four(lists.cost + at * kListed, 0, cost);
    const int4 columns = *reinterpret_cast<const int4*>(lists.column + at * kListed);
    column[0] = columns.x, column[1] = columns.y, column[2] = columns.z, column[3] = columns.w;
    bound = lists.bound[at];
  }
  __device__ void store(const Lists<T>& lists, int row, int lane) const {
    const int64_t at = static_cast<int64_t>(row) * kWarp + lane;
#pragma unroll
    for (int k = 0; k < kListed; ++k) lists.cost[at * kListed + k] = cost[k];
    *reinterpret_cast<int4*>(lists.column + at * kListed) = {column[0], column[1], column[2],
                                                             column[3]};
    lists.bound[at] = bound;
  }
};

// Called by every lane with the nearest of its share.
template <class T>
__device__ void store_list(const Costs<T>& costs, const Lists<T>& lists, int row,
                           const Nearest& nearest) {
  Share<T> share;
#pragma unroll
  for (int k = 0; k < kListed; ++k) {
    share.column[k] = nearest.column[k];
    share.cost[k] =
        static_cast<T>(nearest.column[k] < 0 ? infinity() : costs.at(row, nearest.column[k]));
  }
  share.bound = nearest.bound;
  share.store(lists, row, lane_id());
}

// Least reduced cost of a row, and its list under the duals v. By one warp.
template <class T>
__device__ double list_row(const Costs<T>& costs, const Lists<T>& lists, const double* v, int row) {
  const bool listed = lists.bound != nullptr;
  double least = infinity();
  Nearest nearest = Nearest::none();
  for_row(costs, row, [&](int first, const T(&x)[4]) {
    double its_v[4];
    four(v, first, its_v);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const double reduced = static_cast<double>(x[k]) - its_v[k];
      least = lesser(least, reduced);
      if (listed) nearest.add(reduced, first + k);
    }
  });
  if (listed) store_list(costs, lists, row, nearest);
  return from_ordered(warp_min(ordered(least)));
}

// Entry `entry` of a lane's share of a row of m columns, -1 beyond its end.
__device__ inline int share_column(int lane, int entry, int m) {
  const int column = entry / 4 * (4 * kWarp) + 4 * lane + entry % 4;
  return column < m ? column : -1;
}

// A warp reads the share of one of its lanes again. `key_of` orders columns at equal reduced cost.
template <class T, class KeyOf, class ColumnOf>
__device__ void refill(const Costs<T>& costs, const Lists<T>& lists, const double* v, int row,
                       int lane, Share<T>& share, KeyOf key_of, ColumnOf column_of) {
  constexpr int kHeld = 2;  // entries per lane in registers: all up to 2048 columns
  const int entries = 4 * ((costs.m + 4 * kWarp - 1) / (4 * kWarp));
  const auto read = [&](int entry) -> Least {
    const int column = entry < entries ? share_column(lane, entry, costs.m) : -1;
    if (column < 0) return Least::none();
    const double reduced = costs.at(row, column) - v[column];
    return is_finite(reduced) ? Least{ordered(reduced), key_of(column)} : Least::none();
  };
  Least held[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) held[h] = read(lane_id() + h * kWarp);
  Least last{0, 0};
  const auto next = [&] {
    Least least = Least::none();
    const auto consider = [&](Least mine) {
      if (last < mine && mine < least) least = mine;
    };
#pragma unroll
    for (int h = 0; h < kHeld; ++h) consider(held[h]);
    for (int entry = lane_id() + kHeld * kWarp; entry < entries; entry += kWarp)
      consider(read(entry));
    return warp_least(least);
  };
#pragma unroll
  for (int k = 0; k < kListed; ++k) {
    last = next();
    if (lane_id() != lane) continue;
    const bool any = last.key != ~0u;
    share.column[k] = any ? column_of(last.key) : -1;
    share.cost[k] = static_cast<T>(any ? costs.at(row, share.column[k]) : infinity());
  }
  last = next();
  if (lane_id() != lane) return;
  share.bound = last.key == ~0u ? infinity() : __double2float_rd(from_ordered(last.value));
  share.store(lists, row, lane);
}

// What a row's list says: its best entry, the value of the second best, and the lanes in whose
// share something better could be that is not listed. By one warp.
struct Glance {
  Least found;
  uint64_t runner_up;
  unsigned doubts;

  __device__ Bid bid(int turn, int m) const {
    if (found.key == ~0u) return {infinity(), infinity(), -1};
    return {from_ordered(found.value),
            runner_up == ~uint64_t{0} ? infinity() : from_ordered(runner_up),
            unrotated(found.key & ~kMatched, turn, m)};
  }
};

// Of equal columns an unmatched one is better, then the first in the row's own order.
__device__ inline unsigned bid_key(const State& s, int column, int turn, int m) {
  return rotated(column, turn, m) | (s.row_of[column] >= 0 ? kMatched : 0u);
}

template <class T>
__device__ Glance glance(const State& s, const Share<T>& share, int turn, int m) {
  Least least = Least::none(), second = Least::none();
#pragma unroll
  for (int k = 0; k < kListed; ++k) {
    if (share.column[k] < 0) continue;
    const double reduced = static_cast<double>(share.cost[k]) - s.v[share.column[k]];
    if (!is_finite(reduced)) continue;
    const Least mine{ordered(reduced), bid_key(s, share.column[k], turn, m)};
    if (mine < least)
      second = least, least = mine;
    else if (mine < second)
      second = mine;
  }
  const Least found = warp_least(least);
  const uint64_t runner_up = warp_min(found.key == least.key ? second.value : least.value);
  const uint64_t bound = ordered(static_cast<double>(share.bound));
  const bool doubtful = share.bound < infinity() &&
                        (bound < runner_up || (bound <= found.value && (found.key & kMatched)));
  return {found, runner_up, __ballot_sync(kAllLanes, doubtful)};
}

// Sends for a whole row, before parts of it are read one after another. By one warp.
template <class T>
__device__ void fetch_row(const Costs<T>& costs, int row) {
  if (costs.column_stride != 1) return;
  constexpr int kStep = kLine / static_cast<int>(sizeof(T));
  const T* from = costs.base + row * costs.row_stride;
  for (int column = lane_id() * kStep; column < costs.m; column += kWarp * kStep)
    prefetch(from + column);
}

// What find_bid returns, once the shares in doubt have been read again. Copies of its arguments
// leave the caller's own in registers.
template <class T>
__device__ CROC_NOINLINE Bid bid_in_doubt(Costs<T> costs, Lists<T> lists, State s, int row) {
  fetch_row(costs, row);
  const int turn = rotation(row, costs.m);
  const auto key_of = [&](int column) { return bid_key(s, column, turn, costs.m); };
  const auto column_of = [&](unsigned key) { return unrotated(key & ~kMatched, turn, costs.m); };
  Share<T> share;
  share.load(lists, row, lane_id());
  unsigned again = 0;  // lanes whose share was read again
  for (bool whole = false;;) {
    const Glance found = glance(s, share, turn, costs.m);
    const unsigned doubts = found.doubts & ~again;
    if (doubts == 0) return found.bid(turn, costs.m);
    if (!whole && __popc(doubts) > kRefills) {
      list_row(costs, lists, s.v, row);
      share.load(lists, row, lane_id());
      whole = true, again = 0;
      continue;
    }
    const int lane = __ffs(static_cast<int>(doubts)) - 1;
    refill(costs, lists, s.v, row, lane, share, key_of, column_of);
    again |= 1u << lane;
  }
}

// What find_bid returns, from the row's list. By one warp.
template <class T>
__device__ Bid bid_from_list(const Costs<T>& costs, const Lists<T>& lists, const State& s,
                             int row) {
  const int turn = rotation(row, costs.m);
  Share<T> share;
  share.load(lists, row, lane_id());
  const Glance found = glance(s, share, turn, costs.m);
  return found.doubts == 0 ? found.bid(turn, costs.m) : bid_in_doubt(costs, lists, s, row);
}

}  // namespace croc::gpu
