// Host form of device.h, for the tests: CUDA's functions on fibers. device.h lists the errors that it detects.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
#define SCAN_FAST_VECTOR_TYPES(type, name)                         \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SCAN_FAST_VECTOR_TYPES(float, float)
SCAN_FAST_VECTOR_TYPES(int, int)
SCAN_FAST_VECTOR_TYPES(unsigned, uint)
#undef SCAN_FAST_VECTOR_TYPES

// Set by the scheduler whenever a fiber resumes.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace scan_fast::emu {

struct Options {
  bool detect_races = false;  // report unordered accesses to shared memory
  uint64_t seed = 0;          // 0: blocks and threads in natural order, otherwise permuted by this seed
  int multiprocessors = 3;    // odd and small, so that row loops run several times
  int compute_capability = 90;
  size_t shared_memory = 0;  // limit of a block, static and dynamic; 0: the limit of the compute capability
  int device = 0;            // current device; kernels request shared memory on each
  bool truncate = false;     // matrix units truncate their sums, as coarsely as any GPU does, instead of rounding
  int resident_blocks = 2;   // of any kernel on a multiprocessor
};
Options& options();

// Runs `body`, a call of the kernel, once per thread of the grid. Throws std::runtime_error if a check fails.
// With `early`, as after launch_after, every thread must wait for the kernel before.
void run(const void* kernel, dim3 grid, dim3 block, size_t smem, const std::function<void()>& body, bool early = false);
void wait_for_previous_kernel();
// Fails if the running thread must wait for the kernel before and has not.
void check_waited();

// emulator_launch.cpp: limit of a block, and the dynamic part that a kernel is allowed on the current device.
size_t shared_memory_limit();
void set_dynamic_shared(const void* kernel, size_t bytes);

[[noreturn]] void fail(const std::string& message);

enum class Access { kRead, kWrite, kAtomic };
// Reports an access by the running thread to the race detector. Outside of shared memory only atomics are allowed.
void touch(const void* pointer, size_t bytes, Access access);
void check_aligned(const void* pointer, size_t bytes, const char* what);

unsigned char* dynamic_shared();
void* static_shared(const void* key, size_t bytes);
void sync_block();

// Input and output of a lane at a warp collective.
struct Slot {
  alignas(16) unsigned char bytes[48];
};
enum class Collective : int { kSync, kShuffle, kBallot, kLdmatrix, kLdmatrixTrans, kMmaHalf, kMmaBf16 };
// Waits for all lanes of the mask at the same collective, then returns the 32 slots with the inputs of the lanes; for
// ldmatrix and mma with the outputs. They are valid until this lane's next collective.
const Slot* exchange(Collective kind, unsigned mask, const Slot& mine);
unsigned lane();

void cp_async(void* dst, const void* src, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  if (!(mask >> source & 1)) fail("a shuffle reads lane " + std::to_string(source) + ", which its mask leaves out");
  Slot slot{};
  std::memcpy(slot.bytes, &value, sizeof(T));
  const Slot* all = exchange(Collective::kShuffle, mask, slot);
  std::memcpy(&value, all[source].bytes, sizeof(T));
  return value;
}

}  // namespace scan_fast::emu

// ---- CUDA's intrinsics -------------------------------------------------------------------------------------------

inline void __syncthreads() { scan_fast::emu::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  scan_fast::emu::exchange(scan_fast::emu::Collective::kSync, mask, {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = static_cast<int>(scan_fast::emu::lane()), source = lane ^ lane_mask;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return scan_fast::emu::shuffle(mask, value, inside ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(scan_fast::emu::lane());
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return scan_fast::emu::shuffle(mask, value, inside ? lane + static_cast<int>(delta) : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(scan_fast::emu::lane());
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return scan_fast::emu::shuffle(mask, value, inside ? lane - static_cast<int>(delta) : lane);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(scan_fast::emu::lane());
  return scan_fast::emu::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  scan_fast::emu::Slot slot{};
  slot.bytes[0] = predicate != 0;
  const scan_fast::emu::Slot* all = scan_fast::emu::exchange(scan_fast::emu::Collective::kBallot, mask, slot);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) result |= static_cast<unsigned>(all[lane].bytes[0]) << lane;
  }
  return result;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  scan_fast::emu::Slot slot{};
  std::memcpy(slot.bytes, &value, sizeof(value));
  const scan_fast::emu::Slot* all = scan_fast::emu::exchange(scan_fast::emu::Collective::kShuffle, mask, slot);
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(&value, all[lane].bytes, sizeof(value));
    if (mask >> lane & 1) sum += value;
  }
  return sum;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

namespace scan_fast::emu {
template <typename T, typename Update>
T atomic(T* p, Update update) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "atomics on floats would not be deterministic");
  check_waited();
  check_aligned(p, sizeof(T), "an atomic");
  touch(p, sizeof(T), Access::kAtomic);
  const T old = *p;
  *p = update(old);
  return old;
}
}  // namespace scan_fast::emu

#define SCAN_FAST_ATOMICS(T)                                                                            \
  inline T atomicAdd(T* p, T v) {                                                                       \
    return scan_fast::emu::atomic(p, [=](T old) {                                                       \
      return static_cast<T>(static_cast<unsigned long long>(old) + static_cast<unsigned long long>(v)); \
    });                                                                                                 \
  }                                                                                                     \
  inline T atomicMax(T* p, T v) {                                                                       \
    return scan_fast::emu::atomic(p, [=](T old) { return old < v ? v : old; });                         \
  }                                                                                                     \
  inline T atomicMin(T* p, T v) {                                                                       \
    return scan_fast::emu::atomic(p, [=](T old) { return v < old ? v : old; });                         \
  }                                                                                                     \
  inline T atomicOr(T* p, T v) {                                                                        \
    return scan_fast::emu::atomic(p, [=](T old) { return old | v; });                                   \
  }                                                                                                     \
  inline T atomicExch(T* p, T v) {                                                                      \
    return scan_fast::emu::atomic(p, [=](T) { return v; });                                             \
  }                                                                                                     \
  inline T atomicCAS(T* p, T expected, T v) {                                                           \
    return scan_fast::emu::atomic(p, [=](T old) { return old == expected ? v : old; });                 \
  }
SCAN_FAST_ATOMICS(int)
SCAN_FAST_ATOMICS(unsigned)
SCAN_FAST_ATOMICS(unsigned long long)
#undef SCAN_FAST_ATOMICS

template <typename T>
T __ldg(const T* p) {
  scan_fast::emu::check_waited();
  scan_fast::emu::check_aligned(p, alignof(T), "a load");
  return *p;
}
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;

namespace scan_fast {

// ---- 16-bit floats -----------------------------------------------------------------------------------------------

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(half_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -magnitude : magnitude;
}
template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16_t>) {
    const uint32_t u = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
  } else {
    static_assert(std::is_same_v<T, half_t>);
    const uint32_t u = __float_as_uint(x);
    const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
    const float magnitude = std::fabs(x);
    if (x != x) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
    int exponent = 0;
    std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent-1), 2^exponent)
    exponent = magnitude == 0 ? -14 : std::max(exponent - 1, -14);
    // In units of the last place; nearbyint rounds to even, and a carry moves into the exponent by itself.
    const uint32_t units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units))};
  }
}
template <typename T>
uint32_t pack2(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}
template <typename T>
float2 unpack2(uint32_t bits) {
  return {to_float(T{static_cast<uint16_t>(bits)}), to_float(T{static_cast<uint16_t>(bits >> 16)})};
}

// ---- math units: subnormal inputs and results are flushed to zero ------------------------------------------------

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float log2_approx(float x) { return std::log2(flush(x)); }
inline float max_nan(float x, float y) { return x != x ? x : y != y || y > x ? y : x; }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(flush(x)); }
inline float rcp_approx(float x) { return flush(1.0f / flush(x)); }

// ---- shared memory -----------------------------------------------------------------------------------------------

template <typename T>
class SharedReference {
 public:
  explicit SharedReference(T* pointer) : pointer_(pointer) {}
  operator T() const {
    emu::touch(pointer_, sizeof(T), emu::Access::kRead);
    return *pointer_;
  }
  const SharedReference& operator=(const T& value) const {
    emu::touch(pointer_, sizeof(T), emu::Access::kWrite);
    *pointer_ = value;
    return *this;
  }
  const SharedReference& operator=(const SharedReference& other) const { return *this = static_cast<T>(other); }
  const SharedReference& operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }
  const SharedReference& operator-=(const T& value) const { return *this = static_cast<T>(*this) - value; }
  const SharedReference& operator*=(const T& value) const { return *this = static_cast<T>(*this) * value; }

 private:
  T* pointer_;
};

template <typename T>
struct Shared {
  T* pointer;
  template <typename Index>
  SharedReference<T> operator[](Index i) const {
    return SharedReference<T>(pointer + i);
  }
  Shared operator+(int64_t i) const { return {pointer + i}; }
  template <typename U>
  Shared<U> as() const {
    emu::check_aligned(pointer, alignof(U), "Shared::as");
    return {reinterpret_cast<U*>(pointer)};
  }
  T* get() const { return pointer; }
};

#define SCAN_FAST_SHARED(T, name, count)                                               \
  static char name##_key = 0;                                                          \
  const ::scan_fast::Shared<T> name {                                                  \
    static_cast<T*>(::scan_fast::emu::static_shared(&name##_key, sizeof(T) * (count))) \
  }
#define SCAN_FAST_DYNAMIC_SHARED(name) \
  const ::scan_fast::Shared<unsigned char> name { ::scan_fast::emu::dynamic_shared() }

template <typename V, typename T>
V ld_shared(const T* p) {
  emu::check_aligned(p, sizeof(V), "ld_shared");
  emu::touch(p, sizeof(V), emu::Access::kRead);
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
}
template <typename T, typename V>
void st_shared(T* p, const V& value) {
  emu::check_aligned(p, sizeof(V), "st_shared");
  emu::touch(p, sizeof(V), emu::Access::kWrite);
  std::memcpy(static_cast<void*>(p), &value, sizeof(V));
}
template <typename V, typename T>
V ld_global(const T* p) {
  emu::check_waited();
  emu::check_aligned(p, sizeof(V), "ld_global");
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
}
template <typename V, typename T>
V ld_coherent(const T* p) {
  return ld_global<V>(p);
}
template <typename T, typename V>
void st_global(T* p, const V& value) {
  emu::check_waited();
  emu::check_aligned(p, sizeof(V), "st_global");
  std::memcpy(static_cast<void*>(p), &value, sizeof(V));
}

inline void wait_for_previous_kernel() { emu::wait_for_previous_kernel(); }
inline void let_next_kernel_start() {}

inline void cp_async_16(void* dst, const void* src, int bytes = 16) { emu::cp_async(dst, src, bytes); }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emu::cp_async_wait(kPending);
}

// ---- matrix units ------------------------------------------------------------------------------------------------

inline void ldmatrix(uint32_t (&r)[4], const void* p, emu::Collective kind) {
  emu::check_aligned(p, 16, "ldmatrix");
  emu::touch(p, 16, emu::Access::kRead);
  emu::Slot slot{};
  std::memcpy(slot.bytes, &p, sizeof(p));
  std::memcpy(r, emu::exchange(kind, 0xffffffffu, slot)[emu::lane()].bytes, 16);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* p) { ldmatrix(r, p, emu::Collective::kLdmatrix); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) { ldmatrix(r, p, emu::Collective::kLdmatrixTrans); }

template <typename T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bf16_t>, "mma_16816 takes half_t or bf16_t");
  constexpr auto kind = std::is_same_v<T, half_t> ? emu::Collective::kMmaHalf : emu::Collective::kMmaBf16;
  emu::Slot slot{};
  std::memcpy(slot.bytes, a, 16);
  std::memcpy(slot.bytes + 16, b, 8);
  std::memcpy(slot.bytes + 24, d, 16);
  std::memcpy(d, emu::exchange(kind, 0xffffffffu, slot)[emu::lane()].bytes, 16);
}

// ---- launches ----------------------------------------------------------------------------------------------------

inline int current_device() { return emu::options().device; }
inline void set_dynamic_shared(const void* kernel, size_t bytes) { emu::set_dynamic_shared(kernel, bytes); }
template <typename... Parameters, typename... Arguments>
void start_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, StreamHandle,
                  Arguments&&... arguments) {
  emu::run(reinterpret_cast<const void*>(kernel), grid, block, smem,
           [&] { kernel(static_cast<Parameters>(arguments)...); });
}
template <typename... Parameters, typename... Arguments>
void start_kernel_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, StreamHandle,
                        Arguments&&... arguments) {
  emu::run(
      reinterpret_cast<const void*>(kernel), grid, block, smem, [&] { kernel(static_cast<Parameters>(arguments)...); },
      true);
}
inline bool can_wait(const void*) { return emu::options().compute_capability >= 90; }
inline int query_resident_blocks(const void*, int, size_t) { return emu::options().resident_blocks; }
inline void zero_async(void* pointer, size_t bytes, StreamHandle) { std::memset(pointer, 0, bytes); }
inline int multiprocessors() { return emu::options().multiprocessors; }
inline int compute_capability() { return emu::options().compute_capability; }
inline size_t shared_memory_limit() { return emu::shared_memory_limit(); }

}  // namespace scan_fast
