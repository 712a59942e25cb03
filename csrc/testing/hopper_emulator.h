// Host form of hopper.cuh, for the tests. Beyond the checks of device.h:
//   - Copies land only at a wait for their barrier. Until then their destination holds NaN.
//   - Results of wgmma hold NaN until the wait that completes their group, and must not be written before.
//   - The operands of a group must be the same when it is issued and when it completes.
//   - There must be a fence between a wait that gave results and the next wgmma.
//   - The four warps of a warpgroup must issue the same products.
//   - Operands are read at the addresses that the bits of the descriptors give.
//   - No copy or product may be in flight when the kernel ends.
// Memory and named barriers order accesses to shared memory for the race detector. Register budgets (setmaxnreg) have
// no effect here.
#pragma once

#include "testing/emulator.h"

namespace scan_fast {

namespace emu {

uint32_t shared_address(const void* p);
void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier, int expected_bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void bulk_copy(void* dst, const void* src, int bytes, uint64_t* barrier);
void named_barrier(int id, int threads, bool wait);

struct Product {
  bool half;  // half_t, else bf16_t
  int n;
  bool a_in_registers, mn_major, accumulate;
  uint64_t a, b;  // descriptors
  bool operator==(const Product&) const = default;
};
void wgmma(const Product& product, float* d, const uint32_t* a_registers);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void check_not_held(const void* registers);

}  // namespace emu

inline uint32_t shared_address(const void* p) { return emu::shared_address(p); }
inline void mbarrier_init(uint64_t* barrier, int arrivals) { emu::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_expect(uint64_t* barrier, int bytes) { emu::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, unsigned parity) { emu::mbarrier_wait(barrier, parity); }
inline void bulk_copy(void* dst, const void* src, int bytes, uint64_t* barrier) {
  emu::bulk_copy(dst, src, bytes, barrier);
}
inline void named_barrier_sync(int id, int threads) { emu::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emu::named_barrier(id, threads, false); }
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}
inline void async_proxy_fence() {}
// Elects another lane with each seed, because the choice must not matter. All lanes must take part.
inline bool elect_one() {
  __ballot_sync(0xffffffffu, 1);
  return emu::lane() == static_cast<unsigned>(emu::options().seed * 7 % 32);
}

template <typename... Registers>
void wgmma_fence(Registers&...) {
  emu::wgmma_fence();
}
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int kPending, typename... Registers>
void wgmma_wait(Registers&... registers) {
  emu::wgmma_wait(kPending);
  (emu::check_not_held(&registers), ...);
}
template <typename T, int kN>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  emu::wgmma({std::is_same_v<T, half_t>, kN, false, false, accumulate, a, b}, d, nullptr);
}
template <typename T, int kN, bool kMnMajor>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emu::wgmma({std::is_same_v<T, half_t>, kN, true, kMnMajor, accumulate, 0, b}, d, a);
}

}  // namespace scan_fast
