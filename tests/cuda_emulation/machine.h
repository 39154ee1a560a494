// The state of a running launch, which threads.cpp and launches.cpp share.
#pragma once

#include <ucontext.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "emulation.h"

// With CROC_RACECHECK every fiber is a thread to ThreadSanitizer, ordered with others by barriers
// alone: what the device code does to one address from two threads without a barrier in between is
// reported, whatever the schedule. Compile only the device code with -fsanitize=thread, not the
// emulation itself.
#ifdef CROC_RACECHECK
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulation {

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
  uint64_t values[2][kLanes];  // shuffles: what each lane gave, for this operation and the last
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
};
inline Launch current;

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
};
inline Together together;

// The block of this thread of the host.
inline thread_local Machine* machine = nullptr;

inline uint64_t next_random() {
  current.random ^= current.random << 13;
  current.random ^= current.random >> 7;
  current.random ^= current.random << 17;
  return current.random;
}

#ifdef CROC_RACECHECK
inline void release(int& address) { __tsan_release(&address); }
inline void acquire(int& address) { __tsan_acquire(&address); }
#else
inline void release(int&) {}
inline void acquire(int&) {}
#endif

// Of the block of this thread of the host, in threads.cpp.
void prepare_fibers();                   // at the kernel's first line
bool run_warps(std::vector<int>& order);  // each in turn; whether any could go on

}  // namespace emulation
