// Products of NT-Xent in bfloat16 pairs, compiled once per instruction set.
//
// A 32-bit word holds two values that are consecutive along the sum, the first in its low half. So a product of words is
// shaped like one of floats (nt_xent_cpu_kernel.cpp) with half the depth. With AVX-512-BF16 one instruction multiplies
// and adds both halves of sixteen words. Elsewhere float32 instructions compute the same: products of bfloat16 values are
// exact in float32, so only the sums are rounded. That is for tests; it is slower than float32.
#if defined(SCAN_FAST_ISA_avx512)
// This set is called only if cpu_has_avx512_bf16().
#define SCAN_FAST_BF16_INSTRUCTION 1
#include "common/cpu_dispatch.h"

SCAN_FAST_BEGIN_EXTENSION("avx512bf16")
#endif

#include "nt_xent/nt_xent_cpu_bf16.h"

#include "nt_xent/nt_xent_cpu_tiles.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

// Rounds to bfloat16: to nearest, ties to even; NaN stays NaN.
inline uint32_t rounded(float x) { return narrow<Bf16>(x).bits; }
inline uint32_t pair(float first, float second) { return rounded(first) | rounded(second) << 16; }

// The same for vectors; the result is in the low half of each lane.
inline UnsignedVec rounded(Vec x) {
  const UnsignedVec bits = reinterpret_cast<UnsignedVec>(x);
  const UnsignedVec nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? UnsignedVec{} + 0x7fc0u : nearest;
}

}  // namespace

void nt_xent_pack_bf16(const float* unit, int64_t rows, int64_t dim, uint32_t* panels, uint32_t* slices) {
  const int64_t padded = nt_xent_padded(rows), pairs = (dim + 1) / 2;
  const auto value = [&](int64_t row, int64_t d) { return row < rows && d < dim ? unit[row * dim + d] : 0.0f; };
  for (int64_t first = 0; first < padded; first += kLanes, panels += kLanes * pairs) {
    for (int64_t k = 0; k < pairs; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) {
        panels[k * kLanes + lane] = pair(value(first + lane, 2 * k), value(first + lane, 2 * k + 1));
      }
    }
  }
  if (slices == nullptr) return;
  for (int64_t d = 0; d < dim; d += kNarrowColumns) {
    for (int64_t row = 0; row < padded; row += 2, slices += kNarrowColumns) {
      for (int64_t c = 0; c < kNarrowColumns; ++c) slices[c] = pair(value(row, d + c), value(row + 1, d + c));
    }
  }
}

void nt_xent_similarities_bf16(const uint32_t* row_panels, int64_t rows, const uint32_t* column_panels, int64_t columns,
                               int64_t dim, float* tile, int64_t ld) {
  const int64_t pairs = (dim + 1) / 2;
  for_wide_tiles(rows, columns, tile, ld,
                 [&](int64_t i, int64_t j, Vec(&sum)[kWideRows][kWideVectors]) __attribute__((always_inline)) {
                   add_products(sum, pairs, row_panels + i / kLanes * kLanes * pairs + i % kLanes, 1, kLanes,
                                column_panels + j * pairs, pairs * kLanes, kLanes);
                 });
}

void nt_xent_pair_weights(const float* tile, int64_t rows, int64_t columns, int64_t ld, uint32_t* across,
                          uint32_t* down) {
  typedef uint64_t TwoWords __attribute__((vector_size(kLanes * 4)));
  typedef uint32_t HalfWords __attribute__((vector_size(kLanes * 2)));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      TwoWords both = reinterpret_cast<TwoWords>(rounded(load(tile + i * ld + j)));
      both |= both >> 16;
      const HalfWords words = __builtin_convertvector(both, HalfWords);
      std::memcpy(across + i * (ld / 2) + j / 2, &words, sizeof(words));
    }
  }
  for (int64_t i = 0; i < rows; i += 2) {
    const float *const first = tile + i * ld, *const second = first + ld;
    uint32_t* const out = down + i / 2 * ld;
    const bool both = i + 1 < rows;
    for (int64_t j = 0; j < ld; j += kLanes) {
      const UnsignedVec low = rounded(load(first + j));
      const UnsignedVec high = both ? rounded(load(second + j)) << 16 : UnsignedVec{};
      const UnsignedVec words = low | high;
      std::memcpy(out + j, &words, sizeof(words));
    }
  }
}

void nt_xent_gather_bf16(const uint32_t* words, int64_t ld, int64_t rows, int64_t depth, bool transposed,
                         const uint32_t* slices, int64_t padded_depth, int64_t dim, float* to) {
  const int64_t a_row = transposed ? 1 : ld / 2, a_step = transposed ? ld : 1, pairs = (depth + 1) / 2;
  for_narrow_tiles(rows, dim, to,
                   [&](int64_t i, int64_t d, Vec(&sum)[kNarrowRows][kNarrowVectors]) __attribute__((always_inline)) {
                     add_products(sum, pairs, words + i * a_row, a_row, a_step, slices + d * (padded_depth / 2), kLanes,
                                  kNarrowColumns);
                   });
}

}  // namespace scan_fast::SCAN_FAST_ISA

#if defined(SCAN_FAST_ISA_avx512)
SCAN_FAST_END_EXTENSION
#endif
