// Loops over the register tiles of NT-Xent's products, for its sources that are compiled once per instruction set.
#pragma once

#include "common/register_tiles.h"
#include "nt_xent/nt_xent_cpu_kernel.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

constexpr int kWideColumns = kWideVectors * kLanes, kNarrowColumns = kNarrowVectors * kLanes;
static_assert(kNTXentPadding % kWideColumns == 0 && kLanes % kWideRows == 0);
static_assert(kNarrowColumns <= kNTXentMaxWidth);

// Rows and columns of a tile of similarities that are multiples of both shapes: of W Z, and of W^T Z.
constexpr int64_t kWholeRows = 24;
constexpr int64_t kWholeColumns = kWideColumns % kNarrowRows == 0 ? kWideColumns : kNTXentPadding;
static_assert(kWholeRows % kWideRows == 0 && kWholeRows % kNarrowRows == 0 && kNTXentPadding % kWholeRows == 0);
static_assert(kWholeColumns % kWideColumns == 0 && kWholeColumns % kNarrowRows == 0);
static_assert(kNTXentPadding % kWholeColumns == 0);

inline int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline int64_t nt_xent_padded(int64_t rows) { return rounded_up(rows, kNTXentPadding); }

// Writes the register tiles of similarities; add(i, j, sum) adds the products of the rows from i on with the columns from
// j on to the sums, which are zero.
template <typename Add>
inline __attribute__((always_inline)) void for_wide_tiles(int64_t rows, int64_t columns, float* tile, int64_t ld,
                                                          Add add) {
  const int64_t whole_rows = rounded_up(rows, kWholeRows), whole_columns = rounded_up(columns, kWholeColumns);
  for (int64_t j = 0; j < whole_columns; j += kWideColumns) {
    for (int64_t i = 0; i < whole_rows; i += kWideRows) {
      Vec sum[kWideRows][kWideVectors] = {};
      add(i, j, sum);
      store_rows(sum, tile + i * ld + j, ld);
    }
  }
}

// Adds register tiles to `to` (rows, dim); add(i, d, sum) adds the products for the rows from i and the dimensions from d
// on to the sums, which are zero.
template <typename Add>
inline __attribute__((always_inline)) void for_narrow_tiles(int64_t rows, int64_t dim, float* to, Add add) {
  for (int64_t d = 0; d < dim; d += kNarrowColumns) {
    for (int64_t i = 0; i < rows; i += kNarrowRows) {
      Vec sum[kNarrowRows][kNarrowVectors] = {};
      add(i, d, sum);
      write_rows<true>(sum, to + i * dim + d, dim, rows - i, dim - d);
    }
  }
}

}  // namespace
}  // namespace scan_fast::SCAN_FAST_ISA
