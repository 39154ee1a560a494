// The scheduler behind emulation.h.
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

enum class Wait { kReady, kWarp, kBlock, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  Wait wait;
  uint64_t result;
};

struct Group {  // a warp or the block, at most one operation at a time
  int arrived = 0;
  Op op{};
  int site = 0;
  uint64_t total = 0;
  uint64_t values[2]
                 [kLanes];  // shuffles: what each lane gave, for this operation and the one before
  int turn = 0;
};

struct Machine {
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMaxThreads]};
  unsigned char* stacks = nullptr;
  std::vector<Group> warps;
  Group block;
  std::vector<uint64_t> shared;
  jmp_buf scheduler;
  ucontext_t home;
  int threads = 0, running = -1, done = 0;
  bool shuffled = false;
  uint64_t random = 1;
  char error[256] = "";
  std::function<void()> body;
} machine;

uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

[[noreturn]] void back_to_scheduler() { _longjmp(machine.scheduler, 1); }

void pause(Wait wait) {
  Fiber& fiber = machine.fibers[machine.running];
  fiber.wait = wait;
  if (_setjmp(fiber.resume) == 0) back_to_scheduler();
}

[[noreturn]] void fail(const char* what, int site, int other) {
  if (machine.error[0] == 0)
    std::snprintf(machine.error, sizeof machine.error,
                  "%s (lines %d and %d, block %u %u, thread %d)", what, site, other, blockIdx.x,
                  blockIdx.y, machine.running);
  back_to_scheduler();
}

uint64_t neutral(Op op) {
  if (op == Op::kReduceMin) return ~uint64_t{0};
  if (op == Op::kReduceMinSigned) return static_cast<uint64_t>(INT64_MAX);
  if (op == Op::kReduceMaxSigned) return static_cast<uint64_t>(INT64_MIN);
  return 0;
}

uint64_t combine(Op op, uint64_t a, uint64_t b, int lane) {
  switch (op) {
    case Op::kReduceMin:
      return std::min(a, b);
    case Op::kReduceMax:
      return std::max(a, b);
    case Op::kReduceMinSigned:
      return static_cast<uint64_t>(std::min<int64_t>(a, b));
    case Op::kReduceMaxSigned:
      return static_cast<uint64_t>(std::max<int64_t>(a, b));
    case Op::kReduceAdd:
      return a + b;
    case Op::kBallot:
      return a | b << lane;
    default:
      return a | b;
  }
}

// The last to arrive wakes the others.
uint64_t join(Group& group, Op op, uint64_t value, int site, int first, int count, Wait wait) {
  if (group.arrived == 0) {
    group.op = op, group.site = site;
    group.total = neutral(op);
  } else if (group.op != op || group.site != site) {
    fail("divergent threads wait for each other", site, group.site);
  }
  const int me = machine.running;
  group.total = combine(op, group.total, value, me - first);
  if (++group.arrived < count) {
    pause(wait);
    return machine.fibers[me].result;
  }
  group.arrived = 0;
  for (int t = first; t < first + count; ++t) {
    machine.fibers[t].result = group.total;
    machine.fibers[t].wait = Wait::kReady;
  }
  return group.total;
}

void fiber_main() {
  machine.body();
  machine.fibers[machine.running].wait = Wait::kDone;
  ++machine.done;
  back_to_scheduler();
}

void run_fiber(int thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.running = thread;
  threadIdx = dim3(thread);
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = machine.stacks + thread * kStackBytes;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = &machine.home;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

// Runs the ready lanes of a warp once; returns whether there were any.
bool run_warp(int warp) {
  bool progress = false;
  const int flip = machine.shuffled ? static_cast<int>(next_random() % kLanes) : 0;
  for (int k = 0; k < kLanes && machine.error[0] == 0; ++k) {
    const int thread = warp * kLanes + (k ^ flip);
    if (machine.fibers[thread].wait != Wait::kReady) continue;
    run_fiber(thread);
    progress = true;
  }
  return progress;
}

bool run_block() {
  const int warps = machine.threads / kLanes;
  machine.block = Group{};
  machine.warps.assign(warps, Group{});
  machine.done = 0;
  for (int t = 0; t < machine.threads; ++t)
    machine.fibers[t].started = false, machine.fibers[t].wait = Wait::kReady;
  std::vector<int> order(warps);
  for (int w = 0; w < warps; ++w) order[w] = w;
  while (machine.done < machine.threads) {
    if (machine.shuffled)
      for (int w = warps - 1; w > 0; --w) std::swap(order[w], order[next_random() % (w + 1)]);
    bool progress = false;
    for (int w : order) {
      // Shuffled, a warp stops at a random point and others overtake it.
      while (run_warp(w)) {
        progress = true;
        if (machine.shuffled && next_random() % 4 == 0) break;
      }
      if (machine.error[0] != 0) return false;
    }
    if (!progress) {
      const int site = machine.block.arrived > 0 ? machine.block.site : 0;
      std::snprintf(machine.error, sizeof machine.error,
                    "%d of %d threads wait at line %d for threads that ended or wait elsewhere",
                    machine.block.arrived, machine.threads, site);
      return false;
    }
  }
  return true;
}

}  // namespace

uint64_t block_wait(Op op, uint64_t value, int site) {
  return join(machine.block, op, value, site, 0, machine.threads, Wait::kBlock);
}

uint64_t warp_reduce(Op op, uint64_t value, int site) {
  const int warp = machine.running / kLanes;
  return join(machine.warps[warp], op, value, site, warp * kLanes, kLanes, Wait::kWarp);
}

uint64_t warp_shuffle(uint64_t value, int source, int site) {
  const int warp = machine.running / kLanes, lane = machine.running % kLanes;
  Group& group = machine.warps[warp];
  if (group.arrived == 0) group.turn ^= 1;
  const int turn = group.turn;
  group.values[turn][lane] = value;
  join(group, Op::kBallot, 1, site, warp * kLanes, kLanes, Wait::kWarp);
  return group.values[turn][source];
}

void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp operation must name all lanes", static_cast<int>(mask), 0);
}

void maybe_switch() {
  if (machine.shuffled && next_random() % 4 == 0) pause(Wait::kReady);
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(machine.shared.data()); }

void start(uint64_t seed) {
  machine.error[0] = 0;
  machine.shuffled = seed != 0;
  machine.random = seed * 0x9e3779b97f4a7c15ULL + 1;
}

const char* error() { return machine.error[0] == 0 ? nullptr : machine.error; }

void launch(std::function<void()> body, dim3 grid, int threads, int64_t shared) {
  constexpr uint64_t kPoison = 0x7ff4dead7ff4deadULL;  // a NaN, for whoever reads before writing
  if (machine.error[0] != 0) return;
  if (threads % kLanes != 0 || threads < kLanes || threads > kMaxThreads || grid.x == 0 ||
      grid.y == 0 || grid.y > 65535) {
    std::snprintf(machine.error, sizeof machine.error, "bad launch: %d threads, grid %u x %u",
                  threads, grid.x, grid.y);
    return;
  }
  if (machine.stacks == nullptr)
    machine.stacks =
        static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  machine.body = std::move(body);
  machine.threads = threads;
  blockDim = dim3(threads), gridDim = grid;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y;
  const int64_t offset = machine.shuffled ? static_cast<int64_t>(next_random() % blocks) : 0;
  const bool backwards = machine.shuffled && next_random() % 2 == 0;
  const int64_t words = (shared + 7) / 8;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t block = backwards ? blocks - 1 - (k + offset) % blocks : (k + offset) % blocks;
    blockIdx = dim3(block % grid.x, block / grid.x);
    machine.shared.assign(words + 32, kPoison);
    if (!run_block()) return;
    for (size_t w = words; w < machine.shared.size(); ++w)
      if (machine.shared[w] != kPoison)
        std::snprintf(machine.error, sizeof machine.error,
                      "write beyond the block's shared memory");
  }
}

}  // namespace emulation
