// The GPU neighbour search: float16 tiles and the candidates that they leave.
//
// search_tiles: 128 x 256 tile per block, 64 columns of dim at a time through a ring of kStages cp.async stages that
// runs on across tiles; 8 warps (2 x 4) of 64 x 64 with mma.m16n8k16 (float16 in, float32 sums): 128 accumulators a
// thread. 16-byte chunks of a row are stored at chunk ^ (row % 8), so that neither cp.async nor ldmatrix meets a bank
// conflict. Per tile, a thread compares the maximum of its 16 values of a row with the row's threshold; survivors (about
// k + k ln(N / k) a row) go to the row's list (cuda_lists.cuh).
//
// Limit: 2 Q N D flops at the float16 rate. Per 64 columns of dim a block moves 48 KiB for 4.2 Mflop, 87 flop per byte
// of the second cache. float16 rather than bfloat16: same speed, eight times finer, so fewer candidates. Rows are
// scaled to length 128 to stay clear of float16's subnormal range.
//
// Part of neighbors_cuda.cu, which alone includes it.
#pragma once

#include "neighbors/cuda_lists.cuh"

namespace scan_fast {
namespace {

constexpr int kTileRows = 128, kTileColumns = 256, kStages = 3;
constexpr int kStageHalves = (kTileRows + kTileColumns) * kChunk;
constexpr size_t kSearchShared = size_t{kStages} * kStageHalves * sizeof(half_t);

__global__ void __launch_bounds__(kThreads, 1)
    search_tiles(TopkProblem problem, Workspace work, int64_t padded_dim, int64_t first_query, int64_t batch,
                 int splits, int capacity) {
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(float, threshold, kTileRows);
  SCAN_FAST_SHARED(int, count, kTileRows);
  SCAN_FAST_SHARED(int, limit, kTileRows);
  const Shared<half_t> stages = memory.as<half_t>();

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 64;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * kTileRows;  // in the batch
  const int split = static_cast<int>(blockIdx.y);
  const int n = static_cast<int>(problem.n_database);
  const RowLists<kTileColumns> lists{threshold, count, limit, static_cast<int>(problem.k), capacity};

  // This block's share of the column tiles.
  const int64_t tiles = (problem.n_database + kTileColumns - 1) / kTileColumns;
  const int first_tile = static_cast<int>(tiles * split / splits);
  const int last_tile = static_cast<int>(tiles * (split + 1) / splits);
  const int chunks = static_cast<int>(padded_dim / kChunk);

  if (thread < kTileRows) {
    lists.open(thread, block_row + thread < batch ? work.margin[first_query + block_row + thread] : -1.0);
  }
  const auto list_of = [&](int row) { return work.candidates + ((block_row + row) * splits + split) * capacity; };

  // Thread: 16-byte chunk thread % 8 of rows thread / 8 + {0, 32, 64, ...}; 32 rows further on, the swizzle is the
  // same.
  const int load_row = thread / 8;
  const Shared<half_t> load_slot = stages + (load_row * kChunk + (thread % 8 ^ load_row % 8) * 8);
  const half_t* const query_source =
      work.query_rounded + (first_query + block_row) * padded_dim + thread % 8 * 8;
  const int query_rows = static_cast<int>(batch - block_row < kTileRows ? batch - block_row : kTileRows);
  int load_tile = first_tile;
  int load_depth = 0, load_stage = 0;
  const auto load_next = [&] {
    if (load_tile < last_tile) {
      const int left = n - load_tile * kTileColumns;
      const int columns = left < kTileColumns ? left : kTileColumns;
      const half_t* const column_source =
          work.database_rounded + static_cast<int64_t>(load_tile) * kTileColumns * padded_dim + thread % 8 * 8 +
          load_depth;
      const Shared<half_t> slot = load_slot + load_stage * kStageHalves;
#pragma unroll 1
      for (int row = load_row; row < kTileRows; row += 32) {
        const bool inside = row < query_rows;
        cp_async_16((slot + (row - load_row) * kChunk).get(),
                    query_source + (inside ? row : 0) * padded_dim + load_depth, inside ? 16 : 0);
      }
#pragma unroll 2
      for (int row = load_row; row < kTileColumns; row += 32) {
        const bool inside = row < columns;
        cp_async_16((slot + (kTileRows + row - load_row) * kChunk).get(),
                    column_source + (inside ? row : 0) * padded_dim, inside ? 16 : 0);
      }
      load_depth += kChunk;
      if (load_depth == padded_dim) {
        load_depth = 0;
        ++load_tile;
      }
      load_stage = load_stage + 1 < kStages ? load_stage + 1 : 0;
    }
    cp_async_commit();
  };

  for (int stage = 0; stage < kStages - 1; ++stage) load_next();

  float sum[4][8][4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][c][e] = 0;
    }
  }

  int chunk_of_tile = 0, stage = 0;
  for (int tile = first_tile; tile < last_tile;) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all are done with the stage that is refilled next
    load_next();

    const Shared<half_t> a_tile = stages + stage * kStageHalves;
    const Shared<half_t> b_tile = a_tile + kTileRows * kChunk;
    stage = stage + 1 < kStages ? stage + 1 : 0;
#pragma unroll
    for (int depth = 0; depth < kChunk / 16; ++depth) {
      uint32_t a[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int row = warp_row + m * 16 + lane % 16, chunk = depth * 2 + lane / 16;
        ldmatrix_x4(a[m], (a_tile + (row * kChunk + (chunk ^ (row % 8)) * 8)).get());
      }
#pragma unroll
      for (int c = 0; c < 8; c += 2) {
        uint32_t b[4];
        const int row = warp_column + c * 8 + lane / 16 * 8 + lane % 8, chunk = depth * 2 + lane / 8 % 2;
        ldmatrix_x4(b, (b_tile + (row * kChunk + (chunk ^ (row % 8)) * 8)).get());
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma_16816<half_t>(sum[m][c], a[m], low);
          mma_16816<half_t>(sum[m][c + 1], a[m], high);
        }
      }
    }
    if (++chunk_of_tile < chunks) continue;
    chunk_of_tile = 0;

    // The tile is complete: enter what reaches its row's threshold. Thread: rows lane / 4 (+ 8), columns 2 (lane % 4) +
    // {0, 1}.
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        lists.enter<8>(problem, work.database_length, row, static_cast<int>(first_query + block_row) + row,
                       list_of, tile * kTileColumns + warp_column + lane % 4 * 2,
                       [&](int c, int e) { return sum[m][c][half * 2 + e]; });
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[m][c][half * 2] = sum[m][c][half * 2 + 1] = 0;
      }
    }
    __syncthreads();  // the lists are complete
    for (int row = warp; row < kTileRows; row += kThreads / 32) {
      lists.make_room(row, list_of(row), work.margin + first_query + block_row + row);
    }
    ++tile;
    // The barrier of the next step comes before the next tile reads thresholds.
  }
  cp_async_wait<0>();
  __syncthreads();
  if (thread < kTileRows && block_row + thread < batch) {
    work.counts[(block_row + thread) * splits + split] = count[thread];
  }
}

}  // namespace
}  // namespace scan_fast
