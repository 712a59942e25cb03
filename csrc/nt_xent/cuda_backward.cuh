// Backward kernel of NT-Xent, portable: W, the weights of the similarities' gradients, and dZ += W Z.
//
// Up to kNarrow dimensions one kernel does both. A block handles 64 rows (16 per warp) and iterates over tiles of 64
// columns. The similarities of a tile stay in registers and become W there. W is repacked from the accumulator layout
// to that of a left operand and multiplied with the same shared tile, read transposed. With more dimensions, the
// similarities would have to be recomputed for every slice of dZ that fits into registers. Instead, weights_kernel
// writes W for some rows to memory as operands, and gather_kernel multiplies.
#pragma once

#include <cmath>

#include "nt_xent/cuda_tiles.cuh"

namespace scan_fast {
namespace {

constexpr int kNarrow = 128;
constexpr int kRows = 64, kColumns = 64;

// Inputs of an element of W, besides the similarity.
struct RowWeight {
  int row, positive;
  float weight, shift;
};

// p.scale converts `value`, a product of operands, to log2(exp(s)).
template <bool kFixedShift>
__device__ __forceinline__ float weight_of(float value, const RowWeight& i, const RowWeight& j, const Params& p) {
  if (j.row < 0 || i.row == j.row || i.positive == j.row) return 0.0f;
  if constexpr (kFixedShift) {
    return exp2_approx((value - kOperandScale * kOperandScale) * p.scale) * (i.weight + j.weight);
  } else {
    // Clamped because these are probabilities: at tiny temperatures the rounding of s alone could lift their logarithms
    // above zero.
    const float by_i = value * p.scale - i.shift, by_j = value * p.scale - j.shift;
    return exp2_approx(by_i > 0 ? 0.0f : by_i) * i.weight + exp2_approx(by_j > 0 ? 0.0f : by_j) * j.weight;
  }
}

// Weight of a row of [z0; z1]; row -1 means no row.
template <bool kFixedShift>
__device__ __forceinline__ RowWeight row_weight(int row, const float* __restrict__ weight,
                                                const float* __restrict__ shift, const Params& p) {
  RowWeight found{row, -1, 0.0f, 0.0f};
  if (row >= 0) {
    found.positive = p.positive(row);
    found.weight = weight[row];
    if constexpr (!kFixedShift) found.shift = shift[row];
  }
  return found;
}

// ---- up to kNarrow dimensions ---------------------------------------------------------------------------------------

template <bool kSplit>
constexpr size_t backward_bytes() {
  return (kRows + 2 * kColumns) * kNarrow * (kSplit ? 2 : 1) * sizeof(half_t);
}

template <bool kSplit, bool kFixedShift>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const half_t* __restrict__ packed, const float* __restrict__ weight,
                    const float* __restrict__ shift, float* __restrict__ partial, Params p) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  constexpr int kParts = kSplit ? 2 : 1, kSteps = kNarrow / 16, kTile = kColumns * kNarrow;
  const Shared<half_t> a_tile = dynamic.as<half_t>(), b_tiles = a_tile + kParts * kTile;
  const int first_local = static_cast<int>(blockIdx.x) * kRows;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_rows = static_cast<int>(threadIdx.x) / 32 * 16;
  RowWeight of_row[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int local = first_local + warp_rows + fragment_row(h);
    of_row[h] = row_weight<kFixedShift>(local < p.local_rows ? p.global_row(local) : -1, weight, shift, p);
  }
  float dz[2 * kSteps][4] = {};
  const int steps = steps_of<kNarrow>(p, 0);
  // Rows of the second view that are not anchors have non-zero weights only in the columns of the first view.
  const bool first_view_only = first_local >= p.sample_count && p.anchors < p.rows();
  const int column_end = first_view_only ? p.samples : p.rows();
  const int tiles = ceil_div(column_end, kColumns), split = static_cast<int>(blockIdx.y);
  const int begin = tiles * split / p.splits, end = tiles * (split + 1) / p.splits;
  const auto load_columns = [&](int tile) {
    load_tile<kSplit, kColumns, kNarrow>(b_tiles + (tile - begin) % 2 * (kParts * kTile), packed, p, 0, [&](int r) {
      return tile * kColumns + r < p.rows() ? tile * kColumns + r : -1;
    });
  };
  if (begin < end) {
    load_tile<kSplit, kRows, kNarrow>(a_tile, packed, p, 0, [&](int r) {
      return first_local + r < p.local_rows ? p.global_row(first_local + r) : -1;
    });
    load_columns(begin);
  }
  cp_async_commit();
  for (int tile = begin; tile < end; ++tile) {
    if (tile + 1 < end) load_columns(tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const Shared<half_t> b_tile = b_tiles + (tile - begin) % 2 * (kParts * kTile);
    float s[1][kColumns / 8][4] = {};
    add_products<kSplit, 1, kColumns / 16, kRows, kColumns, kNarrow>(s, a_tile, warp_rows, b_tile, 0, steps);
#pragma unroll
    for (int t = 0; t < kColumns / 8; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = tile * kColumns + fragment_column(t, c);
        const RowWeight of_column = row_weight<kFixedShift>(j < column_end ? j : -1, weight, shift, p);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          s[0][t][2 * h + c] = weight_of<kFixedShift>(s[0][t][2 * h + c], of_row[h], of_column, p);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t w[kParts][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float x = s[0][2 * j + q / 2][q % 2 * 2], y = s[0][2 * j + q / 2][q % 2 * 2 + 1];
        w[0][q] = pack2<half_t>(x, y);
        if constexpr (kSplit) {
          const float2 high = unpack2<half_t>(w[0][q]);
          w[1][q] = pack2<half_t>(x - high.x, y - high.y);
        }
      }
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        if (n >= steps) break;
        const int b_at = tile_at<kNarrow>(j * 16 + lane % 16, 2 * n + lane / 16);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, (b_tile + part * kTile + b_at).get());
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
            mma_16816<half_t>(dz[2 * n + h], w[0], half);
            if constexpr (kSplit) {
              if (part == 0) mma_16816<half_t>(dz[2 * n + h], w[1], half);
            }
          }
        }
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();
#pragma unroll
  for (int t = 0; t < 2 * kSteps; ++t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int local = first_local + warp_rows + fragment_row(r / 2), k = fragment_column(t, r);
      const int64_t at = int64_t{split} * p.local_rows + local;
      if (local < p.local_rows && k < p.dim) partial[at * p.dim + k] = dz[t][r];
    }
  }
}

}  // namespace
}  // namespace scan_fast
