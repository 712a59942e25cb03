#include "tests/device_layer_kernels.h"

#include "common/device.h"

namespace scan_fast::device_layer_test {
namespace {

__global__ void block_sum_kernel(const float* __restrict__ x, float* __restrict__ out, int n, Fault fault) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  SCAN_FAST_SHARED(float, result, 1);
  const Shared<float> partial = dynamic.as<float>();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = thread; i < n; i += threads) sum += x[static_cast<int64_t>(blockIdx.x) * n + i];
  if (fault == Fault::kEarlyReturn && thread == 3) return;
  sum = warp_sum(sum);
  if (thread % 32 == 0) partial[fault == Fault::kPastTheEnd ? thread / 32 + 1 : thread / 32] = sum;
  if (fault != Fault::kNoBarrier) __syncthreads();
  if (thread == 0) {
    float total = 0;
    for (int w = 0; w < threads / 32; ++w) total += partial[w];
    result[0] = total;
  }
  __syncthreads();
  if (thread == threads - 1) out[blockIdx.x] = result[0];
}

template <typename T>
__global__ void matrix_product_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out,
                                      bool transposed, bool wait) {
  SCAN_FAST_SHARED(T, tile_a, 16 * 16);
  SCAN_FAST_SHARED(T, tile_b, 16 * 16);
  const int lane = static_cast<int>(threadIdx.x);
  cp_async_16(tile_a.get() + 8 * lane, a + 8 * lane);
  // b is 128 elements, 16 copies; the other half is zero-filled and only addressed by ldmatrix.
  cp_async_16(tile_b.get() + 8 * lane, lane < 16 ? b + 8 * lane : b, lane < 16 ? 16 : 0);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  __syncthreads();
  uint32_t fragment_a[4], fragment_b[4];
  ldmatrix_x4(fragment_a, tile_a.get() + (lane % 16) * 16 + lane / 16 * 8);
  if (transposed) {  // tile_b rows are columns of b: 8 rows of 16
    ldmatrix_x4(fragment_b, tile_b.get() + (lane % 8) * 16 + (lane / 8 % 2) * 8 + lane / 16 * 128);
  } else {  // tile_b rows are rows of b: 16 rows of 8
    ldmatrix_x4_trans(fragment_b, tile_b.get() + (lane % 16) * 8 + lane / 16 * 128);
  }
  const uint32_t pair_b[2] = {fragment_b[0], fragment_b[1]};
  float d[4] = {0, 0, 0, 0};
  mma_16816<T>(d, fragment_a, pair_b);
  for (int r = 0; r < 4; ++r) out[(lane / 4 + 8 * (r / 2)) * 8 + 2 * (lane % 4) + r % 2] = d[r];
}

__global__ void lanes_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[0 * 32 + lane] = __shfl_xor_sync(kFullMask, lane, 5);
  out[1 * 32 + lane] = __shfl_down_sync(kFullMask, lane, 3u);
  out[2 * 32 + lane] = __shfl_up_sync(kFullMask, lane, 3u, 8);
  out[3 * 32 + lane] = __shfl_sync(kFullMask, lane, 9, 16);
  out[4 * 32 + lane] = static_cast<int>(__ballot_sync(kFullMask, lane % 3 == 0));
  out[5 * 32 + lane] = __any_sync(kFullMask, lane == 31) + 2 * __all_sync(kFullMask, lane < 31);
  // Two halves of a warp at different collectives.
  out[6 * 32 + lane] = lane < 16 ? __shfl_xor_sync(0xffffu, lane, 1) : __shfl_xor_sync(0xffff0000u, lane, 2);
  out[7 * 32 + lane] = static_cast<int>(__shfl_down_sync(kFullMask, 1ull << lane, 1u) >> 8);
  out[8 * 32 + lane] = warp_max(lane * 7 % 32) + 100 * warp_min(lane + 2) + 1000 * warp_sum(1);
}

__global__ void tickets_kernel(int* total, unsigned* ticket, int* last) {
  SCAN_FAST_SHARED(unsigned, mine, 1);
  atomicAdd(total, static_cast<int>(threadIdx.x));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) mine[0] = atomicAdd(ticket, 1u);
  __syncthreads();
  if (mine[0] == gridDim.x - 1 && threadIdx.x == 0) *last = static_cast<int>(mine[0]) + 1;
}

__global__ void warp_exchange_kernel(float* out, bool sync) {
  SCAN_FAST_SHARED(float, values, 32);
  const int lane = static_cast<int>(threadIdx.x);
  values[lane] = static_cast<float>(lane);
  if (sync) __syncwarp();
  out[lane] = values[31 - lane];
}

// 32 KB of static shared memory and whatever the launch adds.
__global__ void shared_sizes_kernel(float* out, int dynamic_floats) {
  SCAN_FAST_SHARED(float, fixed, 8 * 1024);
  SCAN_FAST_DYNAMIC_SHARED(memory);
  const Shared<float> dynamic = memory.as<float>();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 8 * 1024; i += threads) fixed[i] = 1.0f;
  for (int i = thread; i < dynamic_floats; i += threads) dynamic[i] = 1.0f;
  __syncthreads();
  if (thread > 0) return;
  float sum = 0;
  for (int i = 0; i < 8 * 1024; ++i) sum += fixed[i];
  for (int i = 0; i < dynamic_floats; ++i) sum += dynamic[i];
  *out = sum;
}

__global__ void first_of_chain_kernel(float* values) {
  let_next_kernel_start();
  st_global(values + threadIdx.x, static_cast<float>(threadIdx.x));
}

__global__ void second_of_chain_kernel(const float* values, float* out, Chain chain) {
  const int thread = static_cast<int>(threadIdx.x);
  if (chain == Chain::kLoadsEarly) out[thread] = ld_coherent<float>(values + thread);
  if (chain == Chain::kStoresEarly) st_global(out + thread, 0.0f);
  if (chain != Chain::kNeverWaits && (chain != Chain::kOneThreadNeverWaits || thread != 5)) wait_for_previous_kernel();
  out[thread] = 2.0f * ld_coherent<float>(values + thread);
}

template <typename T>
__global__ void round_trip_kernel(const float* x, float* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    if constexpr (sizeof(T) == 2) {
      const float2 pair = unpack2<T>(pack2<T>(x[i], -x[i]));
      out[i] = pair.x == -pair.y || pair.x != pair.x ? to_float(from_float<T>(x[i])) : 12345.0f;
    } else {
      out[i] = to_float(from_float<T>(x[i]));
    }
  }
}

__global__ void powers_of_two_kernel(const float* x, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = exp2_polynomial(x[i]);
}

}  // namespace

void block_sum(const float* x, float* out, int blocks, int n, int threads, Fault fault) {
  launch(block_sum_kernel, dim3(blocks), dim3(threads), static_cast<size_t>(threads / 32) * sizeof(float), nullptr, x,
         out, n, fault);
}

void matrix_product(DType dtype, const void* a, const void* b, float* out, bool transposed, bool wait) {
  if (dtype == DType::kBFloat16) {
    launch(matrix_product_kernel<bf16_t>, dim3(1), dim3(32), 0, nullptr, static_cast<const bf16_t*>(a),
           static_cast<const bf16_t*>(b), out, transposed, wait);
  } else {
    launch(matrix_product_kernel<half_t>, dim3(1), dim3(32), 0, nullptr, static_cast<const half_t*>(a),
           static_cast<const half_t*>(b), out, transposed, wait);
  }
}

void lanes(int* out) { launch(lanes_kernel, dim3(1), dim3(32), 0, nullptr, out); }

void tickets(int* total, unsigned* ticket, int* last, int blocks, int threads) {
  launch(tickets_kernel, dim3(blocks), dim3(threads), 0, nullptr, total, ticket, last);
}

void warp_exchange(float* out, bool sync) { launch(warp_exchange_kernel, dim3(1), dim3(32), 0, nullptr, out, sync); }

void shared_sizes(float* out, size_t dynamic_bytes, bool ask) {
  const int floats = static_cast<int>(dynamic_bytes / sizeof(float));
  if (ask) {
    launch(shared_sizes_kernel, dim3(2), dim3(64), dynamic_bytes, nullptr, out, floats);
  } else {
    start_kernel(shared_sizes_kernel, dim3(2), dim3(64), dynamic_bytes, nullptr, out, floats);
  }
}

void chain_of_kernels(float* values, float* out, Chain chain) {
  launch(first_of_chain_kernel, dim3(1), dim3(64), 0, nullptr, values);
  launch_after(second_of_chain_kernel, dim3(2), dim3(32), 0, nullptr, values, out, chain);
}

int resident_blocks_of_a_kernel() { return resident_blocks(first_of_chain_kernel, 64, 0); }

void round_trip(DType dtype, const float* x, float* out, int n) {
  dispatch_dtype(dtype, [&]<typename T>() { launch(round_trip_kernel<T>, dim3(1), dim3(64), 0, nullptr, x, out, n); });
}

void powers_of_two(const float* x, float* out, int n) {
  launch(powers_of_two_kernel, dim3((n + 255) / 256), dim3(256), 0, nullptr, x, out, n);
}

}  // namespace scan_fast::device_layer_test
