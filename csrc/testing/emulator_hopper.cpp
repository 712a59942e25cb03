// Memory barriers, bulk copies and named barriers of the emulated machine, see hopper_emulator.h.
#include "testing/hopper_emulator.h"

#include <deque>
#include <map>

#include "testing/emulator_machine.h"

namespace scan_fast::emu {
namespace {

struct Copy {
  unsigned char* dst;
  const unsigned char* src;
  int bytes;
  Clock clock;
};

struct MBarrierState {
  int arrivals;  // per phase
  int missing;
  int64_t bytes = 0;  // expected and not yet landed
  unsigned phases = 0;
  Clock gathering, complete;
  std::deque<Copy> copies;
};

struct NamedBarrierState {
  int threads = 0, arrived = 0;
  Clock clock;
};

std::map<const void*, MBarrierState> mbarriers;
std::map<int, NamedBarrierState> named_barriers;

MBarrierState& mbarrier_of(const void* barrier, const char* what) {
  const auto found = mbarriers.find(barrier);
  if (found == mbarriers.end()) fail(std::string(what) + " on memory that is no initialised mbarrier" + where());
  return found->second;
}

void complete_phase(const void* barrier, MBarrierState& state) {
  if (state.missing != 0 || state.bytes != 0) return;
  state.missing = state.arrivals;
  ++state.phases;
  join(state.complete, state.gathering);
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    if (fiber.state != State::kAtMBarrier || fiber.mbarrier != barrier || state.phases % 2 == fiber.parity) continue;
    acquire(i, state.complete);
    fiber.state = State::kReady;
  }
}

bool land_copies() {
  bool any = false;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.state != State::kAtMBarrier) continue;
    MBarrierState& state = mbarrier_of(fiber.mbarrier, "a wait");
    if (state.copies.empty()) continue;
    any = true;
    if (options().seed != 0 && next_random(machine.random) % 2 == 0) continue;  // this copy is late
    const Copy copy = std::move(state.copies.front());
    state.copies.pop_front();
    std::memcpy(copy.dst, copy.src, static_cast<size_t>(copy.bytes));
    state.bytes -= copy.bytes;
    join(state.gathering, copy.clock);
    complete_phase(fiber.mbarrier, state);
  }
  return any;
}

}  // namespace

void reset_hopper() {
  mbarriers.clear();
  named_barriers.clear();
  reset_wgmma();
}

bool complete_hopper() { return land_copies() || complete_wgmma(); }

std::string waiting_for(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kAtMBarrier: {
      const MBarrierState& state = mbarriers[fiber.mbarrier];
      return "an mbarrier at byte " + std::to_string(shared_address(fiber.mbarrier) - kSharedBegin) + " for parity " +
             std::to_string(fiber.parity) + "; " + std::to_string(state.phases) + " phases are complete, " +
             std::to_string(state.missing) + " arrivals and " + std::to_string(state.bytes) + " bytes are missing";
    }
    case State::kAtNamedBarrier: {
      const NamedBarrierState& state = named_barriers[fiber.named_barrier];
      return "named barrier " + std::to_string(fiber.named_barrier) + "; " + std::to_string(state.arrived) + " of " +
             std::to_string(state.threads) + " threads have come";
    }
    case State::kAtWgmma: return "its warpgroup at a wait for wgmma";
    default: return "nothing";
  }
}

void check_hopper_finished() {
  for (const auto& [barrier, state] : mbarriers) {
    if (!state.copies.empty()) fail("a kernel ended before its copies had landed" + where());
  }
  for (const auto& [id, state] : named_barriers) {
    if (state.arrived != 0) fail("a kernel ended with arrivals left at a named barrier" + where());
  }
  check_wgmma_finished();
}

uint32_t shared_address(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  if (byte < machine.dynamic->base || byte > machine.dynamic->base + machine.dynamic->bytes) {
    fail("shared_address takes dynamic shared memory" + where());
  }
  return kSharedBegin + static_cast<uint32_t>(byte - machine.dynamic->base);
}

void mbarrier_init(uint64_t* barrier, int arrivals) {
  check_aligned(barrier, 8, "an mbarrier");
  shared_address(barrier);
  touch(barrier, 8, Access::kWrite);
  mbarriers[barrier] = {arrivals, arrivals, 0, 0, {}, {}, {}};
}

void mbarrier_arrive(uint64_t* barrier, int expected_bytes) {
  MBarrierState& state = mbarrier_of(barrier, "an arrival");
  touch(barrier, 8, Access::kRead);  // the initialisation must be visible; arrivals themselves are atomic
  if (state.missing == 0) fail("more arrivals at an mbarrier than it was made for" + where());
  --state.missing;
  state.bytes += expected_bytes;
  release(machine.current->index, state.gathering);
  complete_phase(barrier, state);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  MBarrierState& state = mbarrier_of(barrier, "a wait");
  touch(barrier, 8, Access::kRead);
  Fiber& fiber = *machine.current;
  if (state.phases % 2 != parity) {
    acquire(fiber.index, state.complete);
    return;
  }
  fiber.mbarrier = barrier;
  fiber.parity = parity;
  fiber.state = State::kAtMBarrier;
  to_scheduler();
}

void bulk_copy(void* dst, const void* src, int bytes, uint64_t* barrier) {
  check_aligned(dst, 16, "bulk_copy's destination");
  check_aligned(src, 16, "bulk_copy's source");
  if (bytes <= 0 || bytes % 16 != 0) fail("bulk_copy copies a multiple of 16 bytes, not " + std::to_string(bytes));
  MBarrierState& state = mbarrier_of(barrier, "a copy");
  touch(dst, static_cast<size_t>(bytes), Access::kWrite);
  std::memset(dst, 0xff, static_cast<size_t>(bytes));
  Copy copy{static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), bytes, {}};
  release(machine.current->index, copy.clock);
  state.copies.push_back(std::move(copy));
}

void named_barrier(int id, int threads, bool wait) {
  if (id < 1 || id > 15) fail("named barriers are 1 to 15" + where());
  if (threads % kWarp != 0) fail("a named barrier takes whole warps" + where());
  NamedBarrierState& state = named_barriers[id];
  if (state.arrived == 0) state.threads = threads;
  if (state.threads != threads) fail("a named barrier is used with different thread counts" + where());
  Fiber& fiber = *machine.current;
  release(fiber.index, state.clock);
  ++state.arrived;
  if (wait) {
    fiber.named_barrier = id;
    fiber.state = State::kAtNamedBarrier;
  }
  if (state.arrived == threads) {
    for (unsigned i = 0; i < machine.threads; ++i) {
      Fiber& other = *machine.fibers[i];
      if (other.state != State::kAtNamedBarrier || other.named_barrier != id) continue;
      other.state = State::kReady;
      acquire(i, state.clock);
      // All lanes of a waiting warp are here: the barrier orders them among each other as __syncwarp does.
      if (i % kWarp == 0) ++machine.warps[i / kWarp].epoch;
    }
    state = {};
  }
  if (wait) to_scheduler();
}

}  // namespace scan_fast::emu
