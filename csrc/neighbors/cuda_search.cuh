// GPU neighbour search: products of float16 tiles, and the candidates among them.
//
// search_tiles: one block per 128 x 256 tile. 64 dimensions at a time pass through a ring of kStages cp.async stages,
// which continues across tiles. 8 warps (2 x 4) of 64 x 64 use mma.m16n8k16 (float16 operands, float32 sums), with 128
// accumulators per thread. The 16-byte vector v of a row is stored at v ^ (row % 8), in shared as in global memory, so
// that neither cp.async nor ldmatrix has bank conflicts. Per tile, a thread compares the maximum of its 16 values of a
// row with the row's threshold. Candidates (about k + k ln(N / k) per row) go to the row's list (cuda_lists.cuh).
//
// Limit: 2 Q N D flops at the float16 rate. Per 64 dimensions a block reads 48 KiB for 4.2 Mflop, 87 flop per byte of
// L2. float16 instead of bfloat16: same speed, eight times finer, so fewer candidates. Rows are scaled to length 128 to
// avoid the subnormals of float16.
//
// Included by neighbors_cuda.cu only.
#pragma once

#include "neighbors/cuda_lists.cuh"

namespace scan_fast {
namespace {

constexpr int kTileRows = kPanelRows, kTileColumns = 2 * kPanelRows;
constexpr int kStageHalves = (kTileRows + kTileColumns) * kPanelDims;
constexpr size_t search_shared(int stages) { return size_t(stages) * kStageHalves * sizeof(half_t); }
// Three stages take 144 KB. On compute capabilities 8.6, 8.9 and 12.0 a block has 99 KB, enough for two.
constexpr int kMaxStages = 3, kMinStages = 2;

template <int kStages>
__global__ void __launch_bounds__(kThreads, 1) search_tiles(TopkProblem problem, Workspace work, TileBatch batch) {
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(float, threshold, kTileRows);
  SCAN_FAST_SHARED(int, count, kTileRows);
  SCAN_FAST_SHARED(int, limit, kTileRows);
  const Shared<half_t> stages = memory.as<half_t>();

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 64;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * kTileRows;  // first row within the batch
  const int split = static_cast<int>(blockIdx.y), splits = batch.splits, panels = batch.panels;
  const RowLists<kTileColumns> lists{threshold, count, limit, static_cast<int>(problem.k), batch.capacity};

  // Column tiles of this block's split.
  const int64_t tiles = (problem.n_database + kTileColumns - 1) / kTileColumns;
  const int first_tile = static_cast<int>(tiles * split / splits);
  const int last_tile = static_cast<int>(tiles * (split + 1) / splits);

  if (thread < kTileRows) {
    lists.open(thread, block_row + thread < batch.queries ? work.margin[batch.first_query + block_row + thread] : -1.0);
  }
  // One multiplication per use: the compiler would keep longer index computations in registers, for each row.
  uint2* const first_list = work.candidates + (block_row * splits + split) * batch.capacity;
  const int list_stride = splits * batch.capacity;
  const auto list_of = [&](int row) { return first_list + static_cast<int64_t>(row) * list_stride; };

  // Global and shared layout are the same. Each thread loads vector thread % 8 of rows thread / 8 + {0, 32, ...}.
  const int offset = thread / 8 * kPanelDims + thread % 8 * 8;
  const half_t* const query_source =
      work.query_rounded + (batch.first_query + block_row) / kPanelRows * panels * kPanelElements + offset;
  int load_tile = first_tile, load_panel = 0, load_stage = 0;
  const auto load_next = [&] {
    if (load_tile < last_tile) {
      const half_t* const queries = query_source + static_cast<int64_t>(load_panel) * kPanelElements;
      const half_t* const database =
          work.database_rounded + offset + (static_cast<int64_t>(load_tile) * 2 * panels + load_panel) * kPanelElements;
      const Shared<half_t> slot = stages + (load_stage * kStageHalves + offset);
#pragma unroll
      for (int row = 0; row < kPanelRows; row += 32) {
        cp_async_16((slot + row * kPanelDims).get(), queries + row * kPanelDims);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int row = 0; row < kPanelRows; row += 32) {
          cp_async_16((slot + (kTileRows + half * kPanelRows + row) * kPanelDims).get(),
                      database + (static_cast<int64_t>(half) * panels * kPanelElements + row * kPanelDims));
        }
      }
      if (++load_panel == panels) {
        load_panel = 0;
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

  int panel = 0, stage = 0;
  for (int tile = first_tile; tile < last_tile;) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has arrived, and no thread reads the stage that is refilled next
    load_next();

    const Shared<half_t> a_tile = stages + stage * kStageHalves;
    const Shared<half_t> b_tile = a_tile + kTileRows * kPanelDims;
    stage = stage + 1 < kStages ? stage + 1 : 0;
#pragma unroll
    for (int depth = 0; depth < kPanelDims / 16; ++depth) {
      uint32_t a[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int row = warp_row + m * 16 + lane % 16, chunk = depth * 2 + lane / 16;
        ldmatrix_x4(a[m], (a_tile + (row * kPanelDims + (chunk ^ (row % 8)) * 8)).get());
      }
#pragma unroll
      for (int c = 0; c < 8; c += 2) {
        uint32_t b[4];
        const int row = warp_column + c * 8 + lane / 16 * 8 + lane % 8, chunk = depth * 2 + lane / 8 % 2;
        ldmatrix_x4(b, (b_tile + (row * kPanelDims + (chunk ^ (row % 8)) * 8)).get());
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma_16816<half_t>(sum[m][c], a[m], low);
          mma_16816<half_t>(sum[m][c + 1], a[m], high);
        }
      }
    }
    if (++panel < panels) continue;
    panel = 0;

    // The tile is complete: enter values that reach the threshold of their row. A thread has rows lane / 4 (+ 8) and
    // columns 2 (lane % 4) + {0, 1}.
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        lists.enter<8>(problem, row, static_cast<int>(batch.first_query + block_row) + row, list_of,
                       tile * kTileColumns + warp_column + lane % 4 * 2,
                       [&](int c, int e) { return sum[m][c][half * 2 + e]; });
      }
    }
    __syncthreads();  // all candidates of the tile are entered
    lists.make_room<kTileRows * 32 / kThreads>(
        warp, kThreads / 32, list_of, [&](int row) { return work.margin[batch.first_query + block_row + row]; });
    // Not before: the registers of the sums are free in make_room.
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][c][e] = 0;
      }
    }
    ++tile;
    // The barrier of the next step precedes the next tile's reads of thresholds.
  }
  cp_async_wait<0>();
  __syncthreads();
  if (thread < kTileRows && block_row + thread < batch.queries) {
    work.counts[(block_row + thread) * splits + split] = count[thread];
  }
}

}  // namespace
}  // namespace scan_fast
