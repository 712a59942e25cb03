// Matrix products whose sums stay in vector registers, for sources that are compiled once per instruction set.
//
// add_products adds a (kRows x depth) times (depth x kVectors * kLanes) product to kRows * kVectors sums. A step of k
// costs kVectors loads, kRows broadcasts and kRows * kVectors multiply-adds. So the two multiply-add ports are the
// limit if there are enough sums to hide their latency (8 on current cores), and if the sums, one row of b and one
// broadcast fit into the registers: 16 of AVX2, 32 of AVX-512 and NEON.
#pragma once

#if defined(__SSE2__)
#include "common/intrinsics.h"
#endif
#include "common/simd.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

// Shapes that fill the registers: a wide one for panels on both sides, and a narrow one with more rows, whose width
// divides the usual numbers of dimensions.
#if defined(SCAN_FAST_ISA_avx512)
constexpr int kWideRows = 8, kWideVectors = 3, kNarrowRows = 12, kNarrowVectors = 2;
#elif defined(SCAN_FAST_ISA_avx2)
constexpr int kWideRows = 4, kWideVectors = 3, kNarrowRows = 6, kNarrowVectors = 2;
#elif defined(__aarch64__)
constexpr int kWideRows = 4, kWideVectors = 4, kNarrowRows = 8, kNarrowVectors = 2;
#else
constexpr int kWideRows = 2, kWideVectors = 4, kNarrowRows = 4, kNarrowVectors = 2;
#endif

// Operands are floats, or words of two 16-bit values that are consecutive along the sum, the first in the low half:
// unsigned words of bfloat16 values, or signed words of integers. Products of bfloat16 values are exact in float32, so only
// the sums of a word are rounded. Sums of integers are exact in 32 bits if the last one fits; -2^15 is not an operand, because
// two of its squares do not. A source that is compiled for AVX-512-BF16 defines SCAN_FAST_BF16_INSTRUCTION, one for
// AVX-512-VNNI defines SCAN_FAST_VNNI_INSTRUCTION.
inline Vec load_operand(const float* p) { return load(p); }
inline Vec splat_operand(float x) { return splat(x); }
inline Vec multiply_add(Vec sum, Vec x, Vec y) { return sum + x * y; }

inline UnsignedVec load_operand(const uint32_t* p) {
  UnsignedVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline UnsignedVec splat_operand(uint32_t x) { return UnsignedVec{} + x; }
inline Vec multiply_add(Vec sum, UnsignedVec x, UnsignedVec y) {
#if defined(SCAN_FAST_BF16_INSTRUCTION)
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
#else
  sum += reinterpret_cast<Vec>(x & 0xffff0000u) * reinterpret_cast<Vec>(y & 0xffff0000u);
  return sum + reinterpret_cast<Vec>(x << 16) * reinterpret_cast<Vec>(y << 16);
#endif
}

inline IntVec load_operand(const int32_t* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline IntVec splat_operand(int32_t x) { return IntVec{} + x; }
inline IntVec multiply_add(IntVec sum, IntVec x, IntVec y) {
#if defined(SCAN_FAST_VNNI_INSTRUCTION)
  return reinterpret_cast<IntVec>(_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)y));
#elif defined(SCAN_FAST_ISA_avx512)
  return sum + reinterpret_cast<IntVec>(_mm512_madd_epi16((__m512i)x, (__m512i)y));
#elif defined(SCAN_FAST_ISA_avx2)
  return sum + reinterpret_cast<IntVec>(_mm256_madd_epi16((__m256i)x, (__m256i)y));
#elif defined(__SSE2__)
  return sum + reinterpret_cast<IntVec>(_mm_madd_epi16((__m128i)x, (__m128i)y));
#else
  const auto low_half = [](IntVec v) { return reinterpret_cast<IntVec>(reinterpret_cast<UnsignedVec>(v) << 16) >> 16; };
  return sum + low_half(x) * low_half(y) + (x >> 16) * (y >> 16);
#endif
}

// sum[r][v] += sum over k < depth of a[r * a_row + k * a_step] * b[v * b_vector + k * b_step ...], one vector of b.
template <int kRows, int kVectors, typename Sum, typename Operand>
inline __attribute__((always_inline)) void add_products(Sum (&sum)[kRows][kVectors], int64_t depth, const Operand* a,
                                                        int64_t a_row, int64_t a_step, const Operand* b,
                                                        int64_t b_vector, int64_t b_step) {
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    decltype(load_operand(b)) column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load_operand(b + v * b_vector);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto row = splat_operand(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(sum[r][v], row, column[v]);
    }
  }
}

// Stores the sums as rows that are `step` floats apart.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void store_rows(const Vec (&sum)[kRows][kVectors], float* to, int64_t step) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(to + r * step + v * kLanes, sum[r][v]);
  }
}

// Stores the sums in such rows, of which `rows` and `columns` remain; both may be more than the tile has. kAdd: adds them.
template <bool kAdd, int kRows, int kVectors>
inline __attribute__((always_inline)) void write_rows(const Vec (&sum)[kRows][kVectors], float* to, int64_t step,
                                                      int64_t rows, int64_t columns) {
  constexpr int kColumns = kVectors * kLanes;
  if (rows >= kRows && columns >= kColumns) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* const out = to + r * step + v * kLanes;
        store(out, kAdd ? load(out) + sum[r][v] : sum[r][v]);
      }
    }
    return;
  }
  float edge[kRows * kColumns];
  store_rows(sum, edge, kColumns);
  for (int64_t r = 0; r < kRows && r < rows; ++r) {
    for (int64_t c = 0; c < kColumns && c < columns; ++c) {
      float& out = to[r * step + c];
      out = kAdd ? out + edge[r * kColumns + c] : edge[r * kColumns + c];
    }
  }
}

}  // namespace
}  // namespace scan_fast::SCAN_FAST_ISA
