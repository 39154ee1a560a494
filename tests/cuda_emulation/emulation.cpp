// The scheduler behind emulation.h.
#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
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
constexpr int kMostBlocks = 8;
constexpr size_t kStackBytes = 64 * 1024;

enum class Wait { kReady, kWarp, kBlock, kCluster, kDone };

struct Fiber {
  ucontext_t context;
  void* place[5];  // where it goes on, as __builtin_setjmp keeps it
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
  int order[2];  // addresses for ThreadSanitizer, for a warp's barriers in turn
  int barriers = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t size, room;
};

struct Copies {  // of a thread
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> closed;
};

struct Machine {  // a block
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMaxThreads]};
  unsigned char* stacks = nullptr;
  std::vector<Group> warps;
  Group block;
  std::vector<uint64_t> shared;
  std::vector<Copies> copies{kMaxThreads};
  void* place[5];  // where the scheduler goes on
  ucontext_t home;
  void* home_thread = nullptr;
  int order[2];  // addresses for ThreadSanitizer, for barriers in turn
  int barriers = 0;
  int running = -1, done = 0;
  enum { kWaiting, kRunning, kEnded } state = kWaiting;
};

struct Launch {
  std::function<void()> body;
  int threads = 0;
  int64_t words = 0;  // of dynamic shared memory
  bool shuffled = false;
  uint64_t random = 1;
  char error[256] = "";
  int between_blocks;  // an address for ThreadSanitizer
} current;

// The blocks that run together, one at a time.
struct Together {
  Machine blocks[kMostBlocks];
  int size = 1;
  int next = 0;  // whose turn it is
  int idle = 0;  // turns in which nobody could go on
  std::mutex lock;
  std::condition_variable turn;
  int arrived = 0, site = 0;  // at the cluster's barrier
  int order[2];               // addresses for ThreadSanitizer
  int barriers = 0;
} together;

thread_local Machine* machine = &together.blocks[0];

uint64_t next_random() {
  current.random ^= current.random << 13;
  current.random ^= current.random >> 7;
  current.random ^= current.random << 17;
  return current.random;
}

#ifdef CROC_RACECHECK
constexpr unsigned kWithoutOrder = 1;

void release(int& address) { __tsan_release(&address); }
void acquire(int& address) { __tsan_acquire(&address); }
void* current_thread() { return __tsan_get_current_fiber(); }
void* new_thread() { return __tsan_create_fiber(0); }
void switch_to(void* thread) { __tsan_switch_to_fiber(thread, kWithoutOrder); }
#else
void release(int&) {}
void acquire(int&) {}
void* current_thread() { return nullptr; }
void* new_thread() { return nullptr; }
void switch_to(void*) {}
#endif

// Not the library's setjmp, whose calls ThreadSanitizer and fortified builds take over; swapcontext
// asks the kernel for the signal mask each time. In a function of its own: to the compiler a jump
// never comes back to the function it is in.
[[noreturn, gnu::noinline]] void jump(void** place) { __builtin_longjmp(place, 1); }
void leave_fiber() {
  switch_to(machine->home_thread);
  if (__builtin_setjmp(machine->fibers[machine->running].place) == 0) jump(machine->place);
}
void enter_fiber(Fiber& fiber) {
  if (fiber.thread == nullptr) fiber.thread = new_thread();
  machine->home_thread = current_thread();
  switch_to(fiber.thread);
  if (__builtin_setjmp(machine->place) != 0) return;
  if (fiber.started) jump(fiber.place);
  fiber.started = true;
  setcontext(&fiber.context);
}

void pause(Wait wait) {
  machine->fibers[machine->running].wait = wait;
  leave_fiber();
}

[[noreturn]] void fail(const char* what, int site, int other) {
  if (current.error[0] == 0)
    std::snprintf(current.error, sizeof current.error,
                  "%s (lines %d and %d, block %u %u, thread %d)", what, site, other, blockIdx.x,
                  blockIdx.y, machine->running);
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
  const int me = machine->running;
  group.total = combine(op, group.total, value, me - first);
  if (++group.arrived < count) {
    pause(wait);
    return machine->fibers[me].result;
  }
  group.arrived = 0;
  for (int t = first; t < first + count; ++t) {
    machine->fibers[t].result = group.total;
    machine->fibers[t].wait = Wait::kReady;
  }
  return group.total;
}

void fiber_main() {
  acquire(current.between_blocks);
  current.body();
  Copies& copies = machine->copies[machine->running];
  if (!copies.open.empty() || !copies.closed.empty())
    std::snprintf(current.error, sizeof current.error, "copies that nobody has waited for");
  copies = Copies{};
  release(current.between_blocks);
  machine->fibers[machine->running].wait = Wait::kDone;
  ++machine->done;
  leave_fiber();
}

void run_fiber(int thread) {
  machine->running = thread;
  threadIdx = dim3(thread);
  enter_fiber(machine->fibers[thread]);
}

void prepare_fiber(int thread) {
  Fiber& fiber = machine->fibers[thread];
  fiber.started = false;
  fiber.wait = Wait::kReady;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = machine->stacks + thread * kStackBytes;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &machine->home;
  makecontext(&fiber.context, fiber_main, 0);
}

// Runs the ready lanes of a warp once; returns whether there were any.
bool run_warp(int warp) {
  bool progress = false;
  const int flip = current.shuffled ? static_cast<int>(next_random() % kLanes) : 0;
  for (int k = 0; k < kLanes && current.error[0] == 0; ++k) {
    const int thread = warp * kLanes + (k ^ flip);
    if (machine->fibers[thread].wait != Wait::kReady) continue;
    run_fiber(thread);
    progress = true;
  }
  return progress;
}

void begin_block() {
  constexpr uint64_t kPoison = 0x7ff4dead7ff4deadULL;  // a NaN, for whoever reads before writing
  machine->block = Group{};
  machine->warps.assign(current.threads / kLanes, Group{});
  machine->done = 0;
  machine->shared.assign(current.words + 32, kPoison);
  for (int t = 0; t < current.threads; ++t) prepare_fiber(t);
  machine->state = Machine::kRunning;
  release(current.between_blocks);
}

void end_block() {
  constexpr uint64_t kPoison = 0x7ff4dead7ff4deadULL;
  machine->state = Machine::kEnded;
  for (size_t w = current.words; w < machine->shared.size(); ++w)
    if (machine->shared[w] != kPoison)
      std::snprintf(current.error, sizeof current.error, "write beyond the block's shared memory");
}

// Every warp in turn; returns whether any could go on.
bool run_warps(std::vector<int>& order) {
  if (current.shuffled)
    for (size_t w = order.size() - 1; w > 0; --w)
      std::swap(order[w], order[next_random() % (w + 1)]);
  bool progress = false;
  for (int w : order) {
    // Shuffled, a warp stops at a random point and others overtake it.
    while (run_warp(w)) {
      progress = true;
      if (current.shuffled && next_random() % 4 == 0) break;
    }
    if (current.error[0] != 0) break;
  }
  return progress;
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

uint64_t block_wait(Op op, uint64_t value, int site) {
  // Two addresses in turn: who hurries on to the next barrier must not seem ordered before who is
  // still in this one.
  int& order = machine->order[machine->barriers & 1];
  release(order);
  if (machine->block.arrived + 1 == current.threads) ++machine->barriers;
  const uint64_t result = join(machine->block, op, value, site, 0, current.threads, Wait::kBlock);
  acquire(order);
  return result;
}

void cluster_wait(int site) {
  int& order = together.order[together.barriers & 1];
  release(order);
  Group& block = machine->block;
  if (block.arrived == 0)
    block.op = Op::kClusterBarrier, block.site = site;
  else if (block.op != Op::kClusterBarrier || block.site != site)
    fail("divergent threads wait for each other", site, block.site);
  if (++block.arrived == current.threads) {
    block.arrived = 0;
    if (together.arrived > 0 && together.site != site)
      fail("divergent blocks wait for each other", site, together.site);
    together.site = site;
    if (++together.arrived == together.size) {
      together.arrived = 0;
      ++together.barriers;
      for (int rank = 0; rank < together.size; ++rank)
        for (int t = 0; t < current.threads; ++t)
          together.blocks[rank].fibers[t].wait = Wait::kReady;
      acquire(order);
      return;
    }
  }
  pause(Wait::kCluster);
  acquire(order);
}

void* cluster_address(const void* address, unsigned rank) {
  maybe_switch();
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - dynamic_shared();
  if (offset < 0 || offset >= 8 * current.words || rank >= static_cast<unsigned>(together.size))
    fail("no address of the cluster's shared memory", 0, 0);
  Machine& other = together.blocks[rank];
  if (other.state != Machine::kRunning)
    fail("the shared memory of a block that has not begun or has ended", 0, 0);
  return reinterpret_cast<unsigned char*>(other.shared.data()) + offset;
}

uint64_t warp_reduce(Op op, uint64_t value, int site) {
  const int warp = machine->running / kLanes;
  return join(machine->warps[warp], op, value, site, warp * kLanes, kLanes, Wait::kWarp);
}

void warp_wait(int site) {
  const int warp = machine->running / kLanes;
  Group& group = machine->warps[warp];
  int& order = group.order[group.barriers & 1];
  release(order);
  if (group.arrived + 1 == kLanes) ++group.barriers;
  join(group, Op::kWarpBarrier, 0, site, warp * kLanes, kLanes, Wait::kWarp);
  acquire(order);
}

uint64_t warp_shuffle(uint64_t value, int source, int site) {
  const int warp = machine->running / kLanes, lane = machine->running % kLanes;
  Group& group = machine->warps[warp];
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
  if (current.shuffled && next_random() % 4 == 0) pause(Wait::kReady);
}

int64_t clock() {
  static int64_t now = 0;
  return ++now;
}

void copy_ahead(void* to, const void* from, size_t size, size_t room) {
  std::memset(to, 0xff, room);
  machine->copies[machine->running].open.push_back({to, from, size, room});
}

void close_copies() {
  Copies& mine = machine->copies[machine->running];
  mine.closed.emplace_back();
  mine.closed.back().swap(mine.open);
}

void wait_for_copies(int left) {
  std::vector<std::vector<Copy>>& closed = machine->copies[machine->running].closed;
  for (; static_cast<int>(closed.size()) > left; closed.erase(closed.begin()))
    for (const Copy& copy : closed.front()) {
      std::memcpy(copy.to, copy.from, copy.size);
      std::memset(static_cast<unsigned char*>(copy.to) + copy.size, 0, copy.room - copy.size);
    }
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(machine->shared.data()); }

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
