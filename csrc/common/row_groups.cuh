// Rows of logits in the registers of groups of lanes, for the loss kernels.
//
// A group of kGroup lanes (8 or 32) holds one row of up to kGroup * kPer classes in registers. Element i of a lane is
// class i * kGroup + lane, or with kVector (classes a multiple of 4 and rows aligned) class
// (i / 4) * 4 * kGroup + 4 * lane + i % 4: one 16-byte (float32) or 8-byte (16-bit) access per four elements.
#pragma once

#include "common/device.h"

namespace scan_fast {

constexpr float kLog2E = 1.44269504088896341f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
// e^x for x <= 0; exactly 0 at -infinity, NaN for NaN.
__device__ __forceinline__ float exp_negative(float x) { return exp2_approx(x * kLog2E); }

template <typename T>
__device__ __forceinline__ void load4(const T* p, float* x) {
  if constexpr (sizeof(T) == 4) {
    const float4 v = ld_global<float4>(p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const uint2 v = ld_global<uint2>(p);
    const float2 low = unpack2<T>(v.x), high = unpack2<T>(v.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
}

template <typename T>
__device__ __forceinline__ void store4(T* p, const float* x) {
  if constexpr (sizeof(T) == 4) {
    st_global(p, make_float4(x[0], x[1], x[2], x[3]));
  } else {
    st_global(p, make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])));
  }
}

// Returns whether rows of `classes` elements from p on can be read four elements at a time.
template <typename T>
inline bool aligned_rows(const void* p, int64_t classes) {
  return classes % 4 == 0 && reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

template <int kGroup, bool kVector>
__device__ __forceinline__ int class_of(int lane, int i) {
  return kVector ? i / 4 * (4 * kGroup) + 4 * lane + i % 4 : i * kGroup + lane;
}

template <typename T, int kGroup, int kPer, bool kVector>
__device__ __forceinline__ void load_row(const T* row, int classes, int lane, float fill, float (&x)[kPer]) {
#pragma unroll
  for (int i = 0; i < kPer; i += kVector ? 4 : 1) {
    const int c = class_of<kGroup, kVector>(lane, i);
    if constexpr (kVector) {
      if (c < classes) {
        load4(row + c, x + i);
      } else {
        x[i] = x[i + 1] = x[i + 2] = x[i + 3] = fill;
      }
    } else {
      x[i] = c < classes ? to_float(row[c]) : fill;
    }
  }
}

template <typename T, int kGroup, int kPer, bool kVector>
__device__ __forceinline__ void store_row(T* row, int classes, int lane, const float (&x)[kPer]) {
#pragma unroll
  for (int i = 0; i < kPer; i += kVector ? 4 : 1) {
    const int c = class_of<kGroup, kVector>(lane, i);
    if (c >= classes) continue;
    if constexpr (kVector) {
      store4(row + c, x + i);
    } else {
      row[c] = from_float<T>(x[i]);
    }
  }
}

// Butterfly reductions over the lanes of a group. All lanes of the warp must take part.
template <int kGroup>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}
template <int kGroup>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}
template <int kGroup>
__device__ __forceinline__ int group_min(int x) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) x = min(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

// Reduces each of v[0..N) over the block in a fixed order; every thread gets the result. scratch: N * warps elements.
// The number of warps must be a power of two. With one warp there is no barrier.
template <int N, typename V, typename Combine>
__device__ __forceinline__ void block_combine(V (&v)[N], const Shared<V>& scratch, Combine combine) {
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    for (int offset = 16; offset > 0; offset /= 2) v[k] = combine(v[k], __shfl_xor_sync(kFullMask, v[k], offset));
  }
  if (warps == 1) return;
  if (threadIdx.x % 32 == 0) {
    for (int k = 0; k < N; ++k) scratch[warp * N + k] = v[k];
  }
  __syncthreads();
  // Every warp combines the results of all warps, which its lanes hold several times over.
  const int source = static_cast<int>(threadIdx.x) & (warps - 1);
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = scratch[source * N + k];
  for (int offset = warps / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = combine(v[k], __shfl_xor_sync(kFullMask, v[k], offset));
  }
  __syncthreads();
}

struct Add {
  template <typename V>
  __device__ __forceinline__ V operator()(V x, V y) const {
    return x + y;
  }
};
struct Larger {
  __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// Returns the smallest power of two of whole warps with at least `wanted` threads, up to `most`.
inline int block_threads(int64_t wanted, int most) {
  int threads = 32;
  while (threads < wanted && threads < most) threads *= 2;
  return threads;
}

// Returns true in the last of `blocks` blocks that call this with the same ticket, which must be zero before. That
// block then sees what the others wrote before their calls. With one block the ticket is not used.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  SCAN_FAST_SHARED(unsigned, order, 1);
  if (blocks == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) order[0] = atomicAdd(ticket, 1u);
  __syncthreads();
  const unsigned mine = order[0];
  __threadfence();
  return mine == blocks - 1;
}

}  // namespace scan_fast
