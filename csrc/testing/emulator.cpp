// The scheduler behind emulator.h: threads of a block are fibers on one host thread, run round-robin.
//
// A fiber gives up the processor only at a barrier, a collective, or its end. After each round the scheduler completes
// every collective whose lanes have all come, and the block barrier if every live thread waits at it. A round in which
// nothing moves is a deadlock on the GPU too, and is reported.
#include "testing/emulator.h"

#include <sys/mman.h>

#include <cstdlib>
#include <numeric>

#include "testing/emulator_machine.h"

#if defined(SCAN_FAST_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and continues on another stack.
extern "C" void scan_fast_switch_stack(void** save, void* load);
__asm__(R"(
.text
.globl scan_fast_switch_stack
.type scan_fast_switch_stack,@function
scan_fast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size scan_fast_switch_stack,.-scan_fast_switch_stack
)");
#endif

namespace scan_fast::emu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

std::unique_ptr<Region> make_region(const std::string& name, size_t bytes) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->bytes = bytes;
  // posix_memalign keeps the exact size, so that the byte after the end is out of range for AddressSanitizer.
  void* base = nullptr;
  if (bytes > 0 && posix_memalign(&base, 128, bytes) != 0) fail("out of memory");
  region->base = static_cast<unsigned char*>(base);
  return region;
}

}  // namespace

Machine machine;

void to_scheduler() {
  Fiber& fiber = *machine.current;
#if defined(SCAN_FAST_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, machine.scheduler_stack, machine.scheduler_stack_bytes);
#endif
#if defined(__x86_64__)
  scan_fast_switch_stack(&fiber.stack_pointer, machine.scheduler_stack_pointer);
#else
  swapcontext(&fiber.context, &machine.scheduler_context);
#endif
#if defined(SCAN_FAST_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
}

namespace {

void run_body() {
  try {
    (*machine.body)();
    if (machine.early && !machine.current->waited) {
      fail("a thread that launch_after started ends without wait_for_previous_kernel" + where());
    }
  } catch (...) {
    if (!machine.error) machine.error = std::current_exception();
  }
}

// The fibers outlive a block: each runs one thread of one block, reports, and waits for the next.
void fiber_main() {
#if defined(SCAN_FAST_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  for (;;) {
    run_body();
    machine.current->state = State::kDone;
    to_scheduler();
  }
}

void start(Fiber& fiber) {
  fiber.stack = static_cast<unsigned char*>(
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (fiber.stack == MAP_FAILED) fail("out of memory for fiber stacks");
  mprotect(fiber.stack, 4096, PROT_NONE);  // a kernel that overflows its stack must crash, not corrupt
#if defined(__x86_64__)
  // As after a call: the six callee-saved registers, the return address, and the stack 8 bytes off 16-alignment.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 3;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
  fiber.started = true;
}

// Only after an error: the stacks then hold half-run kernels.
void drop_fibers() {
  for (auto& fiber : machine.fibers) {
    if (!fiber->started) continue;
#if defined(SCAN_FAST_ADDRESS_SANITIZER)
    __asan_unpoison_memory_region(fiber->stack, kStackBytes);
#endif
    munmap(fiber->stack, kStackBytes);
  }
  machine.fibers.clear();
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  const unsigned i = fiber.index;
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  if (!fiber.started) start(fiber);
#if defined(SCAN_FAST_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
#if defined(__x86_64__)
  scan_fast_switch_stack(&machine.scheduler_stack_pointer, fiber.stack_pointer);
#else
  swapcontext(&machine.scheduler_context, &fiber.context);
#endif
#if defined(SCAN_FAST_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

}  // namespace

std::string where() {
  return " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) +
         ")";
}

namespace {

bool complete_barrier() {
  bool waiting = false;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const State state = machine.fibers[i]->state;
    if (state != State::kAtBarrier && state != State::kDone) return false;
    waiting |= state == State::kAtBarrier;
  }
  if (!waiting) return false;
  for (unsigned i = 0; i < machine.threads; ++i) {
    if (machine.fibers[i]->state == State::kAtBarrier) machine.fibers[i]->state = State::kReady;
  }
  ++machine.epoch;
  return true;
}

}  // namespace

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

namespace {

void shuffle(std::vector<uint64_t>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(machine.random) % i]);
}

// What the first thread of each warp that is not done waits for.
std::string waiting() {
  std::string text = where();
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.state == State::kDone || (i % kWarp != 0 && machine.fibers[i - 1]->state == fiber.state)) continue;
    text += "\n  thread " + std::to_string(i) + ": ";
    switch (fiber.state) {
      case State::kAtBarrier: text += "__syncthreads"; break;
      case State::kAtCollective: text += name_of(fiber.kind); break;
      default: text += waiting_for(fiber);
    }
  }
  return text;
}

void run_block() {
  if (machine.dynamic->bytes) std::memset(machine.dynamic->base, 0xff, machine.dynamic->bytes);
  for (auto& [key, region] : machine.statics) std::memset(region->base, 0xff, region->bytes);
  ++machine.epoch;
  for (size_t w = 0; w < machine.warps.size(); ++w) {
    machine.warps[w].clock.assign(machine.warps.size(), 0);
    machine.warps[w].clock[w] = 1;
  }
  reset_hopper();
  std::vector<uint64_t> order(machine.threads);
  std::iota(order.begin(), order.end(), 0);
  for (auto i : order) {
    Fiber& fiber = *machine.fibers[i];
    fiber.state = State::kReady;
    fiber.copies.clear();
    fiber.open_group = 0;
    fiber.waited = false;
  }
  for (;;) {
    if (options().seed != 0) shuffle(order);
    bool moved = false, all_done = true;
    for (auto i : order) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.state == State::kReady) {
        resume(fiber);
        moved = true;
        if (machine.error) std::rethrow_exception(machine.error);
      }
      all_done &= fiber.state == State::kDone;
    }
    if (all_done) return check_hopper_finished();
    moved |= complete_collectives();
    moved |= complete_barrier();
    // Copies and products finish as late as they can, so that those who do not wait for them are seen.
    if (!moved) moved = complete_hopper();
    if (!moved) fail("deadlock: some threads wait at a barrier or collective that others never reach" + waiting());
  }
}

}  // namespace

Options& options() {
  static Options value;
  return value;
}

void fail(const std::string& message) { throw std::runtime_error("emulated kernel: " + message); }

void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail(std::string(what) + " needs an address aligned to " + std::to_string(bytes) + " bytes" + where());
  }
}

void wait_for_previous_kernel() { machine.current->waited = true; }

void check_waited() {
  if (machine.early && machine.current != nullptr && !machine.current->waited) {
    fail("an access to global memory before wait_for_previous_kernel" + where());
  }
}

unsigned lane() { return machine.current->index % kWarp; }

unsigned char* dynamic_shared() { return machine.dynamic->base; }

void* static_shared(const void* key, size_t bytes) {
  auto& region = machine.statics[key];
  if (!region) {
    region = make_region("static", bytes);
    std::memset(region->base, 0xff, bytes);
    machine.static_bytes += (bytes + 15) / 16 * 16;
    check_shared_memory();
  }
  return region->base;
}

void sync_block() {
  machine.current->state = State::kAtBarrier;
  to_scheduler();
}

const Slot* exchange(Collective kind, unsigned mask, const Slot& mine) {
  Fiber& fiber = *machine.current;
  if (!(mask >> lane() & 1)) {
    fail(std::string(name_of(kind)) + " is called by a lane that its mask leaves out" + where());
  }
  fiber.kind = kind;
  fiber.mask = mask;
  fiber.mine = mine;
  fiber.state = State::kAtCollective;
  to_scheduler();
  return machine.warps[fiber.index / kWarp].slots;
}

void cp_async(void* dst, const void* src, int bytes) {
  check_aligned(dst, 16, "cp_async_16's destination");
  check_aligned(src, 16, "cp_async_16's source");
  if (bytes < 0 || bytes > 16) fail("cp_async_16 copies 0 to 16 bytes, not " + std::to_string(bytes) + where());
  check_waited();
  Fiber& fiber = *machine.current;
  // The destination is in use from now until the copy has landed.
  touch(dst, 16, Access::kWrite);
  PendingCopy copy{dst, {}, fiber.open_group};
  std::memcpy(copy.bytes, src, static_cast<size_t>(bytes));
  fiber.copies.push_back(copy);
}

void cp_async_commit() { ++machine.current->open_group; }

void cp_async_wait(int pending) {
  Fiber& fiber = *machine.current;
  auto lands = [&](const PendingCopy& copy) { return copy.group < fiber.open_group - pending; };
  for (const PendingCopy& copy : fiber.copies) {
    if (!lands(copy)) continue;
    touch(copy.dst, 16, Access::kWrite);
    std::memcpy(copy.dst, copy.bytes, 16);
  }
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), lands), fiber.copies.end());
}

void run(const void* kernel, dim3 grid, dim3 block, size_t smem, const std::function<void()>& body, bool early) {
  check_grid(grid, block);
  machine.early = early;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  machine.threads = static_cast<unsigned>(threads);
  machine.body = &body;
  machine.error = nullptr;
  machine.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  while (machine.fibers.size() < machine.threads) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.fibers.back()->index = static_cast<unsigned>(machine.fibers.size() - 1);
  }
  machine.dynamic = make_region("dynamic", smem);
  machine.statics.clear();
  machine.kernel = kernel;
  machine.static_bytes = 0;
  check_shared_memory();
  blockDim = block;
  gridDim = grid;
  machine.random = options().seed;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (options().seed != 0) shuffle(order);
  try {
    for (uint64_t i : order) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
      run_block();
    }
  } catch (...) {
    machine.current = nullptr;
    drop_fibers();
    throw;
  }
}

}  // namespace scan_fast::emu
