// Launches: one block after another, or the blocks of a cluster in turn.
#include <sys/mman.h>

#include <cstdio>
#include <thread>
#include <utility>

#include "machine.h"

namespace emulation {
namespace {

constexpr uint64_t kPoison = 0x7ff4dead7ff4deadULL;  // a NaN, for whoever reads before writing

void begin_block() {
  machine->shared.assign(current.words + 32, kPoison);
  prepare_fibers();
  machine->state = Machine::kRunning;
  release(current.between_blocks);
}

void end_block() {
  machine->state = Machine::kEnded;
  for (size_t w = current.words; w < machine->shared.size(); ++w)
    if (machine->shared[w] != kPoison)
      std::snprintf(current.error, sizeof current.error, "write beyond the block's shared memory");
}

void report_deadlock() {
  if (machine->block.arrived == 0 && together.arrived > 0)
    std::snprintf(current.error, sizeof current.error,
                  "%d of %d blocks wait at line %d for blocks that ended or wait elsewhere",
                  together.arrived, together.size, together.site);
  else
    std::snprintf(current.error, sizeof current.error,
                  "%d of %d threads wait at line %d for threads that ended or wait elsewhere",
                  machine->block.arrived, current.threads,
                  machine->block.arrived > 0 ? machine->block.site : 0);
}

// Gives the turn to a block of the cluster that has not ended, `step` blocks on or later.
void pass_turn(int step) {
  const int me = static_cast<int>(machine - together.blocks);
  for (int k = 0; k < together.size; ++k) {
    together.next = (me + step + k) % together.size;
    if (together.blocks[together.next].state != Machine::kEnded) break;
  }
  together.turn.notify_all();
}

void await_turn(std::unique_lock<std::mutex>& guard) {
  const int me = static_cast<int>(machine - together.blocks);
  together.turn.wait(guard, [me] { return together.next == me; });
}

void run_block() {
  std::unique_lock<std::mutex> guard(together.lock);
  await_turn(guard);
  begin_block();
  std::vector<int> order(machine->warps.size());
  for (size_t w = 0; w < order.size(); ++w) order[w] = static_cast<int>(w);
  while (machine->done < current.threads && current.error[0] == 0) {
    const bool progress = run_warps(order);
    together.idle = progress ? 0 : together.idle + 1;
    if (together.idle > together.size && current.error[0] == 0) report_deadlock();
    if (together.size == 1 || (progress && !(current.shuffled && next_random() % 4 == 0))) continue;
    pass_turn(progress ? static_cast<int>(next_random() % together.size) : 1);
    await_turn(guard);
  }
  end_block();
  pass_turn(1);
}

// The blocks of a cluster, or one block.
void run_together(unsigned x, unsigned y, int size, dim3 grid) {
  together.size = size, together.idle = 0, together.arrived = 0;
  together.next = current.shuffled ? static_cast<int>(next_random() % size) : 0;
  for (int rank = 0; rank < size; ++rank) together.blocks[rank].state = Machine::kWaiting;
  const auto run = [=](int rank) {
    machine = &together.blocks[rank];
    blockIdx = dim3(x, y + rank), blockDim = dim3(current.threads), gridDim = grid;
    run_block();
  };
  if (size == 1) return run(0);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) threads.emplace_back(run, rank);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void start(uint64_t seed) {
  current.error[0] = 0;
  current.shuffled = seed != 0;
  current.random = seed * 0x9e3779b97f4a7c15ULL + 1;
}

const char* error() { return current.error[0] == 0 ? nullptr : current.error; }

void launch(std::function<void()> body, dim3 grid, int threads, int64_t shared, int cluster) {
  if (current.error[0] != 0) return;
  const bool whole =
      cluster == 1 || (cluster <= kMostBlocks && static_cast<int>(grid.y) == cluster);
  if (threads % kLanes != 0 || threads < kLanes || threads > kMaxThreads || grid.x == 0 ||
      grid.y == 0 || grid.y > 65535 || !whole) {
    std::snprintf(current.error, sizeof current.error,
                  "bad launch: %d threads, grid %u x %u, clusters of %d", threads, grid.x, grid.y,
                  cluster);
    return;
  }
  for (int rank = 0; rank < cluster; ++rank) {
    unsigned char*& stacks = together.blocks[rank].stacks;
    if (stacks == nullptr)
      stacks = static_cast<unsigned char*>(
          mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  current.body = std::move(body);
  current.threads = threads;
  current.words = (shared + 7) / 8;
  const int64_t runs = static_cast<int64_t>(grid.x) * grid.y / cluster;
  const int64_t offset = current.shuffled ? static_cast<int64_t>(next_random() % runs) : 0;
  const bool backwards = current.shuffled && next_random() % 2 == 0;
  for (int64_t k = 0; k < runs && current.error[0] == 0; ++k) {
    const int64_t run = backwards ? runs - 1 - (k + offset) % runs : (k + offset) % runs;
    run_together(run % grid.x, run / grid.x, cluster, grid);
  }
  acquire(current.between_blocks);
}

}  // namespace emulation
