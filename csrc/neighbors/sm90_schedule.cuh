// First neighbour search on Hopper: the variants of its main loop, and the assignment of work to blocks.
//
// How large a search must be for a block to use a stage of its ring for the third time, so that errors in the
// wrap-around of rings show: the runs of a block (one column split each, in tiles of 256) need 2 * 4 + 1 steps in all,
// one step per panel of 64 dimensions. plan_batches (neighbors_cuda.cu) chooses splits and batches. On 132
// multiprocessors with k = 20:
//                                  D <= 64   D <= 128   D <= 256   D <= 512
//     self-search of N rows from      5633       4225       3329       2817
//     1,024 queries, N from          36609      20225      12033       7937
// With more dimensions every tile has so many steps. The buffers of the resident queries (two up to 128 dimensions, one
// up to 512) wrap with 3 runs. 20,000 rows give every block that many. No search gives more, because the memory for
// lists (kListBytes) limits the batch. Use (20000, 64), (20000, 128), (20000, 256), and any size with 600 dimensions.
//
// Included by neighbors_sm90.cu and its test only.
#pragma once

#include "common/tile_products.cuh"
#include "neighbors/neighbors.h"

namespace scan_fast {
namespace {

using NarrowProducts = Products<half_t, 2 * kPanelRows, Resident::kRows, 2, 4>;
using MediumProducts = Products<half_t, 2 * kPanelRows, Resident::kRows, 8, 3>;
using WideProducts = Products<half_t, 2 * kPanelRows, Resident::kNone, 0, 4>;

// Calls body.operator()<Products>() with the variant of the main loop.
template <typename Body>
auto with_products(const TileBatch& batch, Body body) {
  if (batch.panels <= NarrowProducts::kMaxPanels) return body.template operator()<NarrowProducts>();
  if (batch.panels <= MediumProducts::kMaxPanels) return body.template operator()<MediumProducts>();
  return body.template operator()<WideProducts>();
}

// Work items (128 queries, column split), assigned to blocks round-robin.
struct SearchSchedule {
  struct Run {
    int fixed, begin, end, split;
  };
  int row_tiles, splits, tiles, item;

  // Returns the items of the calling block.
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

// Number of blocks: one per multiprocessor, but no more than there are items.
inline int64_t search_blocks(const TileBatch& batch) {
  const int64_t items = (batch.queries + kPanelRows - 1) / kPanelRows * batch.splits;
  return items < multiprocessors() ? items : multiprocessors();
}

}  // namespace
}  // namespace scan_fast
