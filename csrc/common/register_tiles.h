// Matrix products whose sums stay in vector registers, for sources that are compiled once per instruction set.
//
// add_products adds a (kRows x depth) times (depth x kVectors * kLanes) product to kRows * kVectors sums. A step of k
// costs kVectors loads, kRows broadcasts and kRows * kVectors multiply-adds. So the two multiply-add ports are the
// limit if there are enough sums to hide their latency (8 on current cores), and if the sums, one row of b and one
// broadcast fit into the registers: 16 of AVX2, 32 of AVX-512 and NEON.
#pragma once

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

// sum[r][v] += sum over k < depth of a[r * a_row + k * a_step] * b[v * b_vector + k * b_step ...], one vector of b.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void add_products(Vec (&sum)[kRows][kVectors], int64_t depth, const float* a,
                                                        int64_t a_row, int64_t a_step, const float* b, int64_t b_vector,
                                                        int64_t b_step) {
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vec column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * b_vector);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec row = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += row * column[v];
    }
  }
}

}  // namespace
}  // namespace scan_fast::SCAN_FAST_ISA
