// The scheduler behind emulation.h.
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

// With CROC_RACECHECK every fiber is a thread to ThreadSanitizer, ordered with others by barriers
// alone: what the device code does to one address from two threads without a barrier in between is
// reported, whatever the schedule. Compile only the device code with -fsanitize=thread, not this
// file.
#ifdef CROC_RACECHECK
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

enum class Wait { kReady, kWarp, kBlock, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  void* thread = nullptr;  // ThreadSanitizer's
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
  void* home_thread = nullptr;
  int order[3];  // addresses for ThreadSanitizer: two for barriers in turn, one between blocks
  int barriers = 0;
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

#ifdef CROC_RACECHECK
constexpr unsigned kWithoutOrder = 1;

void release(int which) { __tsan_release(&machine.order[which]); }
void acquire(int which) { __tsan_acquire(&machine.order[which]); }

// longjmp and ThreadSanitizer do not mix.
void leave_fiber() {
  Fiber& fiber = machine.fibers[machine.running];
  __tsan_switch_to_fiber(machine.home_thread, kWithoutOrder);
  swapcontext(&fiber.context, &machine.home);
}
void enter_fiber(Fiber& fiber) {
  if (fiber.thread == nullptr) fiber.thread = __tsan_create_fiber(0);
  machine.home_thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.thread, kWithoutOrder);
  swapcontext(&machine.home, &fiber.context);
}
#else
void release(int) {}
void acquire(int) {}

void leave_fiber() {
  if (_setjmp(machine.fibers[machine.running].resume) == 0) _longjmp(machine.scheduler, 1);
}
void enter_fiber(Fiber& fiber) {
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}
#endif

void pause(Wait wait) {
  machine.fibers[machine.running].wait = wait;
  leave_fiber();
}

[[noreturn]] void fail(const char* what, int site, int other) {
  if (machine.error[0] == 0)
    std::snprintf(machine.error, sizeof machine.error,
                  "%s (lines %d and %d, block %u %u, thread %d)", what, site, other, blockIdx.x,
                  blockIdx.y, machine.running);
  leave_fiber();
  std::abort();  // a fiber that failed is not resumed
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
  acquire(2);
  machine.body();
  release(2);
  machine.fibers[machine.running].wait = Wait::kDone;
  ++machine.done;
  leave_fiber();
}

void run_fiber(int thread) {
  machine.running = thread;
  threadIdx = dim3(thread);
  enter_fiber(machine.fibers[thread]);
}

void prepare_fiber(int thread) {
  Fiber& fiber = machine.fibers[thread];
  fiber.started = false;
  fiber.wait = Wait::kReady;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = machine.stacks + thread * kStackBytes;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &machine.home;
  makecontext(&fiber.context, fiber_main, 0);
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
  for (int t = 0; t < machine.threads; ++t) prepare_fiber(t);
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
  // Two addresses in turn: who hurries on to the next barrier must not seem ordered before who is
  // still in this one.
  const int turn = machine.barriers & 1;
  release(turn);
  if (machine.block.arrived + 1 == machine.threads) ++machine.barriers;
  const uint64_t result = join(machine.block, op, value, site, 0, machine.threads, Wait::kBlock);
  acquire(turn);
  return result;
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

int64_t clock() {
  static int64_t now = 0;
  return ++now;
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
    release(2);
    if (!run_block()) return;
    for (size_t w = words; w < machine.shared.size(); ++w)
      if (machine.shared[w] != kPoison)
        std::snprintf(machine.error, sizeof machine.error,
                      "write beyond the block's shared memory");
  }
  acquire(2);
}

}  // namespace emulation
