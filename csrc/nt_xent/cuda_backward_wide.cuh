// Backward kernels of NT-Xent, portable, if dZ has too many dimensions for registers; see cuda_backward.cuh.
#pragma once

#include "nt_xent/cuda_backward.cuh"

namespace scan_fast {
namespace {

constexpr int kWideChunk = 64;  // dimensions (weights_kernel) or columns of W (gather_kernel) per stage
constexpr int kSlice = 128;     // dimensions of dZ per block of gather_kernel

// Rows [begin, begin + rows) of this call for which a launch computes W. W has `stride` columns, a multiple of 64.
struct WideRows {
  int begin, rows, stride;

  __host__ __device__ int row_tiles() const { return ceil_div(rows, kRows); }
  __host__ __device__ int64_t elements() const { return int64_t{row_tiles()} * kRows * stride; }
};

// weights: (parts, row tiles * 64, stride) float16. Grid: column tiles, splits of the row tiles.
template <bool kSplit, bool kFixedShift>
__global__ void __launch_bounds__(kThreads, 2)
    weights_kernel(const half_t* __restrict__ packed, const float* __restrict__ weight, const float* __restrict__ shift,
                   half_t* __restrict__ weights, WideRows wide, Params p) {
  const int first_column = static_cast<int>(blockIdx.x) * kColumns, tiles = wide.row_tiles();
  const int share = static_cast<int>(blockIdx.y), shares = static_cast<int>(gridDim.y);
  const int begin = static_cast<int>(int64_t{tiles} * share / shares);
  const int end = static_cast<int>(int64_t{tiles} * (share + 1) / shares);
  const auto row_of = [&](int tile, int r) {
    const int i = tile * kRows + r;
    return i < wide.rows ? p.global_row(wide.begin + i) : -1;
  };
  const auto column_of = [&](int r) { return first_column + r < p.rows() ? first_column + r : -1; };
  for_inner_tiles<kSplit, kColumns, kRows, kWideChunk, false>(
      packed, p, begin, end, column_of, row_of, [&](float (&s)[kRows / 32][kColumns / 16][4], int tile) {
        RowWeight of_row[kRows / 32][2];
#pragma unroll
        for (int m = 0; m < kRows / 32; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = row_of(tile, warp_row<kRows>() + 16 * m + fragment_row(h));
            of_row[m][h] = row_weight<kFixedShift>(row, weight, shift, p);
          }
        }
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
          RowWeight of_column[2];
          const int column = warp_column<kColumns>() + fragment_column(n, 0);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            of_column[c] = row_weight<kFixedShift>(column_of(column + c), weight, shift, p);
          }
#pragma unroll
          for (int m = 0; m < kRows / 32; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float x = weight_of<kFixedShift>(s[m][n][2 * h], of_row[m][h], of_column[0], p);
              const float y = weight_of<kFixedShift>(s[m][n][2 * h + 1], of_row[m][h], of_column[1], p);
              const int i = tile * kRows + warp_row<kRows>() + 16 * m + fragment_row(h);
              half_t* to = weights + int64_t{i} * wide.stride + first_column + column;
              const uint32_t hi = pack2<half_t>(x, y);
              st_global(to, hi);
              if constexpr (kSplit) {
                const float2 high = unpack2<half_t>(hi);
                st_global(to + wide.elements(), pack2<half_t>(x - high.x, y - high.y));
              }
            }
          }
        }
      });
}

template <bool kSplit>
constexpr size_t gather_bytes() {
  return 2 * (kRows + kSlice) * kWideChunk * (kSplit ? 2 : 1) * sizeof(half_t);
}

// partial (p.splits, rows, dim) = W Z, for 64 rows and 128 dimensions per block. Grid: row tiles, slices, column
// splits. The warps are arranged 2 x 2, with 32 rows by 64 dimensions each.
template <bool kSplit>
__global__ void __launch_bounds__(kThreads, 2)
    gather_kernel(const half_t* __restrict__ weights, const half_t* __restrict__ packed, float* __restrict__ partial,
                  WideRows wide, Params p) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  constexpr int kParts = kSplit ? 2 : 1, kWeights = kRows * kWideChunk, kStage = kParts * (kRows + kSlice) * kWideChunk;
  constexpr int kM = kRows / 32, kN = kSlice / 32;  // 16-row and 16-dimension products per warp
  const Shared<half_t> memory = dynamic.as<half_t>();
  const int first_row = static_cast<int>(blockIdx.x) * kRows, slice = static_cast<int>(blockIdx.y);
  const int chunks = wide.stride / kWideChunk, split = static_cast<int>(blockIdx.z);
  const int begin = chunks * split / p.splits, end = chunks * (split + 1) / p.splits;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_dim = warp_column<kSlice>();
  const int steps = steps_of<kSlice>(p, slice);
  const auto load = [&](int chunk) {
    const Shared<half_t> to = memory + (chunk - begin) % 2 * kStage;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kWideChunk / 8; i += kThreads) {
      const int r = i / (kWideChunk / 8), vector = i % (kWideChunk / 8);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const half_t* from =
            weights + part * wide.elements() + int64_t{first_row + r} * wide.stride + chunk * kWideChunk + vector * 8;
        cp_async_16((to + part * kWeights + tile_at<kWideChunk>(r, vector)).get(), from);
      }
    }
    load_tile<kSplit, kWideChunk, kSlice>(to + kParts * kWeights, packed, p, slice, [&](int r) {
      return chunk * kWideChunk + r < p.rows() ? chunk * kWideChunk + r : -1;
    });
  };
  float dz[kM][2 * kN][4] = {};
  if (begin < end) load(begin);
  cp_async_commit();
  for (int chunk = begin; chunk < end; ++chunk) {
    if (chunk + 1 < end) load(chunk + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const Shared<half_t> w_tile = memory + (chunk - begin) % 2 * kStage, z_tile = w_tile + kParts * kWeights;
#pragma unroll 1
    for (int k = 0; k < kWideChunk / 16; ++k) {
      uint32_t w[kM][kParts][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int at = tile_at<kWideChunk>(warp_row<kRows>() + 16 * m + lane % 16, 2 * k + lane / 16);
          ldmatrix_x4(w[m][part], (w_tile + part * kWeights + at).get());
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (warp_dim / 16 + n >= steps) break;
        const int at = tile_at<kSlice>(k * 16 + lane % 16, warp_dim / 8 + 2 * n + lane / 16);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, (z_tile + part * (kWideChunk * kSlice) + at).get());
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
#pragma unroll
            for (int m = 0; m < kM; ++m) {
              mma_16816<half_t>(dz[m][2 * n + h], w[m][0], half);
              if constexpr (kSplit) {
                if (part == 0) mma_16816<half_t>(dz[m][2 * n + h], w[m][1], half);
              }
            }
          }
        }
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = first_row + warp_row<kRows>() + 16 * m + fragment_row(r / 2);
        const int k = slice * kSlice + warp_dim + fragment_column(n, r);
        const int64_t at = int64_t{split} * wide.rows + row;
        if (row < wide.rows && k < p.dim) partial[at * p.dim + k] = dz[m][n][r];
      }
    }
  }
}

}  // namespace
}  // namespace scan_fast
