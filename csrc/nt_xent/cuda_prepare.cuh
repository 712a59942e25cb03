// First kernels of NT-Xent. Forward: unit rows, operands, similarities of the positive pairs. Backward: the operands
// again, and a weight and a shift per row.
//
// Limits: memory for many rows (per row of D float32 values: read 4 D, write 4 D + 2 D or 4 D bytes), latency for few:
// one round of loads, two reductions over a warp, one round of stores.
#pragma once

#include <cmath>

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

// Operand layout of the portable kernels: (parts, 2N, width), in the order of rows.
template <bool kSplit>
struct RowMajor {
  half_t* packed;
  int width;
  int64_t low;  // offset from hi to lo, in elements

  RowMajor(half_t* packed_, const Params& p)
      : packed(packed_), width(p.padded), low(static_cast<int64_t>(p.rows()) * p.padded) {}
  __device__ __forceinline__ int position(int row) const { return row; }
  // Stores hi (and lo) of the elements k .. k + 3 of a unit row; k is a multiple of 4.
  __device__ __forceinline__ void put(int position, int k, const float (&unit)[4]) const {
    const PackedFour values(unit);
    half_t* const to = packed + static_cast<int64_t>(position) * width + k;
    st_global(to, values.hi);
    if constexpr (kSplit) st_global(to + low, values.lo);
  }
  // Padding positions, which must be zeroed.
  __host__ __device__ int fillers() const { return 0; }
  __device__ __forceinline__ int filler(int) const { return 0; }
};

// Scales of a row from its largest |element|: a power of two that brings that to [1, 4), so that neither huge nor tiny
// rows lose their direction. NaN if an element is infinite.
__device__ __forceinline__ float row_scale(float largest) {
  const unsigned exponent = __float_as_uint(largest) >> 23;  // biased
  return largest < INFINITY ? __uint_as_float((254 - min(exponent, 253u)) << 23) : NAN;
}

// Unit rows and operands of both views of a sample, and the product of the unit rows.
template <int kVectors, bool kAligned, typename T, typename Packing>
__device__ __forceinline__ void prepare_sample(const T* __restrict__ z0, const T* __restrict__ z1, int sample,
                                               float* __restrict__ unit, float* __restrict__ inv_norm,
                                               const Packing& packing, float* __restrict__ positive, const Params& p) {
  constexpr int kPart = 128 * kVectors;
  // Up to 512 dimensions the rows are read once, and stay in registers.
  const bool whole = kVectors == 1 || packing.width <= kPart;
  const int end = whole ? 1 : packing.width;
  const T* const of_view[2] = {z0 + static_cast<int64_t>(sample) * p.dim, z1 + static_cast<int64_t>(sample) * p.dim};
  RowPart<kVectors> x[2];
  float largest[2] = {}, scale[2], sum[2] = {}, inverse[2];
  for (int from = 0; from < end; from += kPart) {
#pragma unroll
    for (int view = 0; view < 2; ++view) load_part<kVectors, kAligned>(x[view], of_view[view], from, p.dim);
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      for_values<kVectors>([&](int v, int i) { largest[view] = fmaxf(largest[view], fabsf(x[view][v][i])); });
    }
  }
#pragma unroll
  for (int view = 0; view < 2; ++view) scale[view] = row_scale(warp_max(largest[view]));
  const auto load_scaled = [&](int from) {
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      if (!whole) load_part<kVectors, kAligned>(x[view], of_view[view], from, p.dim);
      for_values<kVectors>([&](int v, int i) { x[view][v][i] *= scale[view]; });
    }
  };
  for (int from = 0; from < end; from += kPart) {
    load_scaled(from);
#pragma unroll
    for (int view = 0; view < 2; ++view) sum[view] += dot<kVectors>(x[view], x[view]);
  }
#pragma unroll
  for (int view = 0; view < 2; ++view) {
    const float root = sqrtf(warp_sum(sum[view]));  // of the scaled row
    // norm = root / scale may be out of float32's range, although every quotient below is within it.
    const bool short_row = root / scale[view] < kMinNorm;
    inverse[view] = short_row ? 1 / kMinNorm / scale[view] : 1 / root;
    if (threadIdx.x % 32 == 0) {
      inv_norm[sample + view * p.samples] = short_row ? 1 / kMinNorm : inverse[view] * scale[view];
    }
  }
  float product = 0;
  for (int from = 0; from < end; from += kPart) {
    if (!whole) load_scaled(from);
#pragma unroll
    for (int view = 0; view < 2; ++view) {
      const int row = sample + view * p.samples;
      for_values<kVectors>([&](int v, int i) { x[view][v][i] *= inverse[view]; });
      store_part<kVectors, kAligned>(unit + static_cast<int64_t>(row) * p.dim, x[view], from, p.dim);
      const int position = packing.position(row);
      for_vectors<kVectors>(from, [&](int v, int k) {
        if (k < packing.width) packing.put(position, k, x[view][v]);
      });
    }
    product += dot<kVectors>(x[0], x[1]);
  }
  product = warp_sum(product);
  if (threadIdx.x % 32 == 0) positive[sample] = product;
}

template <typename Packing>
__device__ __forceinline__ int prepare_filler(int index, const Packing& packing) {
  const int position = packing.filler(index);
  const float zeros[4] = {};
  for (int k = 4 * (static_cast<int>(threadIdx.x) % 32); k < packing.width; k += 128) packing.put(position, k, zeros);
  return position;
}

// One warp per sample, and one per padding position. kVectors, aligned: see with_vectors.
template <typename T, typename Packing, int kVectors>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<kVectors>)
    prepare_forward_kernel(const T* __restrict__ z0, const T* __restrict__ z1, float* __restrict__ unit,
                           float* __restrict__ inv_norm, Packing packing, float* __restrict__ positive, bool aligned,
                           Params p) {
  follow_previous_kernel();
  const int sample = warp_index();
  if (sample >= p.samples) {
    if (sample < p.samples + packing.fillers()) prepare_filler(sample - p.samples, packing);
    return;
  }
  with_alignment<kVectors>(aligned, [&]<bool kAligned>() {
    prepare_sample<kVectors, kAligned>(z0, z1, sample, unit, inv_norm, packing, positive, p);
  });
}

// Returns the largest |upstream gradient| to every thread.
__device__ inline float largest_gradient(const Upstream& upstream, int anchors) {
  SCAN_FAST_SHARED(float, largest_of, 32);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (upstream.stride == 0) return fabsf(upstream.at(0));
  float largest = 0;
#pragma unroll 8
  for (int i = thread; i < anchors; i += threads) largest = fmaxf(largest, fabsf(upstream.at(i)));
  largest = warp_max(largest);
  if (thread % 32 == 0) largest_of[thread / 32] = largest;
  __syncthreads();
  largest = 0;
  for (int w = 0; w < threads / 32; ++w) {
    const float other = largest_of[w];
    largest = fmaxf(largest, other);
  }
  return largest;
}

constexpr int kLargestThreads = 1024;

// A single block, for so many anchors that a separate launch is cheaper.
__global__ void __launch_bounds__(kLargestThreads)
    largest_gradient_kernel(Upstream upstream, float* __restrict__ largest, Params p) {
  follow_previous_kernel();
  const float found = largest_gradient(upstream, p.anchors);
  if (threadIdx.x == 0) *largest = found;
}

// One warp per row: the operands again, weight_i (zero if row i is not an anchor), shift_i, and once 1 / (all scales)
// for the sums of W Z. If `largest` is null, the blocks find the largest gradient themselves.
template <typename Packing, int kVectors>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<kVectors>)
    prepare_backward_kernel(const float* __restrict__ unit, Upstream upstream, const float* __restrict__ shifted_lse,
                            const float* __restrict__ largest, Packing packing, float* __restrict__ weight,
                            float* __restrict__ shift, float* __restrict__ unscale, bool aligned, Params p) {
  follow_previous_kernel();
  const float most = largest == nullptr ? largest_gradient(upstream, p.anchors) : *largest;
  // Power of two that brings the largest |g| to [2^13, 2^14); kept within float32 for extreme gradients.
  const int of_most = static_cast<int>(__float_as_uint(most) >> 23) - 127;
  const int exponent = most > 0 && most < INFINITY ? max(-100, min(100, 13 - of_most)) : 0;
  const float factor = __int_as_float((127 + exponent) << 23);
  if (blockIdx.x == 0 && threadIdx.x == 0) *unscale = 1 / (factor * kOperandScale);
  const int row = warp_index(), lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= p.rows()) {
    if (row >= p.rows() + packing.fillers()) return;
    const int filler = prepare_filler(row - p.rows(), packing);
    if (lane == 0) weight[filler] = shift[filler] = 0;
    return;
  }
  const int position = packing.position(row);
  const bool anchor = row < p.anchors;
  const float lse = anchor ? shifted_lse[row] : 0.0f;
  const float g = anchor ? upstream.at(row) * factor : 0.0f;
  with_alignment<kVectors>(aligned, [&]<bool kAligned>() {
    for (int from = 0; from < (kVectors == 1 ? 1 : packing.width); from += 128 * kVectors) {
      RowPart<kVectors> x;
      load_part<kVectors, kAligned>(x, unit + static_cast<int64_t>(row) * p.dim, from, p.dim);
      for_vectors<kVectors>(from, [&](int v, int k) {
        if (k < packing.width) packing.put(position, k, x[v]);
      });
    }
  });
  if (lane == 0) {
    weight[position] = p.fixed_shift && anchor ? g * expf(-lse) : g;
    shift[position] = (lse + 1 / p.temperature) * kLog2E;
  }
}

}  // namespace
}  // namespace scan_fast
