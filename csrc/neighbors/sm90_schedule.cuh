// The first neighbour search on Hopper: the forms of its main loop, and which block searches what.
//
// How large a search must be for a block to use a stage of its ring for the third time, so that what goes wrong where
// rings wrap shows: its runs, each a share of the columns in tiles of 256, need 2 * 4 + 1 steps in all, one for each
// panel of 64 dimensions. Which shares and batches there are says plan_batches (neighbors_cuda.cu). On 132
// multiprocessors with k = 20:
//                                  D <= 64   D <= 128   D <= 256   D <= 512
//     self-search of N rows from      5633       4225       3329       2817
//     1,024 queries, N from          36609      20225      12033       7937
// The queries that stay (up to 128 dimensions) come to their first buffer again with 3 runs, which 20,000 rows give
// every block, and no search more: the memory for lists (kListBytes) ends a batch there. Good: (20000, 64),
// (20000, 128), (20000, 256).
//
// Part of neighbors_sm90.cu, and read by its test.
#pragma once

#include "common/tile_products.cuh"
#include "neighbors/neighbors.h"

namespace scan_fast {
namespace {

using NarrowProducts = Products<half_t, 2 * kPanelRows, Resident::kRows, 2, 4>;
using WideProducts = Products<half_t, 2 * kPanelRows, Resident::kNone, 0, 4>;

// Calls body.operator()<Products>() with the form of the main loop.
template <typename Body>
auto with_products(const TileBatch& batch, Body body) {
  return batch.panels <= NarrowProducts::kMaxPanels ? body.template operator()<NarrowProducts>()
                                                    : body.template operator()<WideProducts>();
}

// Items (128 queries, share of the columns), dealt out in turns.
struct SearchSchedule {
  struct Run {
    int fixed, begin, end, split;
  };
  int row_tiles, splits, tiles, item;

  // The items of the block that runs.
  template <int kColumns>
  __device__ __forceinline__ static SearchSchedule of_block(const TopkProblem& problem, const TileBatch& batch) {
    return {static_cast<int>((batch.queries + kPanelRows - 1) / kPanelRows), batch.splits,
            static_cast<int>((problem.n_database + kColumns - 1) / kColumns), static_cast<int>(blockIdx.x)};
  }
  __device__ __forceinline__ bool next(Run& run) {
    if (item >= row_tiles * splits) return false;
    run.fixed = item / splits;
    run.split = item % splits;
    run.begin = static_cast<int>(static_cast<int64_t>(tiles) * run.split / splits);
    run.end = static_cast<int>(static_cast<int64_t>(tiles) * (run.split + 1) / splits);
    item += static_cast<int>(gridDim.x);
    return true;
  }
};

// One a multiprocessor, but no more than there are items.
inline int64_t search_blocks(const TileBatch& batch) {
  const int64_t items = (batch.queries + kPanelRows - 1) / kPanelRows * batch.splits;
  return items < multiprocessors() ? items : multiprocessors();
}

}  // namespace
}  // namespace scan_fast
