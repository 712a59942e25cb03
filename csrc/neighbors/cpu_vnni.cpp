// The product of integer pairs by the instruction of AVX-512-VNNI: two multiply-adds per lane, twice the rate of float32.
// Other instruction sets compute the same sums by two instructions (cpu_kernels.cpp).
#if defined(SCAN_FAST_ISA_avx512)
#define SCAN_FAST_VNNI_INSTRUCTION 1
#include "common/cpu_dispatch.h"

SCAN_FAST_BEGIN_EXTENSION("avx512vnni")

#include "neighbors/cpu_kernels.h"
#include "neighbors/cpu_tile.h"

namespace scan_fast::avx512 {

void neighbor_product_vnni(const int32_t* a, const int32_t* b, int64_t pairs, float* c) {
  multiply_tile<IntVec>(a, b, pairs, c);
}

}  // namespace scan_fast::avx512

SCAN_FAST_END_EXTENSION
#endif
