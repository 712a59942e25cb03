// Memory barriers, bulk copies, named barriers and warpgroup products of the emulated machine: see hopper_emulator.h.
#include "testing/hopper_emulator.h"

#include <deque>
#include <map>

#include "testing/emulator_machine.h"

namespace scan_fast::emu {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kM = 64, kK = 16;
// Shared memory's own address is a multiple of 128 that is none of 1024, as it may be on the GPU.
constexpr uint32_t kSharedBegin = 384;

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

struct IssuedProduct {
  Product product;
  int group;
  std::vector<float> a, b;  // 64 x 16 and 16 x N as they were when the product was issued; no a where in registers
  std::vector<const uint32_t*> a_registers;
  std::vector<float*> d;  // per thread; null until the thread has issued it
};

struct Warpgroup {
  std::deque<IssuedProduct> products;  // not yet run
  size_t run = 0;                      // run before the first of these
};

std::map<const void*, MBarrierState> mbarriers;
std::map<int, NamedBarrierState> named_barriers;
std::vector<Warpgroup> warpgroups;

float poison() { return __uint_as_float(0xffffffffu); }
bool is_poison(float x) { return __float_as_uint(x) == 0xffffffffu; }

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

// Where a warpgroup's matrices lie, by the descriptor's bits. The 8 values from element (i, k) of A or (k, i) of B on:
// along k, or for mn_major along i.
const unsigned char* operand_at(uint64_t descriptor, bool mn_major, int i, int k) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto unsigned_i = static_cast<uint32_t>(i), unsigned_k = static_cast<uint32_t>(k);
  uint32_t address = mn_major ? start + unsigned_i % 64 * 2 + unsigned_i / 64 * leading + unsigned_k % 8 * 128 +
                                    unsigned_k / 8 * stride
                              : start + unsigned_k * 2 + unsigned_i % 8 * 128 + unsigned_i / 8 * stride;
  address ^= (address >> 7 & 7) << 4;
  if (address < kSharedBegin || address + 16 > kSharedBegin + machine.dynamic->bytes) {
    fail("wgmma reads outside of dynamic shared memory" + where());
  }
  return machine.dynamic->base + (address - kSharedBegin);
}

void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 62 != 1) fail("a wgmma descriptor does not ask for the 128-byte swizzle" + where());
}

// Row-major (rows x columns) values; A as (64 x 16), B as (16 x n).
std::vector<float> read_operand(const Product& product, bool is_a) {
  const uint64_t descriptor = is_a ? product.a : product.b;
  const int extent = is_a ? kM : product.n;
  std::vector<float> values(static_cast<size_t>(extent) * kK);
  // The swizzle moves pieces of 16 bytes: 8 values of one row, or where rows are dimensions, of one k.
  const bool mn_major = !is_a && product.mn_major;
  for (int i = 0; i < extent; i += mn_major ? 8 : 1) {
    for (int k = 0; k < kK; k += mn_major ? 1 : 8) {
      uint16_t bits[8];
      std::memcpy(bits, operand_at(descriptor, mn_major, i, k), sizeof(bits));
      for (int e = 0; e < 8; ++e) {
        const int row = mn_major ? i + e : i, column = mn_major ? k : k + e;
        values[static_cast<size_t>(is_a ? row * kK + column : column * extent + row)] =
            product.half ? to_float(half_t{bits[e]}) : to_float(bf16_t{bits[e]});
      }
    }
  }
  return values;
}

bool same_bits(const std::vector<float>& x, const std::vector<float>& y) {
  return std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

// Each warp reads its 16 rows of A and all of B; 16-byte pieces hold 8 values along the contiguous direction.
void touch_operands(const Product& product, unsigned thread) {
  if (!options().detect_races) return;
  const int warp = static_cast<int>(thread) % kGroup / kWarp;
  if (!product.a_in_registers) {
    for (int i = 16 * warp; i < 16 * warp + 16; ++i) {
      for (int k = 0; k < kK; k += 8) touch_as(thread, operand_at(product.a, false, i, k), 16, Access::kRead);
    }
  }
  for (int i = 0; i < product.n; i += product.mn_major ? 8 : 1) {
    for (int k = 0; k < kK; k += product.mn_major ? 1 : 8) {
      touch_as(thread, operand_at(product.b, product.mn_major, i, k), 16, Access::kRead);
    }
  }
}

HeldResult& held_by(Fiber& fiber, const float* d) {
  for (HeldResult& held : fiber.held) {
    if (held.registers == d) return held;
  }
  fail("a product of wgmma lost its result registers" + where());
}

// sums (64 x n) += a (64 x 16) b (16 x n). Most of a test's time, and in bounds: optimised, and not instrumented.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("O3")))
#endif
__attribute__((no_sanitize("address", "undefined"))) void
add_products(const float* a, const float* b, float* __restrict__ sums, int n) {
  for (int i = 0; i < kM; ++i) {
    for (int k = 0; k < kK; ++k) {
      const float factor = a[i * kK + k];
      for (int j = 0; j < n; ++j) sums[i * n + j] += factor * b[k * n + j];
    }
  }
}

void run_product(unsigned first_thread, const IssuedProduct& issued) {
  const Product& product = issued.product;
  const int n = product.n;
  std::vector<float> a = issued.a;
  if (product.a_in_registers) {
    a.resize(kM * kK);
    for (int t = 0; t < kGroup; ++t) {
      for (int r = 0; r < 4; ++r) {
        const int row = t / 32 * 16 + t % 32 / 4 + 8 * (r % 2), k = 2 * (t % 4) + 8 * (r / 2);
        const uint32_t bits = issued.a_registers[t][r];
        const float2 pair = product.half ? unpack2<half_t>(bits) : unpack2<bf16_t>(bits);
        a[row * kK + k] = pair.x;
        a[row * kK + k + 1] = pair.y;
      }
    }
  } else if (!same_bits(a, read_operand(product, true))) {
    fail("the A operand of a wgmma changed before its wait" + where());
  }
  if (!same_bits(issued.b, read_operand(product, false))) {
    fail("the B operand of a wgmma changed before its wait" + where());
  }
  std::vector<float> sums(static_cast<size_t>(kM) * n, 0.0f);
  add_products(a.data(), issued.b.data(), sums.data(), n);
  for (int t = 0; t < kGroup; ++t) {
    Fiber& fiber = *machine.fibers[first_thread + t];
    HeldResult& held = held_by(fiber, issued.d[t]);
    for (int r = 0; r < n / 2; ++r) {
      const int i = t / 32 * 16 + t % 32 / 4 + r / 2 % 2 * 8, j = r / 4 * 8 + t % 4 * 2 + r % 2;
      const float before = product.accumulate ? held.values[r] : 0.0f;
      if (!options().truncate) {
        held.values[r] = before + sums[static_cast<size_t>(i) * n + j];
        continue;
      }
      float addends[kK + 1];
      for (int k = 0; k < kK; ++k) addends[k] = a[i * kK + k] * issued.b[static_cast<size_t>(k) * n + j];
      addends[kK] = before;
      held.values[r] = truncated_sum(addends);
    }
    if (t % kWarp == 0) touch_operands(product, first_thread + t);
    if (--held.pending > 0) continue;
    for (int r = 0; r < n / 2; ++r) {
      if (!is_poison(held.registers[r])) fail("registers that a wgmma holds were written before its wait" + where());
      held.registers[r] = held.values[r];
    }
    fiber.held.erase(fiber.held.begin() + (&held - fiber.held.data()));
    fiber.fenced = false;  // the results may be read and written from here on
  }
}

bool complete_wgmma() {
  bool any = false;
  for (unsigned g = 0; g < warpgroups.size(); ++g) {
    const unsigned first = g * kGroup;
    if (first + kGroup > machine.threads) continue;
    bool all = true;
    for (unsigned t = first; t < first + kGroup; ++t) all &= machine.fibers[t]->state == State::kAtWgmma;
    if (!all) continue;
    Fiber& leader = *machine.fibers[first];
    Warpgroup& group = warpgroups[g];
    for (unsigned t = first; t < first + kGroup; ++t) {
      const Fiber& fiber = *machine.fibers[t];
      if (fiber.wgmma_pending != leader.wgmma_pending || fiber.wgmma_group != leader.wgmma_group ||
          fiber.products != leader.products) {
        fail("the threads of a warpgroup issued different products or wait for different groups" + where());
      }
    }
    while (!group.products.empty() && group.products.front().group < leader.wgmma_group - leader.wgmma_pending) {
      run_product(first, group.products.front());
      group.products.pop_front();
      ++group.run;
    }
    for (unsigned t = first; t < first + kGroup; ++t) machine.fibers[t]->state = State::kReady;
    any = true;
  }
  return any;
}

bool land_copies() {
  bool any = false;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.state != State::kAtMBarrier) continue;
    MBarrierState& state = mbarrier_of(fiber.mbarrier, "a wait");
    if (state.copies.empty()) continue;
    any = true;
    if (options().seed != 0 && next_random(machine.random) % 2 == 0) continue;  // a late one
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
  warpgroups.assign((machine.threads + kGroup - 1) / kGroup, Warpgroup{});
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.products = 0;
    fiber.wgmma_group = 0;
    fiber.fenced = false;
    fiber.held.clear();
  }
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
  for (const Warpgroup& group : warpgroups) {
    if (!group.products.empty()) fail("a kernel ended before its products were waited for" + where());
  }
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

void wgmma_fence() { machine.current->fenced = true; }
void wgmma_commit() { ++machine.current->wgmma_group; }

void wgmma_wait(int pending) {
  Fiber& fiber = *machine.current;
  fiber.wgmma_pending = pending;
  fiber.state = State::kAtWgmma;
  to_scheduler();
}

void check_not_held(const void* registers) {
  for (const HeldResult& held : machine.current->held) {
    if (held.registers == registers) fail("a wait leaves in flight the results it names" + where());
  }
}

void wgmma(const Product& product, float* d, const uint32_t* a_registers) {
  Fiber& fiber = *machine.current;
  const unsigned g = fiber.index / kGroup, member = fiber.index % kGroup;
  if (g * kGroup + kGroup > machine.threads) fail("wgmma needs a whole warpgroup" + where());
  if (!fiber.fenced) fail("wgmma needs a wgmma_fence after results were waited for" + where());
  Warpgroup& group = warpgroups[g];
  const size_t at = fiber.products++ - group.run;
  if (at == group.products.size()) {
    IssuedProduct issued{product, fiber.wgmma_group, {}, {}, {}, {}};
    if (!product.a_in_registers) {
      check_descriptor(product.a);
      issued.a = read_operand(product, true);
    }
    check_descriptor(product.b);
    issued.b = read_operand(product, false);
    issued.a_registers.resize(kGroup);
    issued.d.resize(kGroup);
    group.products.push_back(std::move(issued));
  }
  IssuedProduct& issued = group.products[at];
  if (!(issued.product == product) || issued.group != fiber.wgmma_group) {
    fail("the threads of a warpgroup issued different products" + where());
  }
  issued.d[member] = d;
  issued.a_registers[member] = a_registers;
  if (member % kWarp == 0) touch_operands(product, fiber.index);
  for (HeldResult& held : fiber.held) {
    if (held.registers != d) continue;
    ++held.pending;
    return;
  }
  fiber.held.push_back({d, std::vector<float>(d, d + product.n / 2), 1});
  std::fill_n(d, product.n / 2, poison());
}

}  // namespace scan_fast::emu
