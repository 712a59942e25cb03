// Search of the CPU: the rows of a database against each other. Each pair is multiplied once, and its similarity is
// offered to the lists of both rows.
//
// Rows form blocks. A task multiplies block i with block j. A tile of similarities is filtered by the thresholds of its
// rows and of its columns while it is in the L1 cache. The N x N matrix is never stored; the lists of all rows are (N
// capacity entries). Limit: N^2 D flops, half of search_blocks.
//
// Why it is exact. In a self-search both operands hold the same rounded rows u^, so the computed s^_ij differs from
// s_ij = s_ji by at most
//   |u_j| |u_i - u^_i| + |u_j - u^_j| |u^_i| + gamma |u^_i| |u^_j|  <=  eps_j  (and, exchanging i and j, <= eps_i),
// because gamma bounds the float32 accumulation for any order of the sum and of the operands. So s^_ij is as good for
// row j as s^_ji would be, and the argument of neighbors.h holds for the list of row j: each other row is offered to it
// exactly once, it keeps those that reach t - 2 eps_j, and t only rises to values that k of its entries reach.
//
// Why no locks are needed. The tasks are a round-robin tournament of m (odd, at least the number of blocks) players: in
// round h, blocks h + s and h - s (mod m) meet, s = 0 .. (m - 1) / 2. Two blocks meet in exactly one round, a block
// meets itself (s = 0) in one round, and each block has one match per round. So no two tasks of a round use the same
// list. There is no barrier between rounds: threads take tasks in order, and a task begins when its two blocks have
// finished the previous round. Those tasks come earlier in the order, so the earliest unfinished task never waits, and
// there is no deadlock. Every list receives its candidates in the order of the rounds, so two runs with equally many
// threads fill equal lists. The first round sets thresholds that already exclude nearly all later candidates.
#include <atomic>
#include <thread>

#include "neighbors/cpu_search.h"

namespace scan_fast::neighbors {
namespace {

// Chooses blocks large enough that loading two is cheap compared with multiplying them, small enough that both stay in
// the L2 cache (1 MiB), and numerous enough for two matches per round and thread.
int64_t rows_per_block(const TileEngine& engine, int64_t n) {
  const int64_t row_bytes = engine.panel_bytes / engine.panel_rows;
  const int64_t wanted = std::min<int64_t>({512, (512 << 10) / row_bytes, ceil_div(n, 4 * max_threads())});
  return std::max<int64_t>(ceil_div(wanted, engine.tile_columns), 1) * engine.tile_columns;
}

// Multiplies two blocks and filters the products. left and right are the first rows of the blocks.
void multiply_blocks(const TileEngine& engine, const PackedDatabase& packed, int64_t left, int64_t left_rows,
                     int64_t right, int64_t right_rows, float* tile, CandidateLists& lists) {
  const auto filter = left == right ? kernels().filter : kernels().filter_both;
  for (int64_t column = right; column < right + right_rows; column += engine.tile_columns) {
    for (int64_t row = left; row < left + left_rows; row += engine.tile_rows) {
      engine.multiply(packed.left, row, packed.right, column, tile);
      filter(tile, engine.tile_rows, engine.tile_columns, row, column, lists);
    }
  }
}

}  // namespace

std::vector<int64_t> search_symmetric(const Search& search, TileProducts products, int64_t capacity) {
  const TopkProblem& problem = search.problem;
  const int64_t n = problem.n_database;
  const TileEngine engine(products, problem.dim);
  const PackedDatabase packed = pack_database(engine, search.database, n, /*both_sides=*/true);
  ListMemory memory;
  CandidateLists lists =
      memory.open(ceil_div(n, engine.tile_columns) * engine.tile_columns, capacity, problem.k, search.skip);
  for (int64_t i = 0; i < n; ++i) {
    if (search.queries.usable(i)) search.open(i, packed.rounded[i], packed, lists, i);
  }

  const int64_t block_rows = rows_per_block(engine, n), blocks = ceil_div(n, block_rows);
  const int64_t players = blocks | 1, matches = (players + 1) / 2;
  std::vector<std::atomic<int64_t>> rounds_done(players);
  std::vector<Buffer<float>> tiles(max_threads());
  for (auto& tile : tiles) tile.grow(engine.tile_rows * engine.tile_columns);
  std::atomic<int64_t> next{0};
  parallel_for(max_threads(), [&](int64_t, int thread) {
    const EngineSession session(engine);
    for (int64_t task = next++; task < players * matches; task = next++) {
      const int64_t round = task / matches, apart = task % matches;
      const int64_t one = (round + apart) % players, other = (round - apart + players) % players;
      for (const int64_t block : {one, other}) {
        while (rounds_done[block].load(std::memory_order_acquire) != round) std::this_thread::yield();
      }
      // If the number of blocks is even, one player has no block.
      if (one < blocks && other < blocks) {
        const int64_t left = one * block_rows, right = other * block_rows;
        multiply_blocks(engine, packed, left, std::min(block_rows, n - left), right, std::min(block_rows, n - right),
                        tiles[thread].data(), lists);
      }
      for (const int64_t block : {one, other}) rounds_done[block].store(round + 1, std::memory_order_release);
    }
  });

  constexpr int64_t kRowsPerTask = 64;
  std::vector<std::vector<Neighbor>> found(max_threads());
  std::vector<uint8_t> decided(n);
  parallel_for(ceil_div(n, kRowsPerTask), [&](int64_t task, int thread) {
    for (int64_t i = task * kRowsPerTask; i < std::min(n, (task + 1) * kRowsPerTask); ++i) {
      decided[i] = search.decide(i, lists, i, found[thread]);
    }
  });
  std::vector<int64_t> again;
  for (int64_t i = 0; i < n; ++i) {
    if (!decided[i]) again.push_back(i);
  }
  return again;
}

}  // namespace scan_fast::neighbors
