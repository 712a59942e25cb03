// State of the emulated machine, shared by the sources of the emulator.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "testing/emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#define SCAN_FAST_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SCAN_FAST_ADDRESS_SANITIZER 1
#endif
#endif

namespace scan_fast::emu {

constexpr int kWarp = 32;

enum class State { kReady, kAtBarrier, kAtCollective, kAtMBarrier, kAtNamedBarrier, kAtWgmma, kDone };

// Vector clock of a warp, see emulator_races.cpp.
using Clock = std::vector<unsigned>;
inline void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

struct PendingCopy {
  void* dst;
  unsigned char bytes[16];
  int group;
};

// The accumulators of a thread while a wgmma holds them.
struct HeldResult {
  float* registers;
  std::vector<float> values;
  int pending;  // products that have not run yet
};

struct Fiber {
  State state = State::kDone;
  unsigned index = 0;
  Collective kind{};
  unsigned mask = 0;
  Slot mine{};
  std::vector<PendingCopy> copies;
  int open_group = 0;
  bool waited = false;  // for the kernel before
  // Waiting at a memory barrier for this parity, at a named barrier, or for all but this many groups of wgmma.
  const void* mbarrier = nullptr;
  unsigned parity = 0;
  int named_barrier = 0;
  int wgmma_pending = 0;
  // wgmma: products issued, the open group, whether a fence came after the last wait.
  size_t products = 0;
  int wgmma_group = 0;
  bool fenced = false;
  std::vector<HeldResult> held;
  unsigned char* stack = nullptr;
  bool started = false;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
};

struct Warp {
  Slot slots[kWarp];
  unsigned epoch = 0;
  Clock clock;  // by warp
};

struct Reader {
  unsigned warp, warp_epoch, lanes, time;
};

struct Cell {  // two bytes of shared memory; valid in block epoch `epoch` only
  uint64_t epoch = 0;
  int writer = -1;
  unsigned writer_warp_epoch = 0, writer_time = 0;
  bool writer_atomic = false;
  std::vector<Reader> readers;
};

struct Region {
  std::string name;
  unsigned char* base = nullptr;
  size_t bytes = 0;
  std::vector<Cell> cells;
  ~Region();
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned threads = 0;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  uint64_t epoch = 1;  // grows at every barrier and block, over the life of the process
  uint64_t random = 0;
  const void* kernel = nullptr;
  bool early = false;       // started by launch_after
  size_t static_bytes = 0;  // of the arrays that threads have used
  std::unique_ptr<Region> dynamic;
  std::unordered_map<const void*, std::unique_ptr<Region>> statics;
#if defined(__x86_64__)
  void* scheduler_stack_pointer = nullptr;
#else
  ucontext_t scheduler_context;
#endif
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

extern Machine machine;

// Suspends the running fiber until the scheduler makes it ready.
void to_scheduler();
std::string where();
uint64_t next_random(uint64_t& state);

// emulator_warp.cpp: adds 16 products and the sum so far as coarsely as a matrix unit may. Units align the 17 addends
// to the largest and may truncate each to 24 bits, and the result again.
float truncated_sum(const float (&addends)[17]);
const char* name_of(Collective kind);
// Completes the collectives whose lanes have all come, and returns whether there were any.
bool complete_collectives();

// emulator_launch.cpp: fail if the GPU would not launch this grid, or not with the kernel's shared memory as far as
// known.
void check_grid(dim3 grid, dim3 block);
void check_shared_memory();

// emulator_races.cpp
void touch_as(unsigned thread, const void* pointer, size_t bytes, Access access);
// Publishes the accesses and the knowledge of the thread's warp to those who acquire the clock.
void release(unsigned thread, Clock& clock);
void acquire(unsigned thread, const Clock& clock);

// The address of shared memory is a multiple of 128 and not of 1024, as it may be on a GPU.
constexpr uint32_t kSharedBegin = 384;

// emulator_hopper.cpp. The functions named complete return whether anything moved.
void reset_hopper();
bool complete_hopper();
void check_hopper_finished();
std::string waiting_for(const Fiber& fiber);

// emulator_wgmma.cpp
void reset_wgmma();
bool complete_wgmma();
void check_wgmma_finished();

}  // namespace scan_fast::emu
