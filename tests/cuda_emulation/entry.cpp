// What the tests call: the solver as assignment.cu runs it, and kernels with mistakes that the
// emulation must notice.
#include <cstdlib>
#include <vector>

#include "searches.cuh"
#include "solver.cuh"

namespace {

using namespace croc::gpu;

struct Launcher {
  void operator()(Kernel kernel, dim3 grid, int threads, int64_t shared, const Arguments& a,
                  int cluster = 1) const {
    emulation::launch([=] { kernel(a); }, grid, threads, shared, cluster);
  }
};

constexpr unsigned char kPoison = 0xfd;

void divergent_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void missing_threads() {
  if (threadIdx.x < 32) return;
  __syncthreads();
}

void missing_lanes() {
  if (threadIdx.x % 2 == 0) __shfl_sync(kAllLanes, 1.0, 0);
}

void partial_mask() { __reduce_min_sync(0xffffu, 1u); }

void shared_overrun() {
  CROC_DYNAMIC_SHARED(shared);
  reinterpret_cast<double*>(shared)[threadIdx.x % 16] = 1.0;  // the launch asks for 8
}

// The blocks of a cluster wait for each other at different places.
void divergent_cluster() {
  if (blockIdx.y == 0) {
    __cluster_barrier_wait();
  } else {
    __cluster_barrier_wait();
  }
}

void missing_block() {
  if (blockIdx.y > 0) Team::all().wait();
}

// The first block tells the others something after they may have ended.
void late_word() {
  CROC_DYNAMIC_SHARED(shared);
  if (blockIdx.y == 0) Team::all().tell(shared, static_cast<unsigned char>(1));
}

// Waits for fewer copies than there are.
void missing_wait(int* out) {
  CROC_DYNAMIC_SHARED(shared);
  float* word = reinterpret_cast<float*>(shared) + threadIdx.x % 16;
  const float number = 1.0f;
  copy_ahead<4>(word, &number, true);
  close_copies();
  wait_for_copies(1);
  out[threadIdx.x] = *word == 1.0f;
}

// The other blocks read what the first tells them without waiting for it.
void cluster_race(int* out) {
  CROC_DYNAMIC_SHARED(shared);
  int* word = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) *word = 0;
  Team::all().wait();
  if (blockIdx.y == 0 && warp_id() == 0) Team::all().tell(word, 1);
  if (lane_id() == 0 && blockIdx.y > 0) out[4 * blockIdx.y + warp_id()] = *word;
  Team::all().wait();
}

// Reads its neighbours' entries without waiting for them.
void race(int* out) {
  __shared__ int values[128];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[(threadIdx.x + 37) % 128];
}

}  // namespace

// Solves a batch; `shared_limit` is what a block of the pretended device has. `counters` gets
// kCounters ints per problem. With `blocks` every problem counts as one with many rows, for which
// as many blocks bid; 0: as for this size on a device with clusters; below 0: the same where a
// cluster has at most -blocks. Returns null, or what went wrong.
extern "C" const char* emulate(const void* cost, int is_double, int batch, int rows, int columns,
                               const void* num_rows, int wide_num_rows, int maximize,
                               int64_t* index, double* row_dual, double* column_dual, double* gap,
                               int32_t* status, int* counters, uint64_t seed, int64_t shared_limit,
                               int blocks) {
  emulation::start(seed);
  Arguments a{};
  a.cost = cost, a.num_rows = num_rows, a.wide_num_rows = wide_num_rows;
  a.vectors = columns % 4 == 0 && reinterpret_cast<uintptr_t>(cost) % 16 == 0;
  a.maximize = maximize, a.cost_bytes = is_double ? 8 : 4, a.batch = batch, a.rows = rows,
  a.columns = columns;
  a.index = index, a.row_dual = row_dual, a.column_dual = column_dual, a.gap = gap,
  a.status = status;
  const Plan plan = make_plan(batch, a.max_n(), a.max_m(), static_cast<int>(shared_limit),
                              blocks == 0 ? kMostBlocks : std::abs(blocks),
                              blocks > 0 ? 1 : kManyRows);
  const int64_t bytes = plan_workspace(a, plan);
  std::vector<unsigned char> workspace(bytes + 4096, kPoison);
  a.workspace = workspace.data();
  if (is_double)
    solve<double>(Launcher{}, a, plan);
  else
    solve<float>(Launcher{}, a, plan);
  for (size_t k = bytes; k < workspace.size(); ++k)
    if (workspace[k] != kPoison) return "write beyond the workspace";
  for (int b = 0; b < batch && emulation::error() == nullptr; ++b) {
    Workspace w;
    w.carve(a.workspace + b * a.workspace_stride, a);
    std::copy_n(w.scalars->counters, static_cast<int>(kCounters), counters + b * kCounters);
  }
  return emulation::error();
}

// Bytes of workspace, and the plan: 1 or 4 groups of columns in registers, 0 for all state in the
// workspace.
extern "C" int64_t workspace_bytes(int batch, int rows, int columns, int64_t shared_limit,
                                   int* groups) {
  Arguments a{};
  a.batch = batch, a.rows = rows, a.columns = columns, a.cost_bytes = 4;
  const Plan plan =
      make_plan(batch, a.max_n(), a.max_m(), static_cast<int>(shared_limit), kMostBlocks);
  *groups = plan.groups;
  return plan_workspace(a, plan);
}

template <class T>
struct LevelMemory {
  std::vector<unsigned char> level;
  std::vector<T> low, step;
  Levels<T> made;

  LevelMemory(int rows, int columns)
      : level(static_cast<size_t>(columns) * level_pitch(rows) + 15, kPoison),
        low(columns),
        step(columns) {
    const uintptr_t base = (reinterpret_cast<uintptr_t>(level.data()) + 15) / 16 * 16;
    made = {reinterpret_cast<unsigned char*>(base), low.data(), step.data(), level_pitch(rows)};
  }
};

// What levels.cuh says of costs, (rows, columns) doubles: for each the two ends that its level
// gives.
extern "C" const char* level_ends(const void* cost, int is_double, int rows, int columns,
                                  double* lower, double* upper, int* levels) {
  emulation::start(0);
  const auto ends = [&](auto zero) {
    using T = decltype(zero);
    const LevelMemory<T> memory(rows, columns);
    const Levels<T>& made = memory.made;
    const Costs<T> costs{static_cast<const T*>(cost), columns, 1, rows, columns, 1, false};
    emulation::launch([=] { make_levels(costs, made, Team::all()); }, dim3(1, 3), 128, 64, 3);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        const int64_t at = static_cast<int64_t>(i) * columns + j;
        levels[at] = made.column(j)[i];
        const double low = made.low[j], step = made.step[j], number = number_of(levels[at]);
        lower[at] = fma(number, step, low), upper[at] = fma(number + 1.0, step, low);
      }
  };
  is_double ? ends(0.0) : ends(0.0f);
  return emulation::error();
}

// What columns offer by their levels, given duals of the rows: (columns, 3) doubles, the least and
// second least reduced cost and the row of the least.
extern "C" const char* offers(const void* cost, int is_double, int rows, int columns,
                              const double* row_dual, double* out) {
  emulation::start(0);
  const auto offer = [&](auto zero) {
    using T = decltype(zero);
    using Ends = std::conditional_t<sizeof(T) == 4, RoundedEnds, ExactEnds>;
    const LevelMemory<T> memory(rows, columns);
    const Levels<T>& made = memory.made;
    const Costs<T> costs{static_cast<const T*>(cost), columns, 1, rows, columns, 1, false};
    std::vector<double> dual(row_dual, row_dual + rows);
    dual.resize(rows + 3);
    std::vector<typename Ends::Number> lower(rows + 3);
    for (int i = 0; i < rows; ++i) lower[i] = rounded_down(typename Ends::Number(), dual[i]);
    emulation::launch([=] { make_levels(costs, made, Team::all()); }, dim3(1), 128, 64);
    emulation::launch(
        [&] {
          for (int j = warp_id(); j < columns; j += warp_count()) {
            const Offer found = find_offer(costs, made.column(j), Ends{made.low[j], made.step[j]},
                                           dual.data(), lower.data(), j, 0, 1);
            if (lane_id() != 0) continue;
            out[3 * j] = found.least, out[3 * j + 1] = found.second, out[3 * j + 2] = found.row;
          }
        },
        dim3(1), 128, 64);
  };
  is_double ? offer(0.0) : offer(0.0f);
  return emulation::error();
}

extern "C" int bid_blocks(int batch, int rows, int columns, int64_t shared_limit, int most) {
  return make_plan(batch, std::min(rows, columns), std::max(rows, columns),
                   static_cast<int>(shared_limit), most)
      .blocks;
}

extern "C" const char* run_mistake(int which, uint64_t seed, int* out) {
  emulation::start(seed);
  const std::function<void()> mistakes[] = {
      divergent_barrier,  missing_threads,           missing_lanes, partial_mask,
      shared_overrun,     divergent_cluster,         missing_block, late_word,
      [=] { race(out); }, [=] { cluster_race(out); }, [=] { missing_wait(out); }};
  const int blocks = which == 5 || which == 6 || which == 7 || which == 9 ? 3 : 1;
  emulation::launch(mistakes[which], dim3(1, blocks), 128, 64, blocks);
  return emulation::error();
}
