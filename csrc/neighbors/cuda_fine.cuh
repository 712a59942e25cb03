// GPU neighbour search: products of 22 bits and longer lists, for the queries that float16 tiles could not decide.
//
// search_finely: only the device knows the number of undecided queries, so the grid has a fixed size. A work item is 64
// of these queries x a column split (a single split unless there are fewer blocks of queries than blocks of the grid).
// The last block to finish with 64 queries decides them. The tile is 64 x 128, 8 warps (2 x 4) of 32 x 32. High and low
// parts of both operands pass through a ring of two cp.async stages, 64 dimensions at a time (48 KiB). There are three
// mma.m16n8k16 for each one of search_tiles. high x high is added to the total after every 32 dimensions, so that over
// long rows it is summed in float32 with rounding to nearest, not truncated. high x low and low x high share a separate
// accumulator. fine_margin bounds the resulting error. 3 x 32 accumulators per thread.
//
// Limit: 6 U N D flops at the float16 rate for U undecided queries.
//
// Included by neighbors_cuda.cu only.
#pragma once

#include "common/row_groups.cuh"
#include "neighbors/cuda_decide.cuh"
#include "neighbors/cuda_prepare.cuh"

namespace scan_fast {
namespace {

constexpr int kFineRows = 64, kFineColumns = kPanelRows;
constexpr int kFinePart = (kFineRows + kFineColumns) * kPanelDims;  // elements of the high (or low) parts of a stage
constexpr int kFineStage = 2 * kFinePart;
constexpr size_t kFineShared = size_t{2} * kFineStage * sizeof(half_t);

__global__ void __launch_bounds__(kThreads, 1)
    search_finely(TopkProblem problem, Workspace work, int panels, int capacity, int max_keys,
                  float* __restrict__ similarity, int64_t* __restrict__ index) {
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(float, threshold, kFineRows);
  SCAN_FAST_SHARED(int, count, kFineRows);
  SCAN_FAST_SHARED(int, limit, kFineRows);
  SCAN_FAST_SHARED(int32_t, query, kFineRows);
  SCAN_FAST_SHARED(double, margin, kFineRows);
  const Shared<half_t> stages = memory.as<half_t>();
  const RowLists<kFineColumns> lists{threshold, count, limit, static_cast<int>(problem.k), capacity};
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 32, warp_column = warp % 4 * 32;

  const int64_t undecided = static_cast<int64_t>(*work.undecided_count);
  const int64_t row_blocks = (undecided + kFineRows - 1) / kFineRows;
  if (row_blocks == 0) return;
  const int64_t tiles = (problem.n_database + kFineColumns - 1) / kFineColumns;
  const int64_t spare = gridDim.x / row_blocks;
  const int splits = static_cast<int>(spare < 1 ? 1 : spare < tiles ? spare : tiles);

  for (int64_t item = blockIdx.x; item < row_blocks * splits; item += gridDim.x) {
    const int64_t row_block = item / splits;
    const int split = static_cast<int>(item % splits);
    // With splits there are no more items than blocks. Without, a block reuses its lists for one item after the other.
    const int64_t first_slot = (splits > 1 ? row_block * splits : blockIdx.x) * kFineRows;
    const int64_t my_slot = first_slot + split * kFineRows;
    const auto list_of = [&](int row) { return work.candidates + (my_slot + row) * capacity; };

    __syncthreads();  // the previous item no longer uses shared memory
    if (thread < kFineRows) {
      const int64_t place = row_block * kFineRows + thread;
      const bool inside = place < undecided;
      const int32_t i = work.undecided[inside ? place : row_block * kFineRows];
      const double mine = inside ? fine_margin(problem, work, i, panels) : -1.0;
      query[thread] = i;
      margin[thread] = mine;
      lists.open(thread, mine);
    }
    __syncthreads();

    // Each thread loads the 16-byte vector thread % 8 of rows thread / 8 + {0, 32, ...}. A database tile has the same
    // layout in global and in shared memory. Queries are gathered, and each vector is swizzled for its new row.
    const int load_row = thread / 8, vector = thread % 8;
    const int query_slot = load_row * kPanelDims + (vector ^ load_row % 8) * 8;
    const int offset = load_row * kPanelDims + vector * 8;
    const int32_t first_query = query[load_row], second_query = query[load_row + 32];
    const int64_t query_from[2] = {panel_at(first_query, vector * 8, panels),
                                   panel_at(second_query, vector * 8, panels)};
    int load_tile = static_cast<int>(tiles * split / splits);
    const int last_tile = static_cast<int>(tiles * (split + 1) / splits);
    int load_panel = 0, load_stage = 0;
    const auto load_next = [&] {
      if (load_tile < last_tile) {
        const int64_t panel = static_cast<int64_t>(load_panel) * kPanelElements;
        const int64_t from = static_cast<int64_t>(load_tile) * panels * kPanelElements + panel + offset;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const half_t* const queries = part == 0 ? work.query_rounded : work.query_low;
          const half_t* const database = part == 0 ? work.database_rounded : work.database_low;
          const Shared<half_t> slot = stages + (load_stage * kFineStage + part * kFinePart);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            cp_async_16((slot + (half * 32 * kPanelDims + query_slot)).get(), queries + query_from[half] + panel);
          }
#pragma unroll
          for (int row = 0; row < kFineColumns; row += 32) {
            cp_async_16((slot + ((kFineRows + row) * kPanelDims + offset)).get(), database + from + row * kPanelDims);
          }
        }
        if (++load_panel == panels) {
          load_panel = 0;
          ++load_tile;
        }
        load_stage ^= 1;
      }
      cp_async_commit();
    };

    float total[2][4][4], cross[2][4][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[m][c][e] = cross[m][c][e] = 0;
      }
    }

    int tile = load_tile, panel = 0, stage = 0;
    load_next();
    while (tile < last_tile) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has arrived, and no thread reads the other one, which is refilled next
      load_next();
      const Shared<half_t> a_tile = stages + stage * kFineStage, b_tile = a_tile + kFineRows * kPanelDims;
      stage ^= 1;
#pragma unroll
      for (int half_chunk = 0; half_chunk < 2; ++half_chunk) {
        float part[2][4][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int e = 0; e < 4; ++e) part[m][c][e] = 0;
          }
        }
#pragma unroll
        for (int depth = 2 * half_chunk; depth < 2 * half_chunk + 2; ++depth) {
          uint32_t a_high[2][4], a_low[2][4];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const int row = warp_row + m * 16 + lane % 16, chunk = depth * 2 + lane / 16;
            const Shared<half_t> from = a_tile + (row * kPanelDims + (chunk ^ (row % 8)) * 8);
            ldmatrix_x4(a_high[m], from.get());
            ldmatrix_x4(a_low[m], (from + kFinePart).get());
          }
#pragma unroll
          for (int c = 0; c < 4; c += 2) {
            const int row = warp_column + c * 8 + lane / 16 * 8 + lane % 8, chunk = depth * 2 + lane / 8 % 2;
            const Shared<half_t> from = b_tile + (row * kPanelDims + (chunk ^ (row % 8)) * 8);
            uint32_t high[4], low[4];
            ldmatrix_x4(high, from.get());
            ldmatrix_x4(low, (from + kFinePart).get());
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              const uint32_t b_high[2] = {high[2 * side], high[2 * side + 1]};
              const uint32_t b_low[2] = {low[2 * side], low[2 * side + 1]};
#pragma unroll
              for (int m = 0; m < 2; ++m) {
                mma_16816<half_t>(part[m][c + side], a_high[m], b_high);
                mma_16816<half_t>(cross[m][c + side], a_high[m], b_low);
                mma_16816<half_t>(cross[m][c + side], a_low[m], b_high);
              }
            }
          }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int e = 0; e < 4; ++e) total[m][c][e] += part[m][c][e];
          }
        }
      }
      if (++panel < panels) continue;
      panel = 0;

#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) total[m][c][e] += cross[m][c][e];
          }
          lists.enter<4>(problem, row, query[row], list_of, tile * kFineColumns + warp_column + lane % 4 * 2,
                         [&](int c, int e) { return total[m][c][half * 2 + e]; });
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) total[m][c][e] = cross[m][c][e] = 0;
          }
        }
      }
      __syncthreads();  // all candidates of the tile are entered
      lists.make_room<kFineRows * 32 / kThreads>(warp, kThreads / 32, list_of,
                                                 [&](int row) -> double { return margin[row]; });
      ++tile;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (thread < kFineRows) work.counts[my_slot + thread] = count[thread];
    if (!is_last_block(work.tickets + row_block, static_cast<unsigned>(splits))) continue;

    // All column splits are done, so this block decides.
    for (int row = 0; row < kFineRows && row_block * kFineRows + row < undecided; ++row) {
      const int32_t i = query[row];
      const Candidates found{work.candidates + (first_slot + row) * capacity, work.counts + first_slot + row,
                             int64_t{kFineRows} * capacity, kFineRows, splits};
      if (!decide_query(problem, work, i, margin[row], found, memory.as<unsigned long long>(), max_keys, similarity,
                        index) &&
          thread == 0) {
        work.hard[atomicAdd(work.hard_count, 1ull)] = i;
      }
    }
  }
}

}  // namespace
}  // namespace scan_fast
