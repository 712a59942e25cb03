// Launchers of the small kernels that exercise common/device.h; each names the property it is for.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast::device_layer_test {

// out[b] = sum of x[b, :], through shared memory. The broken forms drop the barrier, or leave lanes out of a shuffle.
enum class Fault { kNone, kNoBarrier, kEarlyReturn, kPastTheEnd };
void block_sum(const float* x, float* out, int blocks, int n, int threads, Fault fault);
// out = a (16 x 16) times b (16 x 8, given as its transpose 8 x 16 if `transposed`), one warp, through cp.async and
// ldmatrix. With wait = false the copies are never waited for.
void matrix_product(DType dtype, const void* a, const void* b, float* out, bool transposed, bool wait);
// out (9, 32): result of each shuffle, vote and conversion in lane l.
void lanes(int* out);
// total += every thread's index; the block that comes last (a ticket) writes the number of blocks to last.
void tickets(int* total, unsigned* ticket, int* last, int blocks, int threads);
// A warp passes values through shared memory with or without __syncwarp.
void warp_exchange(float* out, bool sync);
// out = how many floats lie in 32 KB of static and dynamic_bytes of dynamic shared memory. Without `ask` the launch
// does not see to it that the kernel may have them.
void shared_sizes(float* out, size_t dynamic_bytes, bool ask);
// out[i] = 2 * values[i] for 32 values that the kernel before writes; launch_after starts the second. The broken forms
// do not wait for it, in all threads or in one, or access global memory first.
enum class Chain { kWaits, kNeverWaits, kOneThreadNeverWaits, kLoadsEarly, kStoresEarly };
void chain_of_kernels(float* values, float* out, Chain chain);
int resident_blocks_of_a_kernel();
// out[i] = x[i] converted to the 16-bit type and back; packed pairs.
void round_trip(DType dtype, const float* x, float* out, int n);
// out[i] = 2^x[i] by exp2_polynomial.
void powers_of_two(const float* x, float* out, int n);

}  // namespace scan_fast::device_layer_test
