// Warpgroup products of the emulated machine, see hopper_emulator.h.
#include <algorithm>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "testing/emulator_machine.h"
#include "testing/hopper_emulator.h"

namespace scan_fast::emu {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kM = 64, kK = 16;

struct IssuedProduct {
  Product product;
  int group;
  std::vector<float> a, b;  // 64 x 16 and 16 x N when the product was issued; a is empty if it is in registers
  std::vector<const uint32_t*> a_registers;
  std::vector<float*> d;  // per thread; null until the thread has issued it
};

struct Warpgroup {
  std::deque<IssuedProduct> products;  // not yet run
  size_t run = 0;                      // run before the first of these
};

std::vector<Warpgroup> warpgroups;

float poison() { return __uint_as_float(0xffffffffu); }
bool is_poison(float x) { return __float_as_uint(x) == 0xffffffffu; }

// Returns the address that a descriptor gives to the 8 values from element (i, k) of A or (k, i) of B on: along k, or
// for mn_major along i.
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
  // The swizzle moves vectors of 16 bytes: 8 values of one row, or with mn_major of one k.
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

// Each warp reads its 16 rows of A and all of B, in vectors of 8 values along the contiguous direction.
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

// sums (64 x n) += a (64 x 16) b (16 x n). It takes most of the time of a test and stays in bounds, so it is optimised
// and not instrumented.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("O3")))
#endif
__attribute__((no_sanitize("address", "undefined"))) void add_products(const float* a, const float* b,
                                                                       float* __restrict__ sums, int n) {
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

}  // namespace

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

void reset_wgmma() {
  warpgroups.assign((machine.threads + kGroup - 1) / kGroup, Warpgroup{});
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.products = 0;
    fiber.wgmma_group = 0;
    fiber.fenced = false;
    fiber.held.clear();
  }
}

void check_wgmma_finished() {
  for (const Warpgroup& group : warpgroups) {
    if (!group.products.empty()) fail("a kernel ended before its products were waited for" + where());
  }
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
