// NT-Xent on the GPU: sums of exponentials over the columns, portable form.
#pragma once

#include "nt_xent/cuda_tiles.cuh"

namespace scan_fast {
namespace {

template <bool kSplit>
__global__ void __launch_bounds__(kThreads, kSplit ? 2 : 3)
    forward_kernel(const half_t* __restrict__ packed, float* __restrict__ partial_max, float* __restrict__ partial_sum,
                   Params p) {
  int self[2], positive[2];
  float largest[2], sum[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t local = static_cast<int64_t>(blockIdx.x) * kRows + fragment_row(h);
    self[h] = local < p.local_rows ? static_cast<int>(p.global_row(local)) : 0;
    positive[h] = static_cast<int>(p.positive(self[h]));
    largest[h] = -INFINITY;
    sum[h] = 0;
  }
  const int column_end = static_cast<int>(p.rows());
  for_each_tile<kSplit>(packed, p, column_end, 0, [&](float(&s)[2 * kColumnSteps][4], int column,
                                                      const Shared<half_t>&) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int t = 0; t < 2 * kColumnSteps; ++t) {
#pragma unroll
        for (int r = 2 * h; r < 2 * h + 2; ++r) {
          const int j = column + fragment_column(t, r);
          s[t][r] = j == self[h] || j == positive[h] || j >= column_end ? -INFINITY : s[t][r] * p.scale;
          tile_max = fmaxf(tile_max, s[t][r]);
        }
      }
      tile_max = fmaxf(largest[h], tile_max);
      // Any finite shift serves where nothing counts yet.
      const float shift = tile_max == -INFINITY ? 0.0f : tile_max;
      float tile_sum = 0;
#pragma unroll
      for (int t = 0; t < 2 * kColumnSteps; ++t) {
        tile_sum += exp2_approx(s[t][2 * h] - shift) + exp2_approx(s[t][2 * h + 1] - shift);
      }
      sum[h] = (sum[h] == 0 ? 0.0f : sum[h] * exp2_approx(largest[h] - shift)) + tile_sum;
      largest[h] = tile_max;
    }
  });
  // The four lanes that share a row, in a fixed order.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float row_max = largest[h];
    row_max = fmaxf(row_max, __shfl_xor_sync(kFullMask, row_max, 1));
    row_max = fmaxf(row_max, __shfl_xor_sync(kFullMask, row_max, 2));
    const float shift = row_max == -INFINITY ? 0.0f : row_max;
    float row_sum = sum[h] == 0 ? 0.0f : sum[h] * exp2f(largest[h] - shift);
    row_sum += __shfl_xor_sync(kFullMask, row_sum, 1);
    row_sum += __shfl_xor_sync(kFullMask, row_sum, 2);
    const int64_t local = static_cast<int64_t>(blockIdx.x) * kRows + fragment_row(h);
    if (threadIdx.x % 4 == 0 && local < p.local_rows) {
      partial_max[blockIdx.y * p.local_rows + local] = row_max;
      partial_sum[blockIdx.y * p.local_rows + local] = row_sum;
    }
  }
}

}  // namespace
}  // namespace scan_fast
