// NT-Xent on the GPU: tiles of operands in shared memory and their products, portable form (mma.sync, cp.async).
#pragma once

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

constexpr int kRows = 64, kColumns = 64, kChunk = 128, kThreads = 128;
constexpr int kPieces = kChunk / 8;  // 16-byte pieces of a tile's row
constexpr int kTile = kRows * kChunk;
constexpr int kColumnSteps = kColumns / 16, kChunkSteps = kChunk / 16;

// Where a row's piece lies in a tile: eight rows that ldmatrix reads together lie in distinct banks.
__device__ __forceinline__ int tile_at(int row, int piece) { return row * kChunk + (piece ^ (row % 8)) * 8; }

// Copies 64 rows of one chunk, hi and (kSplit) lo, into a tile; rows and dimensions that do not exist become zeros.
// row_of(r) gives the global row of tile row r, or -1.
template <bool kSplit, typename RowOf>
__device__ __forceinline__ void load_tile(const Shared<half_t>& tile, const half_t* __restrict__ packed,
                                          const Params& p, int64_t chunk, RowOf row_of) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
    const int r = i / kPieces, piece = i % kPieces;
    const int64_t row = row_of(r), k = chunk * kChunk + piece * 8;
    const bool exists = row >= 0 && k < p.padded;
#pragma unroll
    for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
      const half_t* from = exists ? packed + (part * p.rows() + row) * p.padded + k : packed;
      cp_async_16((tile + part * kTile + tile_at(r, piece)).get(), from, exists ? 16 : 0);
    }
  }
}

// s (16 rows of this warp x 64 columns) += A B^T over one chunk.
template <bool kSplit>
__device__ __forceinline__ void add_products(float (&s)[2 * kColumnSteps][4], const Shared<half_t>& a_tile,
                                             const Shared<half_t>& b_tile, int steps) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int k = 0; k < steps; ++k) {
    const int a_at = tile_at(warp * 16 + lane % 16, 2 * k + lane / 16);
    const int b_at = tile_at(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
    uint32_t a[kSplit ? 2 : 1][4];
#pragma unroll
    for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
      ldmatrix_x4(a[part], (a_tile + part * kTile + a_at).get());
    }
#pragma unroll
    for (int j = 0; j < kColumnSteps; ++j) {
      uint32_t b[4];
      ldmatrix_x4(b, (b_tile + b_at + j * 16 * kChunk).get());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
        mma_16816<half_t>(s[2 * j + h], a[0], half);
        if constexpr (kSplit) mma_16816<half_t>(s[2 * j + h], a[1], half);
      }
      if constexpr (kSplit) {
        ldmatrix_x4(b, (b_tile + kTile + b_at + j * 16 * kChunk).get());
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
          mma_16816<half_t>(s[2 * j + h], a[0], half);
        }
      }
    }
  }
}

// Calls consume(s, column, b_tile) for each of this block's column tiles; s holds operand products, b_tile the chunk
// `last_chunk` of the tile's rows. Every thread takes part. The columns [0, column_end) are divided over grid.y.
template <bool kSplit, typename Consume>
__device__ __forceinline__ void for_each_tile(const half_t* __restrict__ packed, const Params& p, int64_t column_end,
                                              int64_t last_chunk, Consume consume) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  constexpr int kOperand = (kSplit ? 2 : 1) * kTile;
  const Shared<half_t> a_tile = dynamic.as<half_t>(), b_tiles = a_tile + kOperand;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t chunks = (p.dim + kChunk - 1) / kChunk;
  const int64_t tiles = (column_end + kColumns - 1) / kColumns;
  const int64_t begin = tiles * blockIdx.y / p.splits, end = tiles * (blockIdx.y + 1) / p.splits;
  const auto load_rows = [&](int64_t chunk) {
    load_tile<kSplit>(a_tile, packed, p, chunk, [&](int r) {
      return first_row + r < p.local_rows ? p.global_row(first_row + r) : static_cast<int64_t>(-1);
    });
  };
  const auto load_columns = [&](int64_t tile, int64_t chunk, const Shared<half_t>& to) {
    load_tile<kSplit>(to, packed, p, chunk, [&](int r) {
      return tile * kColumns + r < p.rows() ? tile * kColumns + r : static_cast<int64_t>(-1);
    });
  };
  const auto steps_of = [&](int64_t chunk) {
    const int64_t left = p.padded - chunk * kChunk;
    return static_cast<int>(left < kChunk ? (left + 15) / 16 : kChunkSteps);
  };

  if (chunks == 1) {
    if (begin < end) {
      load_rows(0);
      load_columns(begin, 0, b_tiles);
    }
    cp_async_commit();
    for (int64_t tile = begin; tile < end; ++tile) {
      const Shared<half_t> now = b_tiles + (tile - begin) % 2 * kOperand;
      if (tile + 1 < end) load_columns(tile + 1, 0, b_tiles + (tile + 1 - begin) % 2 * kOperand);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      float s[2 * kColumnSteps][4] = {};
      add_products<kSplit>(s, a_tile, now, steps_of(0));
      consume(s, static_cast<int>(tile * kColumns), now);
      __syncthreads();
    }
  } else {
    for (int64_t tile = begin; tile < end; ++tile) {
      float s[2 * kColumnSteps][4] = {};
      for (int64_t c = 1; c <= chunks; ++c) {
        const int64_t chunk = (last_chunk + c) % chunks;
        load_rows(chunk);
        load_columns(tile, chunk, b_tiles);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        add_products<kSplit>(s, a_tile, b_tiles, steps_of(chunk));
        if (c == chunks) consume(s, static_cast<int>(tile * kColumns), b_tiles);
        __syncthreads();
      }
    }
  }
  cp_async_wait<0>();
}

// Element r of n-tile t of this thread: row lane/4 + 8 * (r/2) of its warp's 16, column 8t + 2 * (lane%4) + r%2.
__device__ __forceinline__ int fragment_row(int half) {
  return static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
}
__device__ __forceinline__ int fragment_column(int t, int r) {
  return 8 * t + 2 * (static_cast<int>(threadIdx.x) % 4) + r % 2;
}

}  // namespace
}  // namespace scan_fast
