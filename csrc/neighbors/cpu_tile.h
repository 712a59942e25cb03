// The product of one tile of the CPU neighbour search, for sources that are compiled once per instruction set.
#pragma once

#include "common/register_tiles.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

constexpr int kTileColumns = kWideVectors * kLanes;

// The sums as floats. Sums of integers are in units of 2^-30, because their factors are in units of 2^-15.
inline Vec as_floats(Vec sum) { return sum; }
inline Vec as_floats(IntVec sum) { return __builtin_convertvector(sum, Vec) * 0x1p-30f; }

// c (kWideRows, kTileColumns) = a b^T. The operands are panels (depth, kLanes); a points to the first row within its
// panel, b to the first of its panels.
template <typename Sum, typename Operand>
inline __attribute__((always_inline)) void multiply_tile(const Operand* a, const Operand* b, int64_t depth, float* c) {
  Sum sum[kWideRows][kWideVectors] = {};
  add_products(sum, depth, a, 1, kLanes, b, depth * kLanes, kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kWideRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kWideVectors; ++v) store(c + r * kTileColumns + v * kLanes, as_floats(sum[r][v]));
  }
}

}  // namespace
}  // namespace scan_fast::SCAN_FAST_ISA
