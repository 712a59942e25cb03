// Vectors of floats for sources that are compiled once per instruction set. The width depends on the set. Arithmetic
// uses the vector extensions of GCC and Clang; intrinsics serve for what these cannot express (partial and 16-bit loads
// and stores).
//
// load<T>(p) and store<T>(p, v) move kLanes elements of float, Bf16 or Fp16 to and from float lanes; load_partial and
// store_partial the first n < kLanes of them, touching no other memory. exp and log are accurate to about 2 units in
// the last place and keep NaN; exp returns exactly 0 below -87.3 and expects no argument above 88.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SCAN_FAST_ISA_avx512) || defined(SCAN_FAST_ISA_avx2)
#include "common/intrinsics.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#define SCAN_FAST_NEON 1  // the baseline of this architecture
#endif

// Before a loop: its iterations do not depend on each other through memory, so that it may be vectorised.
#if defined(__clang__)
#define SCAN_FAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define SCAN_FAST_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace scan_fast::SCAN_FAST_ISA {
namespace {

#if defined(SCAN_FAST_ISA_avx512)
constexpr int kLanes = 16;
#elif defined(SCAN_FAST_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UnsignedVec __attribute__((vector_size(kLanes * 4)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }
// Returns the second operand if either is NaN.
inline Vec larger(Vec x, Vec y) {
#if defined(SCAN_FAST_ISA_avx512)
  return _mm512_max_ps(x, y);
#elif defined(SCAN_FAST_ISA_avx2)
  return _mm256_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

inline float reduce_add(Vec v) {
#if defined(SCAN_FAST_ISA_avx512)
  return _mm512_reduce_add_ps(v);
#elif defined(SCAN_FAST_NEON)
  return vaddvq_f32(v);
#else
  float sum[kLanes];
  std::memcpy(sum, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
#endif
}
inline float reduce_max(Vec v) {
#if defined(SCAN_FAST_ISA_avx512)
  return _mm512_reduce_max_ps(v);
#elif defined(SCAN_FAST_NEON)
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
  return larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2))[0];
#else
  float best[kLanes];
  std::memcpy(best, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) best[i] = best[i] > best[i + width] ? best[i] : best[i + width];
  }
  return best[0];
#endif
}

inline bool any(IntVec mask) {
#if defined(SCAN_FAST_ISA_avx512)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(SCAN_FAST_ISA_avx2)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#elif defined(SCAN_FAST_NEON)
  return vmaxvq_u32(reinterpret_cast<uint32x4_t>(mask)) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// Converts a mask to bits, lane 0 the lowest, and back. Bits past the last lane are ignored.
inline uint32_t lane_bits(IntVec mask) {
#if defined(SCAN_FAST_ISA_avx512)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(SCAN_FAST_ISA_avx2)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(SCAN_FAST_NEON)
  return vaddvq_u32(reinterpret_cast<uint32x4_t>(mask & IntVec{1, 2, 4, 8}));
#else
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
#endif
}
inline IntVec lanes_of_bits(uint32_t bits) {
#if defined(SCAN_FAST_ISA_avx512)
  return reinterpret_cast<IntVec>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
#else
  IntVec one;
  for (int i = 0; i < kLanes; ++i) one[i] = 1 << i;
  return ((IntVec{} + static_cast<int32_t>(bits)) & one) != 0;
#endif
}

// A mask of the first n lanes.
inline IntVec first_lanes(int n) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}

// A sum of floats, or of products of floats, in double, lane by lane.
class DoubleSum {
 public:
  void add(Vec v) {
    const Halves half(v);
    low_ += half.low;
    high_ += half.high;
  }
  void add_product(Vec x, Vec y) {
    const Halves a(x), b(y);
    low_ += a.low * b.low;
    high_ += a.high * b.high;
  }
  double total() const {
    double sum = 0;
    for (int i = 0; i < kLanes / 2; ++i) sum += low_[i] + high_[i];
    return sum;
  }

 private:
  typedef float HalfFloats __attribute__((vector_size(kLanes * 2)));
  typedef double HalfDoubles __attribute__((vector_size(kLanes * 4)));
  struct Halves {
    HalfDoubles low, high;
    explicit Halves(const Vec& v) {
      HalfFloats half[2];
      std::memcpy(half, &v, sizeof(v));
      low = __builtin_convertvector(half[0], HalfDoubles);
      high = __builtin_convertvector(half[1], HalfDoubles);
    }
  };
  HalfDoubles low_{}, high_{};
};

// ---- conversions -------------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 1023u) << 13);
  // The exponent is corrected by an exact product, which also normalises subnormal numbers.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}
template <typename T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline Bf16 narrow<Bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Fp16 narrow<Fp16>(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return {0x7e00};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 aligns the last place with 2^-24 and rounds to even.
    const uint32_t units = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | units)};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}

// ---- loads and stores --------------------------------------------------------------------------------------------

template <typename T>
inline Vec load(const T* p) {
  if constexpr (sizeof(T) == 4) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  } else {
#if defined(SCAN_FAST_ISA_avx512)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (__is_same(T, Fp16)) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(SCAN_FAST_ISA_avx2)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(T, Fp16)) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#elif defined(SCAN_FAST_NEON)
    const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    if constexpr (__is_same(T, Fp16)) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
    return v;
#endif
  }
}

template <typename T>
inline Vec load_partial(const T* p, int n, float fill) {
#if defined(SCAN_FAST_ISA_avx512)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, p);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    if constexpr (__is_same(T, Fp16)) return _mm512_mask_cvtph_ps(_mm512_set1_ps(fill), mask, half);
    return _mm512_mask_blend_ps(mask, _mm512_set1_ps(fill),
                                _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
  }
#else
#if defined(SCAN_FAST_ISA_avx2)
  if constexpr (sizeof(T) == 4) {
    const IntVec used = first_lanes(n);
    const Vec v = _mm256_maskload_ps(p, reinterpret_cast<__m256i>(used));
    return used ? v : splat(fill);
  }
#endif
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? widen(p[i]) : fill;
  Vec v;
  std::memcpy(&v, lanes, sizeof(v));
  return v;
#endif
}

template <typename T>
inline void store(T* p, Vec v) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (__is_same(T, Bf16)) {
    // Round to nearest even by integer arithmetic.
    IntVec bits;
    std::memcpy(&bits, &v, sizeof(v));
    const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const IntVec result = v != v ? IntVec{} + 0x7fc0 : rounded;
    typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
    const HalfVec half = __builtin_convertvector(result, HalfVec);
    std::memcpy(static_cast<void*>(p), &half, sizeof(half));
  } else {
#if defined(SCAN_FAST_ISA_avx512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(SCAN_FAST_ISA_avx2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(SCAN_FAST_NEON)
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = narrow<T>(v[i]);
#endif
  }
}

template <typename T>
inline void store_partial(T* p, Vec v, int n) {
#if defined(SCAN_FAST_ISA_avx512)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
    return;
  }
#elif defined(SCAN_FAST_ISA_avx2)
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first_lanes(n)), v);
    return;
  }
#endif
  T lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// The first `lanes` <= kLanes elements.
template <typename T>
inline Vec load_lanes(const T* p, int lanes, float fill) {
  return lanes == kLanes ? load(p) : load_partial(p, lanes, fill);
}
template <typename T>
inline void store_lanes(T* p, Vec v, int lanes) {
  if (lanes == kLanes) {
    store(p, v);
  } else {
    store_partial(p, v, lanes);
  }
}

// ---- functions ---------------------------------------------------------------------------------------------------

// exp(f) for |f| <= log(2) / 2: the minimax polynomial of degree 6 with value 1 at 0 (error 2e-9 before rounding).
inline Vec exp_of_remainder(Vec f) {
  Vec p = f * 1.384365355e-3f + 8.374155306e-3f;
  p = p * f + 4.166800203e-2f;
  p = p * f + 1.666643126e-1f;
  p = p * f + 4.999999421e-1f;
  p = p * f + 1.0f;
  return p * f + 1.0f;
}

inline Vec exp(Vec x) {
#if defined(SCAN_FAST_ISA_avx512)
  // The same as below; the mask keeps NaN and gives 0 below the range, and scalef applies the exponent.
  const __mmask16 used = _mm512_cmp_ps_mask(x, splat(-87.3f), _CMP_NLT_UQ);
  const Vec magic = splat(12582912.0f);
  const Vec n = (x * 1.44269504f + magic) - magic;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return _mm512_maskz_scalef_ps(used, exp_of_remainder(f), n);
#else
  // x = n log(2) + f with |f| <= log(2) / 2. The constant 1.5 * 2^23 + 127 rounds to an integer n, with n + 127 in the
  // low bits; a shift makes them the exponent of 2^n. Below the range everything but the comparison may be garbage.
  const Vec magic = splat(12583039.0f);
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<UnsignedVec>(shifted) << 23);
  return x < splat(-87.3f) ? Vec{} : exp_of_remainder(f) * power;
#endif
}

inline Vec log(Vec x) {
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)). Unsigned, because the bits of a negative number may wrap around.
  UnsignedVec bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const IntVec offset = reinterpret_cast<IntVec>(bits - 0x3f3504f3u);
  const Vec e = __builtin_convertvector(offset >> 23, Vec);
  const IntVec mantissa = (offset & 0x7fffff) + 0x3f3504f3;
  Vec f;
  std::memcpy(&f, &mantissa, sizeof(f));
  f -= 1.0f;
  Vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;  // Cephes logf
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec square = f * f;
  Vec result = f + (p * f * square - e * 2.12194440e-4f - 0.5f * square) + e * 0.693359375f;
  const Vec infinity = splat(__builtin_inff());
  result = x == Vec{} ? -infinity : result;
  return x < infinity ? result : x;  // also NaN
}

}  // namespace
}  // namespace scan_fast::SCAN_FAST_ISA
