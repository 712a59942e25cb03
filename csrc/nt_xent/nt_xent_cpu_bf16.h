// Inner loops of the CPU kernel with products of bfloat16 pairs. Packed rows are those of nt_xent_cpu_kernel.h, with
// words of two values instead of floats: panels (D / 2 rounded up, lanes) pair dimensions, slices (rows / 2, width) pair
// rows.
#pragma once

#include "nt_xent/nt_xent_cpu_kernel.h"

// Chooses the instruction set of these functions: avx512 has the instruction itself, so it needs AVX-512-BF16.
#if defined(__x86_64__)
#define SCAN_FAST_BF16_ISA(function)                                                          \
  (::scan_fast::cpu_has_avx512_bf16()                         ? ::scan_fast::avx512::function \
   : ::scan_fast::cpu_isa() != ::scan_fast::CpuIsa::kBaseline ? ::scan_fast::avx2::function   \
                                                              : ::scan_fast::baseline::function)
#else
#define SCAN_FAST_BF16_ISA(function) (::scan_fast::baseline::function)
#endif

SCAN_FAST_DECLARE_PER_ISA(void nt_xent_pack_bf16(const float* unit, int64_t rows, int64_t dim, uint32_t* panels,
                                                 uint32_t* slices))

SCAN_FAST_DECLARE_PER_ISA(void nt_xent_similarities_bf16(const uint32_t* row_panels, int64_t rows,
                                                         const uint32_t* column_panels, int64_t columns, int64_t dim,
                                                         float* tile, int64_t ld))

// Rounds a tile of weights to words: `across` (rows, ld / 2) pairs columns, `down` (rows / 2, ld) pairs rows. `columns` is
// a multiple of 16.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_pair_weights(const float* tile, int64_t rows, int64_t columns, int64_t ld,
                                                    uint32_t* across, uint32_t* down))

// to (rows, dim) += W Z with the words `across`, or transposed with the words `down`.
SCAN_FAST_DECLARE_PER_ISA(void nt_xent_gather_bf16(const uint32_t* words, int64_t ld, int64_t rows, int64_t depth,
                                                   bool transposed, const uint32_t* slices, int64_t padded_depth,
                                                   int64_t dim, float* to))
