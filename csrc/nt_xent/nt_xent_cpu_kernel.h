// Inner loops of the CPU kernel over one tile of similarities, compiled once per instruction set.
//
// A tile is (rows, columns) with a leading dimension. `columns` is a multiple of 16. Masked entries (padding, the
// diagonal, positive pairs) are -infinity, which contributes exactly zero.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"

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
