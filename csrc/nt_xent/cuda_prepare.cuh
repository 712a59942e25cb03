// First kernels of NT-Xent. Forward: unit rows, operands, similarities of the positive pairs. Backward: the operands
// again, and a weight and a shift per row.
#pragma once

#include <cmath>

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

// Operand layout of the portable kernels: (parts, 2N, width), in the order of rows.
template <bool kSplit>
struct RowMajor {
  half_t* packed;
  int64_t width, low;  // low: offset from hi to lo, in elements

  RowMajor(half_t* packed_, const Params& p) : packed(packed_), width(p.padded), low(p.rows() * p.padded) {}
  __device__ __forceinline__ int64_t position(int64_t row) const { return row; }
  __device__ __forceinline__ half_t* row_at(int64_t position) const { return packed + position * width; }
  // Stores hi (and lo) of an element of a unit row.
  __device__ __forceinline__ void put(half_t* row, int64_t k, float unit) const {
    const float value = unit * kOperandScale;
    const half_t hi = from_float<half_t>(value);
    row[k] = hi;
    if constexpr (kSplit) row[low + k] = from_float<half_t>(value - to_float(hi));
  }
  // Padding positions, which must be zeroed.
  __host__ __device__ int64_t fillers() const { return 0; }
  __device__ __forceinline__ int64_t filler(int64_t) const { return 0; }
};

template <typename T, typename Packing>
__device__ __forceinline__ void prepare_row(const T* __restrict__ x, int64_t row, float* __restrict__ unit,
                                            float* __restrict__ inv_norm, Packing packing, const Params& p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Scale by the largest element, so that neither huge nor tiny rows lose their direction.
  float largest = 0;
  for (int64_t k = lane; k < p.dim; k += 32) largest = fmaxf(largest, fabsf(to_float(x[k])));
  largest = warp_max(largest);
  float sum = 0;
  for (int64_t k = lane; k < p.dim; k += 32) {
    const float value = largest > 0 ? to_float(x[k]) / largest : to_float(x[k]);
    sum += value * value;
  }
  const float root = sqrtf(warp_sum(sum));
  // norm = largest * root may be out of float32's range, although every quotient below is within it.
  const bool short_row = largest * root < kMinNorm;
  const auto operand = packing.row_at(packing.position(row));
  for (int64_t k = lane; k < packing.width; k += 32) {
    float value = 0;
    if (k < p.dim) {
      const float element = to_float(x[k]);
      value = short_row ? element / kMinNorm : element / largest / root;
      unit[row * p.dim + k] = value;
    }
    packing.put(operand, k, value);
  }
  if (lane == 0) inv_norm[row] = short_row ? 1 / kMinNorm : 1 / largest / root;
}

template <typename Packing>
__device__ __forceinline__ int64_t prepare_filler(int64_t index, Packing packing) {
  const int64_t position = packing.filler(index);
  const auto operand = packing.row_at(position);
  for (int64_t k = static_cast<int>(threadIdx.x) % 32; k < packing.width; k += 32) packing.put(operand, k, 0.0f);
  return position;
}

// One warp per sample: unit rows and operands of both views, and their product in float32. One warp per padding
// position.
template <typename T, typename Packing>
__global__ void __launch_bounds__(kRowThreads)
    prepare_forward_kernel(const T* __restrict__ z0, const T* __restrict__ z1, float* __restrict__ unit,
                           float* __restrict__ inv_norm, Packing packing, float* __restrict__ positive, Params p) {
  const int64_t sample = warp_index();
  if (sample >= p.samples) {
    if (sample < p.samples + packing.fillers()) prepare_filler(sample - p.samples, packing);
    return;
  }
  prepare_row(z0 + sample * p.dim, sample, unit, inv_norm, packing, p);
  prepare_row(z1 + sample * p.dim, p.samples + sample, unit, inv_norm, packing, p);
  float sum = 0;
  // Each lane reads only what it wrote itself.
  for (int64_t k = static_cast<int>(threadIdx.x) % 32; k < p.dim; k += 32) {
    sum += unit[sample * p.dim + k] * unit[(p.samples + sample) * p.dim + k];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) positive[sample] = sum;
}

// Returns the largest |upstream gradient| to every thread.
__device__ inline float largest_gradient(const Upstream& upstream, int64_t anchors) {
  SCAN_FAST_SHARED(float, largest_of, 32);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (upstream.stride == 0) return fabsf(upstream.at(0));
  float largest = 0;
#pragma unroll 8
  for (int64_t i = thread; i < anchors; i += threads) largest = fmaxf(largest, fabsf(upstream.at(i)));
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
  const float found = largest_gradient(upstream, p.anchors);
  if (threadIdx.x == 0) *largest = found;
}

// One warp per row: the operands again, weight_i (zero if row i is not an anchor), shift_i, and once 1 / (all scales)
// for the sums of W Z. If `largest` is null, the blocks find the largest gradient themselves.
template <typename Packing>
__global__ void __launch_bounds__(kRowThreads)
    prepare_backward_kernel(const float* __restrict__ unit, Upstream upstream, const float* __restrict__ shifted_lse,
                            const float* __restrict__ largest, Packing packing, float* __restrict__ weight,
                            float* __restrict__ shift, float* __restrict__ unscale, Params p) {
  const float most = largest == nullptr ? largest_gradient(upstream, p.anchors) : *largest;
  // Power of two that brings the largest |g| to [2^13, 2^14); kept within float32 for extreme gradients.
  const int exponent = most > 0 && most < INFINITY ? max(-100, min(100, 13 - ilogbf(most))) : 0;
  const float factor = ldexpf(1.0f, exponent);
  if (blockIdx.x == 0 && threadIdx.x == 0) *unscale = 1 / (factor * kOperandScale);
  const int64_t row = warp_index();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= p.rows()) {
    if (row >= p.rows() + packing.fillers()) return;
    const int64_t filler = prepare_filler(row - p.rows(), packing);
    if (lane == 0) weight[filler] = shift[filler] = 0;
    return;
  }
  const int64_t position = packing.position(row);
  const auto operand = packing.row_at(position);
  for (int64_t k = lane; k < packing.width; k += 32) {
    packing.put(operand, k, k < p.dim ? unit[row * p.dim + k] : 0.0f);
  }
  if (lane == 0) {
    const bool anchor = row < p.anchors;
    const float lse = anchor ? shifted_lse[row] : 0.0f;
    const float g = anchor ? upstream.at(row) * factor : 0.0f;
    weight[position] = p.fixed_shift && anchor ? g * expf(-lse) : g;
    shift[position] = (lse + 1 / p.temperature) * kLog2E;
  }
}

}  // namespace
}  // namespace scan_fast
