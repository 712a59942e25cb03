// NT-Xent on the GPU: dZ += W Z, portable form.
#pragma once

#include "nt_xent/cuda_tiles.cuh"

namespace scan_fast {
namespace {

template <bool kSplit, bool kFixedShift>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const half_t* __restrict__ packed, const float* __restrict__ weight,
                    const float* __restrict__ shift, float* __restrict__ partial, Params p) {
  const int64_t first_local = static_cast<int64_t>(blockIdx.x) * kRows, slice = blockIdx.z;
  int self[2], positive[2];
  float row_weight[2], row_shift[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t local = first_local + fragment_row(h);
    const bool exists = local < p.local_rows;
    self[h] = exists ? static_cast<int>(p.global_row(local)) : 0;
    positive[h] = static_cast<int>(p.positive(self[h]));
    row_weight[h] = exists ? weight[self[h]] : 0.0f;
    row_shift[h] = exists ? shift[self[h]] : 0.0f;
  }
  float dz[2 * kChunkSteps][4] = {};
  const int64_t slice_left = p.padded - slice * kChunk;
  const int slice_steps = static_cast<int>(slice_left < kChunk ? (slice_left + 15) / 16 : kChunkSteps);
  // Rows of the second view that are no anchors meet weights only in the columns of the first.
  const bool first_view_only = first_local >= p.sample_count && p.anchors < p.rows();
  const int column_end = static_cast<int>(first_view_only ? p.samples : p.rows());
  for_each_tile<kSplit>(packed, p, column_end, slice, [&](float(&s)[2 * kColumnSteps][4], int column,
                                                          const Shared<half_t>& b_tile) {
#pragma unroll
    for (int t = 0; t < 2 * kColumnSteps; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = column + fragment_column(t, c);
        const bool exists = j < column_end;
        const float column_weight = exists ? weight[j] : 0.0f;
        const float column_shift = kFixedShift || !exists ? 0.0f : shift[j];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& value = s[t][2 * h + c];
          const bool counts = exists && j != self[h] && j != positive[h];
          float w;
          if constexpr (kFixedShift) {
            w = exp2_approx((value - kOperandScale * kOperandScale) * p.scale) * (row_weight[h] + column_weight);
          } else {
            // Probabilities: at tiny temperatures the rounding of s alone could lift their logarithms above zero.
            const float by_row = value * p.scale - row_shift[h], by_column = value * p.scale - column_shift;
            w = exp2_approx(by_row > 0 ? 0.0f : by_row) * row_weight[h] +
                exp2_approx(by_column > 0 ? 0.0f : by_column) * column_weight;
          }
          value = counts ? w : 0.0f;
        }
      }
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < kColumnSteps; ++j) {
      uint32_t w[kSplit ? 2 : 1][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float x = s[2 * j + q / 2][q % 2 * 2], y = s[2 * j + q / 2][q % 2 * 2 + 1];
        w[0][q] = pack2<half_t>(x, y);
        if constexpr (kSplit) {
          const float2 high = unpack2<half_t>(w[0][q]);
          w[1][q] = pack2<half_t>(x - high.x, y - high.y);
        }
      }
#pragma unroll
      for (int n = 0; n < kChunkSteps; ++n) {
        if (n >= slice_steps) break;
        const int b_at = tile_at(j * 16 + lane % 16, 2 * n + lane / 16);
        uint32_t b[4];
        ldmatrix_x4_trans(b, (b_tile + b_at).get());
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
          mma_16816<half_t>(dz[2 * n + h], w[0], half);
          if constexpr (kSplit) mma_16816<half_t>(dz[2 * n + h], w[1], half);
        }
        if constexpr (kSplit) {
          ldmatrix_x4_trans(b, (b_tile + kTile + b_at).get());
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
            mma_16816<half_t>(dz[2 * n + h], w[0], half);
          }
        }
      }
    }
  });
#pragma unroll
  for (int t = 0; t < 2 * kChunkSteps; ++t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t local = first_local + fragment_row(r / 2), k = slice * kChunk + fragment_column(t, r);
      if (local < p.local_rows && k < p.dim) partial[(blockIdx.y * p.local_rows + local) * p.dim + k] = dz[t][r];
    }
  }
}

}  // namespace
}  // namespace scan_fast
