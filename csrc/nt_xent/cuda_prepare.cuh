// NT-Xent on the GPU: the per-row kernels before the products. One warp per row.
#pragma once

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    normalize_kernel(const T* __restrict__ z0, const T* __restrict__ z1, float* __restrict__ unit,
                     float* __restrict__ inv_norm, Params p) {
  const int64_t row = warp_row();
  if (row >= p.rows()) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T* x = row < p.samples ? z0 + row * p.dim : z1 + (row - p.samples) * p.dim;
  // Scaled by the largest element, so that neither huge nor tiny rows lose their direction.
  float largest = 0;
  for (int64_t k = lane; k < p.dim; k += 32) largest = fmaxf(largest, fabsf(to_float(x[k])));
  largest = warp_max(largest);
  float sum = 0;
  for (int64_t k = lane; k < p.dim; k += 32) {
    const float value = largest > 0 ? to_float(x[k]) / largest : to_float(x[k]);
    sum += value * value;
  }
  const float root = sqrtf(warp_sum(sum));
  // norm = largest * root may leave float32's range although every quotient below is within it.
  const bool short_row = largest * root < kMinNorm;
  for (int64_t k = lane; k < p.dim; k += 32) {
    const float value = to_float(x[k]);
    unit[row * p.dim + k] = short_row ? value / kMinNorm : value / largest / root;
  }
  if (lane == 0) inv_norm[row] = short_row ? 1 / kMinNorm : 1 / largest / root;
}

// hi (and lo) of the scaled unit rows, padded with zeros to a multiple of 8.
template <bool kSplit>
__global__ void __launch_bounds__(kRowThreads)
    pack_kernel(const float* __restrict__ unit, half_t* __restrict__ packed, Params p) {
  const int64_t row = warp_row();
  if (row >= p.rows()) return;
  for (int64_t k = static_cast<int>(threadIdx.x) % 32; k < p.padded; k += 32) {
    const float value = k < p.dim ? unit[row * p.dim + k] * kOperandScale : 0.0f;
    const half_t hi = from_float<half_t>(value);
    packed[row * p.padded + k] = hi;
    if (kSplit) packed[(p.rows() + row) * p.padded + k] = from_float<half_t>(value - to_float(hi));
  }
}

// One block: weight_i (zero for rows that are no anchors), shift_i, and 1 / (all scales) for the sums of W Z.
__global__ void __launch_bounds__(1024)
    weights_kernel(const float* __restrict__ grad_losses, const float* __restrict__ shifted_lse,
                   float* __restrict__ weight, float* __restrict__ shift, float* __restrict__ unscale, Params p) {
  SCAN_FAST_SHARED(float, largest_of, 32);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float largest = 0;
  for (int64_t i = thread; i < p.anchors; i += threads) largest = fmaxf(largest, fabsf(grad_losses[i]));
  largest = warp_max(largest);
  if (thread % 32 == 0) largest_of[thread / 32] = largest;
  __syncthreads();
  largest = 0;
  for (int w = 0; w < threads / 32; ++w) {
    const float other = largest_of[w];
    largest = fmaxf(largest, other);
  }
  // The power of two that brings the largest |g| to [2^13, 2^14); kept within float32 for extreme gradients.
  const int exponent = largest > 0 && largest < INFINITY ? max(-100, min(100, 13 - ilogbf(largest))) : 0;
  const float factor = ldexpf(1.0f, exponent);
  for (int64_t i = thread; i < p.rows(); i += threads) {
    const bool anchor = i < p.anchors;
    const float lse = anchor ? shifted_lse[i] : 0.0f;
    const float g = anchor ? grad_losses[i] * factor : 0.0f;
    weight[i] = p.fixed_shift && anchor ? g * expf(-lse) : g;
    shift[i] = (lse + 1 / p.temperature) * kLog2E;
  }
  if (thread == 0) *unscale = 1 / (factor * kOperandScale);
}

}  // namespace
}  // namespace scan_fast
