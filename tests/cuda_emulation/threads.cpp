// The threads of a block: fibers, how they switch, and what they wait for each other for.
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "machine.h"

#ifdef CROC_RACECHECK
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

namespace emulation {
namespace {

#ifdef CROC_RACECHECK
constexpr unsigned kWithoutOrder = 1;

void* current_thread() { return __tsan_get_current_fiber(); }
void* new_thread() { return __tsan_create_fiber(0); }
void switch_to(void* thread) { __tsan_switch_to_fiber(thread, kWithoutOrder); }
#else
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

}  // namespace

void prepare_fibers() {
  machine->done = 0;
  machine->block = Group{};
  machine->warps.assign(current.threads / kLanes, Group{});
  for (int t = 0; t < current.threads; ++t) prepare_fiber(t);
}

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

}  // namespace emulation
