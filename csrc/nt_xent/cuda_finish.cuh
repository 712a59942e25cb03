// Last kernels of NT-Xent: add up the partial results in order, then compute losses and gradients.
#pragma once

#include <cmath>

#include "nt_xent/cuda_common.cuh"
#include "nt_xent/cuda_forward.cuh"

namespace scan_fast {
namespace {

constexpr int kCollectRows = 32, kCollectParts = 8;  // rows per block, threads per row

// Outputs of a forward launch: the sums or maxima so far. After the last launch, a row's shift (maxima, in log2; 0 for
// a row without negatives), or its loss and its lse minus 1/tau.
struct Collected {
  float *running, *shift, *losses, *shifted_lse;
  const float* positive;  // (N) products of the two views' unit rows
  bool first, last;
};

template <Pass kPass, typename Schedule>
__global__ void __launch_bounds__(kCollectRows* kCollectParts)
    collect_kernel(const float* __restrict__ partial, Schedule schedule, Collected out, Params p) {
  SCAN_FAST_SHARED(float, parts, kCollectRows* kCollectParts);
  const int thread = static_cast<int>(threadIdx.x), part = thread / kCollectRows;
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kCollectRows + thread % kCollectRows;
  float sum = nothing<kPass>();
  if (local < schedule.anchors) {
    const int64_t filled = schedule.filled(local);
#pragma unroll 4
    for (int64_t k = part; k < filled; k += kCollectParts) {
      sum = combined<kPass>(sum, partial[schedule.filled_slot(local, k) * schedule.anchors + local]);
    }
  }
  parts[thread] = sum;
  __syncthreads();
  if (part != 0 || local >= schedule.anchors) return;
  for (int i = 1; i < kCollectParts; ++i) {
    const float other = parts[i * kCollectRows + thread];
    sum = combined<kPass>(sum, other);
  }
  if (!out.first) sum = combined<kPass>(out.running[local], sum);
  if (!out.last) {
    out.running[local] = sum;
  } else if constexpr (kPass == Pass::kMaxima) {
    out.shift[local] = sum == -INFINITY ? 0.0f : sum;
  } else {
    const float positive = out.positive[p.sample_begin + local % p.sample_count];
    const float shifted = (positive - 1) / p.temperature;
    const float above = kPass == Pass::kSums ? 0.0f : out.shift[local] * kLn2 - 1 / p.temperature;
    const float excess = logf(sum) + above - shifted;
    const float loss = excess > 0 ? excess + log1pf(expf(-excess)) : log1pf(expf(excess));
    out.losses[local] = loss;
    out.shifted_lse[local] = loss + shifted;
  }
}

// Computes du, the backward pass of the normalisation, and the gradient in dtype T, for the rows [begin, begin + rows)
// of this call. partial: (p.splits, rows, dim); its first split is overwritten.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    finish_backward_kernel(float* __restrict__ partial, const float* __restrict__ unit,
                           const float* __restrict__ inv_norm, const float* __restrict__ losses, Upstream upstream,
                           const float* __restrict__ unscale, T* __restrict__ grad_z0, T* __restrict__ grad_z1,
                           int64_t begin, int64_t rows, Params p) {
  const int64_t index = warp_index(), local = begin + index;
  if (index >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = p.global_row(local), other = p.positive(row);
  const int64_t first = row < other ? row : other, second = row < other ? other : row;
  float pull = upstream.at(first) * expm1f(-losses[first]);
  if (second < p.anchors) pull += upstream.at(second) * expm1f(-losses[second]);
  const float factor = *unscale;
  float radial = 0;
  for (int64_t k = lane; k < p.dim; k += 32) {
    float sum = 0;
#pragma unroll 4
    for (int64_t s = 0; s < p.splits; ++s) sum += partial[(s * rows + index) * p.dim + k];
    const float du = (sum * factor + pull * unit[other * p.dim + k]) / p.temperature;
    partial[index * p.dim + k] = du;
    radial += du * unit[row * p.dim + k];
  }
  radial = warp_sum(radial);
  // A row shorter than 1e-12 was divided by that constant, so there is no radial part to subtract.
  if (inv_norm[row] >= 1 / kMinNorm) radial = 0;
  T* out = local < p.sample_count ? grad_z0 + local * p.dim : grad_z1 + (local - p.sample_count) * p.dim;
  for (int64_t k = lane; k < p.dim; k += 32) {
    out[k] = from_float<T>((partial[index * p.dim + k] - radial * unit[row * p.dim + k]) * inv_norm[row]);
  }
}

}  // namespace
}  // namespace scan_fast
