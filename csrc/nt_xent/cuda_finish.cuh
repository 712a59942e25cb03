// NT-Xent on the GPU: the per-row kernels that add the parts of the main kernels in order and finish. One warp per row.
#pragma once

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

__device__ inline float row_dot(const float* __restrict__ x, const float* __restrict__ y, int64_t dim) {
  float sum = 0;
  for (int64_t k = static_cast<int>(threadIdx.x) % 32; k < dim; k += 32) sum += x[k] * y[k];
  return warp_sum(sum);
}

// From the parts' maxima and sums over the negatives (in log2) to the loss and the lse less 1/tau.
__global__ void __launch_bounds__(kRowThreads)
    finish_forward_kernel(const float* __restrict__ partial_max, const float* __restrict__ partial_sum,
                          const float* __restrict__ unit, float* __restrict__ losses, float* __restrict__ shifted_lse,
                          Params p) {
  const int64_t local = warp_row();
  if (local >= p.local_rows) return;
  float largest = -INFINITY;
  for (int64_t s = 0; s < p.splits; ++s) largest = fmaxf(largest, partial_max[s * p.local_rows + local]);
  const float shift = largest == -INFINITY ? 0.0f : largest;
  float sum = 0;
  for (int64_t s = 0; s < p.splits; ++s) {
    const float part = partial_sum[s * p.local_rows + local];
    // A part without negatives has maximum -infinity and sum zero.
    sum += part == 0 ? 0.0f : part * exp2f(partial_max[s * p.local_rows + local] - shift);
  }
  const int64_t row = p.global_row(local);
  const float positive = row_dot(unit + row * p.dim, unit + p.positive(row) * p.dim, p.dim);
  if (static_cast<int>(threadIdx.x) % 32 != 0) return;
  const float shifted = (positive - 1) / p.temperature;
  const float negatives = logf(sum) + (shift * kLn2 - 1 / p.temperature);
  const float excess = negatives - shifted;
  const float loss = excess > 0 ? excess + log1pf(expf(-excess)) : log1pf(expf(excess));
  losses[local] = loss;
  shifted_lse[local] = loss + shifted;
}

// du, the normalise backward, and the output type.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    finish_backward_kernel(const float* __restrict__ partial, const float* __restrict__ unit,
                           const float* __restrict__ inv_norm, const float* __restrict__ losses,
                           const float* __restrict__ grad_losses, const float* __restrict__ unscale,
                           T* __restrict__ grad_z0, T* __restrict__ grad_z1, Params p) {
  const int64_t local = warp_row();
  if (local >= p.local_rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = p.global_row(local), other = p.positive(row);
  const int64_t first = row < other ? row : other, second = row < other ? other : row;
  float pull = grad_losses[first] * expm1f(-losses[first]);
  if (second < p.anchors) pull += grad_losses[second] * expm1f(-losses[second]);
  const float factor = *unscale;
  const auto du = [&](int64_t k) {
    float sum = 0;
    for (int64_t s = 0; s < p.splits; ++s) sum += partial[(s * p.local_rows + local) * p.dim + k];
    return (sum * factor + pull * unit[other * p.dim + k]) / p.temperature;
  };
  float radial = 0;
  for (int64_t k = lane; k < p.dim; k += 32) radial += du(k) * unit[row * p.dim + k];
  radial = warp_sum(radial);
  // A row shorter than 1e-12 was divided by that constant, so nothing is projected out.
  if (inv_norm[row] >= 1 / kMinNorm) radial = 0;
  T* out = local < p.sample_count ? grad_z0 + local * p.dim : grad_z1 + (local - p.sample_count) * p.dim;
  for (int64_t k = lane; k < p.dim; k += 32) {
    out[k] = from_float<T>((du(k) - radial * unit[row * p.dim + k]) * inv_norm[row]);
  }
}

}  // namespace
}  // namespace scan_fast
