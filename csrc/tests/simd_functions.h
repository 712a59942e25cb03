// The functions of common/simd.h and common/simd_rows.h on arrays, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"

namespace scan_fast {

// 16-bit values: half is float16, else bfloat16. n may be any number.
struct SimdFunctions {
  int64_t lanes;
  void (*widen)(bool half, const uint16_t* in, int64_t n, float* out);
  void (*narrow)(bool half, const float* in, int64_t n, uint16_t* out);
  void (*exp)(const float* in, int64_t n, float* out);
  void (*log)(const float* in, int64_t n, float* out);
  // Of `lanes` values: their sum and largest; in bits, which are positive; and whether any is.
  void (*reduce)(const float* in, float* sum, float* largest, uint32_t* positive, bool* any);
  // Of bits and n: 1.0 in the lanes of the bits, and in the first n lanes.
  void (*expand)(uint32_t bits, int n, float* of_bits, float* first);
  // `lanes` rows of `count` values, of which `left` elements remain: transposed to out (count, lanes), and doubled, back
  // to their places in `rows`.
  void (*transpose)(float* rows, int64_t count, int64_t left, float* out);
};

}  // namespace scan_fast

SCAN_FAST_DECLARE_PER_ISA(const ::scan_fast::SimdFunctions& simd_functions())
