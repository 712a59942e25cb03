// Tiles of operands in shared memory and their products, portable form (mma.sync, cp.async).
//
// A tile holds kChunk dimensions of some rows, hi and then lo. A block has 4 warps. Products of 16 x 8 are in the
// fragment layout of mma.sync: element r of lane l is row l/4 + 8 * (r/2), column 2 * (l%4) + r%2.
#pragma once

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

constexpr int kThreads = 128;

// Offset of a vector of 8 values (16 bytes) of a row in a tile. The swizzle puts the eight rows that ldmatrix reads
// together into distinct banks.
template <int kChunk>
__device__ __forceinline__ int tile_at(int row, int vector) {
  return row * kChunk + (vector ^ (row % 8)) * 8;
}

// Copies one chunk of kRows rows, hi and (kSplit) lo, into a tile, for the dimensions that steps_of covers. Missing
// rows and dimensions become zeros. row_of(r) returns the row in `packed` of tile row r, or -1.
template <bool kSplit, int kRows, int kChunk, typename RowOf>
__device__ __forceinline__ void load_tile(const Shared<half_t>& tile, const half_t* __restrict__ packed,
                                          const Params& p, int chunk, RowOf row_of) {
  constexpr int kVectors = kChunk / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
    const int r = i / kVectors, vector = i % kVectors;
    const int k = chunk * kChunk + vector * 8;
    if (k >= (p.padded + 15) / 16 * 16) continue;
    const int row = row_of(r);
    const bool exists = row >= 0 && k < p.padded;
#pragma unroll
    for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
      const half_t* from = exists ? packed + (int64_t{part} * p.rows() + row) * p.padded + k : packed;
      cp_async_16((tile + part * (kRows * kChunk) + tile_at<kChunk>(r, vector)).get(), from, exists ? 16 : 0);
    }
  }
}

// Number of steps of 16 dimensions in a chunk.
template <int kChunk>
__device__ __forceinline__ int steps_of(const Params& p, int chunk) {
  const int left = p.padded - chunk * kChunk;
  return left < kChunk ? (left + 15) / 16 : kChunk / 16;
}

// s += A B^T over one chunk, by one warp. A is 16 kM rows of a_tile from a_row, B is 16 kN rows of b_tile from b_row.
template <bool kSplit, int kM, int kN, int kRowsA, int kRowsB, int kChunk>
__device__ __forceinline__ void add_products(float (&s)[kM][2 * kN][4], const Shared<half_t>& a_tile, int a_row,
                                             const Shared<half_t>& b_tile, int b_row, int steps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int k = 0; k < steps; ++k) {
    uint32_t a[kM][kSplit ? 2 : 1][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
        const int at = tile_at<kChunk>(a_row + 16 * m + lane % 16, 2 * k + lane / 16);
        ldmatrix_x4(a[m][part], (a_tile + part * (kRowsA * kChunk) + at).get());
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int at = tile_at<kChunk>(b_row + 16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
#pragma unroll
      for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
        uint32_t b[4];
        ldmatrix_x4(b, (b_tile + part * (kRowsB * kChunk) + at).get());
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma_16816<half_t>(s[m][2 * n + h], a[m][0], half);
            if constexpr (kSplit) {
              if (part == 0) mma_16816<half_t>(s[m][2 * n + h], a[m][1], half);
            }
          }
        }
      }
    }
  }
}

// This lane's row (half h) and column (element r of fragment t) within the products of a warp.
__device__ __forceinline__ int fragment_row(int half) { return static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half; }
__device__ __forceinline__ int fragment_column(int t, int r) {
  return 8 * t + 2 * (static_cast<int>(threadIdx.x) % 4) + r % 2;
}

// ---- one outer tile against a run of inner tiles -----------------------------------------------------------------

// Dynamic shared memory of for_inner_tiles. With kResident (all dimensions fit into one chunk) the outer tile stays in
// shared memory; otherwise both tiles are read in chunks.
template <bool kSplit, int kOuter, int kInner, int kChunk, bool kResident>
constexpr size_t inner_tiles_bytes() {
  const int stages = kResident ? kOuter + 2 * kInner : 2 * (kOuter + kInner);
  return static_cast<size_t>(stages) * kChunk * (kSplit ? 2 : 1) * sizeof(half_t);
}

// Calls consume(s, tile) for the inner tiles [begin, end), which must not be empty. s holds the products of operands:
// rows of the inner tile by rows of the outer tile. The warps are arranged 2 x 2; a warp has the rows of the inner tile
// from warp_row() and the rows of the outer tile from warp_column(). All threads must call it; it ends with a barrier.
template <int kInner>
__device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / 64 * (kInner / 2);
}
template <int kOuter>
__device__ __forceinline__ int warp_column() {
  return static_cast<int>(threadIdx.x) / 32 % 2 * (kOuter / 2);
}

template <bool kSplit, int kOuter, int kInner, int kChunk, bool kResident, typename OuterRow, typename InnerRow,
          typename Consume>
__device__ __forceinline__ void for_inner_tiles(const half_t* __restrict__ packed, const Params& p, int begin, int end,
                                                OuterRow outer_row, InnerRow inner_row, Consume consume) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  constexpr int kParts = kSplit ? 2 : 1, kOuterTile = kOuter * kChunk * kParts, kInnerTile = kInner * kChunk * kParts;
  constexpr int kStage = kResident ? kInnerTile : kOuterTile + kInnerTile;
  const Shared<half_t> memory = dynamic.as<half_t>(), stages = memory + (kResident ? kOuterTile : 0);
  const int chunks = kResident ? 1 : ceil_div(p.padded, kChunk);
  const auto load = [&](int tile, int chunk, int stage) {
    const Shared<half_t> to = stages + stage * kStage;
    if constexpr (!kResident) load_tile<kSplit, kOuter, kChunk>(to + kInnerTile, packed, p, chunk, outer_row);
    load_tile<kSplit, kInner, kChunk>(to, packed, p, chunk, [&](int r) { return inner_row(tile, r); });
  };
  if constexpr (kResident) load_tile<kSplit, kOuter, kChunk>(memory, packed, p, 0, outer_row);
  load(begin, 0, 0);
  cp_async_commit();
  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    float s[kInner / 32][kOuter / 16][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool last = chunk + 1 == chunks;
      if (!last || tile + 1 < end) load(last ? tile + 1 : tile, last ? 0 : chunk + 1, stage ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      const Shared<half_t> now = stages + stage * kStage;
      add_products<kSplit, kInner / 32, kOuter / 32, kInner, kOuter, kChunk>(
          s, now, warp_row<kInner>(), kResident ? memory : now + kInnerTile, warp_column<kOuter>(),
          steps_of<kChunk>(p, chunk));
      if (last) consume(s, tile);
      __syncthreads();
      stage ^= 1;
    }
  }
  cp_async_wait<0>();
}

}  // namespace
}  // namespace scan_fast
