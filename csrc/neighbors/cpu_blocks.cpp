// Search of the CPU: queries against all rows of the database, in blocks of queries.
//
// A task is a block of queries, packed once into the L2 cache (512 KiB). The packed database streams past it, and each
// tile of similarities (a few KiB) is filtered while it is in the L1 cache. Limit: 2 Q N D flops at the rate of the
// multipliers.
#include "neighbors/cpu_search.h"

namespace scan_fast::neighbors {
namespace {

// Scratch memory of a thread for one block of queries.
struct Block {
  Buffer<uint8_t> packed;
  Buffer<float> rounded, tile;
  ListMemory lists;
  std::vector<Neighbor> found;
};

}  // namespace

std::vector<int64_t> search_blocks(const Search& search, const std::vector<int64_t>& wanted, TileProducts products,
                                   int64_t capacity) {
  const TopkProblem& problem = search.problem;
  const int64_t dim = problem.dim, total = static_cast<int64_t>(wanted.size());
  if (total == 0) return {};
  const TileEngine engine(products, dim);
  const PackedDatabase packed = pack_database(engine, search.database, problem.n_database, /*both_sides=*/false);
  // At most 512 KiB for the packed block and 64 MiB for its lists, and enough tasks for all threads.
  int64_t block_rows = std::min<int64_t>({512, (512 << 10) * engine.panel_rows / engine.panel_bytes,
                                          (64 << 20) / (capacity * 8), ceil_div(total, 4 * max_threads())});
  block_rows = std::max<int64_t>(ceil_div(block_rows, engine.panel_rows), 1) * engine.panel_rows;
  const int64_t blocks = ceil_div(total, block_rows);
  std::vector<Block> scratch(max_threads());
  std::vector<std::vector<int64_t>> undecided(blocks);

  parallel_for(blocks, [&](int64_t task, int thread) {
    Block& block = scratch[thread];
    const int64_t begin = task * block_rows, rows = std::min(block_rows, total - begin);
    const int64_t panels = ceil_div(rows, engine.panel_rows);
    CandidateLists lists = block.lists.open(panels * engine.panel_rows, capacity, problem.k, search.skip);
    block.rounded.grow(dim);
    block.tile.grow(engine.tile_rows * engine.tile_columns);
    block.packed.grow(panels * engine.panel_bytes);
    std::fill_n(block.packed.data(), panels * engine.panel_bytes, uint8_t{0});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = wanted[begin + r];
      if (!search.queries.usable(i)) continue;
      const RoundedRow rounded = kernels().round(problem.queries + i * dim, search.queries.scale[i], dim,
                                                 engine.rounding(), block.rounded.data());
      search.open(i, rounded, packed, lists, r);
      engine.pack_left(block.rounded.data(), r, block.packed.data());
    }

    {
      const EngineSession session(engine);
      for (int64_t column = 0; column < problem.n_database; column += engine.tile_columns) {
        for (int64_t row = 0; row < rows; row += engine.tile_rows) {
          engine.multiply(block.packed.data(), row, packed.right, column, block.tile.data());
          kernels().filter(block.tile.data(), engine.tile_rows, engine.tile_columns, row, column, lists);
        }
      }
    }

    for (int64_t r = 0; r < rows; ++r) {
      if (!search.decide(wanted[begin + r], lists, r, block.found)) undecided[task].push_back(wanted[begin + r]);
    }
  });

  std::vector<int64_t> again;
  for (const auto& rows : undecided) again.insert(again.end(), rows.begin(), rows.end());
  return again;
}

}  // namespace scan_fast::neighbors
