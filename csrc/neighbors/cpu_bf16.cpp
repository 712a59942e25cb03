// The product of bfloat16 pairs by the instruction of AVX-512-BF16: two multiply-adds per lane, twice the rate of float32.
// Other instruction sets compute the same sums by float32 instructions (cpu_kernels.cpp).
#if defined(SCAN_FAST_ISA_avx512)
#define SCAN_FAST_BF16_INSTRUCTION 1
#include "common/cpu_dispatch.h"

SCAN_FAST_BEGIN_EXTENSION("avx512bf16")

#include "neighbors/cpu_kernels.h"
#include "neighbors/cpu_tile.h"

namespace scan_fast::avx512 {

void neighbor_product_bf16(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c) {
  multiply_tile<Vec>(a, b, pairs, c);
}

}  // namespace scan_fast::avx512

SCAN_FAST_END_EXTENSION
#endif
