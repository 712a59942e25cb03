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
  follow_previous_kernel();
  SCAN_FAST_SHARED(float, parts, kCollectRows* kCollectParts);
  const int thread = static_cast<int>(threadIdx.x), part = thread / kCollectRows;
  const int local = static_cast<int>(blockIdx.x) * kCollectRows + thread % kCollectRows;
  float sum = nothing<kPass>(), positive = 0;
  if (local < schedule.anchors) {
    if (kPass != Pass::kMaxima && part == 0) {
      positive = out.positive[p.sample_begin + (local < p.sample_count ? local : local - p.sample_count)];
    }
    const int outer = local / schedule.outer_width, transposed = schedule.transposed_slots(outer);
    const int filled = transposed + schedule.own_segments(outer);
#pragma unroll 4
    for (int k = part; k < filled; k += kCollectParts) {
      const int slot = k < transposed ? schedule.segment_slots + k : k - transposed;
      sum = combined<kPass>(sum, partial[slot_at(slot, schedule.anchors, local)]);
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
    const float shifted = (positive - 1) / p.temperature;
    const float above = kPass == Pass::kSums ? 0.0f : out.shift[local] * kLn2 - 1 / p.temperature;
    const float excess = logf(sum) + above - shifted;
    const float loss = excess > 0 ? excess + log1pf(expf(-excess)) : log1pf(expf(excess));
    out.losses[local] = loss;
    out.shifted_lse[local] = loss + shifted;
  }
}

// Rows [begin, begin + rows) of a call, for which partial (splits, rows, dim) holds sums of W Z.
struct FinishedRows {
  int begin, rows;
};

template <int kVectors, bool kAligned, typename T>
__device__ __forceinline__ void finish_row(const float* __restrict__ partial, const float* __restrict__ unit, int row,
                                           int index, int rows, float factor, float pull, float inv_norm,
                                           T* __restrict__ out, const Params& p) {
  constexpr int kPart = 128 * kVectors;
  const bool whole = kVectors == 1 || p.dim <= kPart;
  const int end = whole ? 1 : p.dim;
  const float inverse_temperature = 1 / p.temperature;
  RowPart<kVectors> du, of_row;
  const auto sum_up = [&](int from) {
    RowPart<kVectors> of_positive;
    load_part<kVectors, kAligned>(of_row, unit + static_cast<int64_t>(row) * p.dim, from, p.dim);
    load_part<kVectors, kAligned>(of_positive, unit + static_cast<int64_t>(p.positive(row)) * p.dim, from, p.dim);
    load_part<kVectors, kAligned>(du, partial + static_cast<int64_t>(index) * p.dim, from, p.dim);
#pragma unroll(kVectors == 1 ? 4 : 1)
    for (int s = 1; s < p.splits; ++s) {
      RowPart<kVectors> x;
      load_part<kVectors, kAligned>(x, partial + (static_cast<int64_t>(s) * rows + index) * p.dim, from, p.dim);
      for_values<kVectors>([&](int v, int i) { du[v][i] += x[v][i]; });
    }
    for_values<kVectors>(
        [&](int v, int i) { du[v][i] = (du[v][i] * factor + pull * of_positive[v][i]) * inverse_temperature; });
  };
  float radial = 0;
  for (int from = 0; from < end; from += kPart) {
    sum_up(from);
    radial += dot<kVectors>(du, of_row);
  }
  radial = warp_sum(radial);
  // A row shorter than 1e-12 was divided by that constant, so there is no radial part to subtract.
  if (inv_norm >= 1 / kMinNorm) radial = 0;
  for (int from = 0; from < end; from += kPart) {
    if (!whole) sum_up(from);
    for_values<kVectors>([&](int v, int i) { du[v][i] = (du[v][i] - radial * of_row[v][i]) * inv_norm; });
    store_part<kVectors, kAligned>(out, du, from, p.dim);
  }
}

// Computes du, the backward pass of the normalisation, and the gradient in dtype T. One warp per row.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<kVectors>)
    finish_backward_kernel(const float* __restrict__ partial, const float* __restrict__ unit,
                           const float* __restrict__ inv_norm, const float* __restrict__ losses, Upstream upstream,
                           const float* __restrict__ unscale, T* __restrict__ grad_z0, T* __restrict__ grad_z1,
                           FinishedRows finished, bool aligned, Params p) {
  follow_previous_kernel();
  const int index = warp_index(), local = finished.begin + index;
  if (index >= finished.rows) return;
  const int row = p.global_row(local), other = p.positive(row);
  const int first = min(row, other), second = max(row, other);
  float pull = upstream.at(first) * expm1f(-losses[first]);
  if (second < p.anchors) pull += upstream.at(second) * expm1f(-losses[second]);
  T* const out = local < p.sample_count ? grad_z0 + static_cast<int64_t>(local) * p.dim
                                        : grad_z1 + static_cast<int64_t>(local - p.sample_count) * p.dim;
  with_alignment<kVectors>(aligned, [&]<bool kAligned>() {
    finish_row<kVectors, kAligned>(partial, unit, row, index, finished.rows, *unscale, pull, inv_norm[row], out, p);
  });
}

}  // namespace
}  // namespace scan_fast
