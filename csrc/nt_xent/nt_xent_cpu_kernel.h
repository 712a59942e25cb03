// Inner loops of the CPU kernel over one tile of similarities, compiled once per instruction set.
//
// A tile is (rows, columns) with a leading dimension. `columns` is a multiple of 16. Masked entries (padding, the
// diagonal, positive pairs) are -infinity, which contributes exactly zero.
//
// Packed rows. Each row block is padded with zero rows to a multiple of kNTXentPadding, and stored twice: `panels`, for
// similarities, as panels (D, lanes) of `lanes` rows; `slices`, for W Z, as slices (rows, width) of `width` dimensions,
// the last one padded with zeros. Lanes and width depend on the instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"

namespace scan_fast {

constexpr int64_t kNTXentPadding = 48;  // a multiple of the rows and columns of every register tile
constexpr int64_t kNTXentMaxWidth = 32;

}  // namespace scan_fast

// Unit rows of float32 x (rows, dim), summed in double: unit = x / max(|x|, 1e-12), inv_norm = 1 / max(|x|, 1e-12).
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_unit_rows(const float* x, int64_t rows, int64_t dim, float* unit,
                                                 float* inv_norm))

// The sum of products of two rows, in double.
SCAN_FAST_DECLARE_PER_ISA(double nt_xent_dot(const float* x, const float* y, int64_t dim))

// gradient = (du - u (u . du)) * inv_norm with du = (gradient + pull * positive) / temperature; without `radial` the
// term in u is left out.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_finish_row(const float* unit, const float* positive, int64_t dim, double pull,
                                                  double temperature, float inv_norm, bool radial, float* gradient))

// Packs the rows of a block into its panels and, unless null, its slices.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_pack(const float* unit, int64_t rows, int64_t dim, float* panels, float* slices))

// tile = the products of the rows of two blocks. Writes whole register tiles: up to 24 rows and kNTXentPadding columns,
// of which the last may be padding. Both operands begin at a multiple of kNTXentPadding within their block.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_similarities(const float* row_panels, int64_t rows, const float* column_panels,
                                                    int64_t columns, int64_t dim, float* tile, int64_t ld))

// to (rows, dim) += W Z, with W (rows, depth) = tile, or the transpose of tile (depth, rows). `slices` are those of a
// block of padded_depth rows. Reads whole register tiles, as nt_xent_similarities writes them.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_gather(const float* tile, int64_t ld, int64_t rows, int64_t depth,
                                              bool transposed, const float* slices, int64_t padded_depth, int64_t dim,
                                              float* to))

// row_sum[i] = sum_j e_ij and column_sum[j] += sum_i e_ij, e_ij = 2^(scale * s_ij - scale). column_sum may be null.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_exp_sums(const float* tile, int64_t rows, int64_t columns, int64_t ld,
                                                float scale, float* row_sum, float* column_sum))

// Per row: accumulates 2^(scale * s_ij) into a running maximum (in units of scale * s) and a sum relative to it.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_online_sums(const float* tile, int64_t rows, int64_t columns, int64_t ld,
                                                   float scale, float* row_max, double* row_sum))

// tile_ij = 2^(scale * s_ij - scale) * (row_weight[i] + column_weight[j]), in place.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_weights(float* tile, int64_t rows, int64_t columns, int64_t ld, float scale,
                                               const float* row_weight, const float* column_weight))

// The same with one shift per row and column, an upper bound of both exponents:
// tile_ij = 2^(scale * s_ij - row_shift[i]) * row_weight[i] + 2^(scale * s_ij - column_shift[j]) * column_weight[j].
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_shifted_weights(float* tile, int64_t rows, int64_t columns, int64_t ld,
                                                       float scale, const float* row_shift, const float* row_weight,
                                                       const float* column_shift, const float* column_weight))

// Rounds to bfloat16: to nearest, ties to even; NaN stays NaN.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_to_bf16(const float* from, int64_t count, uint16_t* to))
