// The neighbour search against a plain one with the same sums, and the cases that every form of it must pass:
// test_neighbors runs them with the portable tile search, test_neighbors_sm90 with Hopper's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "check.h"
#include "common/device.h"
#include "neighbors_reference.h"

namespace neighbor_cases {

using namespace scan_fast;

// The first search that the cases run.
inline TileSearch* tile_search = search_tiles_portable;

struct Case {
  std::vector<float> queries, database;  // queries empty: a self-search
  int64_t dim, k;
  bool normalize = true, exclude_self = true;
  int64_t list_bytes = kListBytes;
  int64_t offset = 0;  // elements before the first row
};

struct Found {
  std::vector<float> similarity;
  std::vector<int64_t> index;
  SearchedAgain again;

  bool searched(int64_t finely, int64_t exactly) const { return again.finely == finely && again.exactly == exactly; }
};

inline Found search(const Case& c) {
  const bool self = c.queries.empty();
  const std::vector<float>& q = self ? c.database : c.queries;
  const int64_t n_queries = static_cast<int64_t>(q.size()) / c.dim, n = static_cast<int64_t>(c.database.size()) / c.dim;
  std::vector<float> moved_queries(c.offset), moved_database(c.offset);
  moved_queries.insert(moved_queries.end(), q.begin(), q.end());
  moved_database.insert(moved_database.end(), c.database.begin(), c.database.end());
  const float* const rows = moved_database.data() + c.offset;
  const TopkProblem problem{self ? rows : moved_queries.data() + c.offset,
                            rows,
                            n_queries,
                            n,
                            c.dim,
                            c.k,
                            c.normalize,
                            self && c.exclude_self};
  Found found{std::vector<float>(n_queries * c.k, NAN), std::vector<int64_t>(n_queries * c.k, -7), {-7, -7}};
  const size_t bytes = topk_neighbors_cuda_workspace(problem, c.list_bytes);
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(256, (bytes + 255) / 256 * 256), std::free);
  std::memset(workspace.get(), 0xff, bytes);  // as if the memory had been used before
  topk_neighbors_cuda(problem, found.similarity.data(), found.index.data(), &found.again, workspace.get(), nullptr,
                      *tile_search, c.list_bytes);

  check_found({q.data(), c.database.data(), n_queries, n, c.dim, c.k, c.normalize, problem.exclude_self},
              found.similarity, found.index);
  return found;
}

// `copies` copies of each of `kinds` rows.
inline std::vector<float> duplicates(int64_t kinds, int64_t copies, int64_t dim) {
  const std::vector<float> base = normal(kinds, dim, 5);
  std::vector<float> x;
  for (int64_t c = 0; c < copies; ++c) x.insert(x.end(), base.begin(), base.end());
  return x;
}

inline void odd_sizes() {
  emu::options() = {.detect_races = true};
  for (const bool normalize : {true, false}) {
    CHECK(search({{}, normal(300, 37, 1), 37, 7, normalize}).searched(0, 0));
    CHECK(search({{}, normal(131, 129, 2), 129, 1, normalize}).searched(0, 0));
    CHECK(search({normal(5, 3, 3), normal(530, 3, 4), 3, 20, normalize}).searched(0, 0));
    CHECK(search({{}, normal(70, 40, 5), 40, 7, normalize, true, kListBytes, 1}).searched(0, 0));
    search({{}, normal(2, 1, 3), 1, 1, normalize});
    search({normal(3, 2, 3), normal(1, 2, 4), 2, 1, normalize});
  }
}

inline void any_order_of_threads() {
  std::vector<Found> found;
  for (const uint64_t seed : {0, 1, 2}) {
    emu::options() = {.detect_races = true, .seed = seed};
    found.push_back(search({integers(150, 6, 8), integers(270, 6, 9), 6, 9}));
  }
  for (const Found& other : found) CHECK(other.searched(found[0].again.finely, found[0].again.exactly));
}

inline void ties() {
  emu::options() = {};
  for (const bool normalize : {true, false}) {
    search({integers(30, 5, 1), integers(520, 5, 6), 5, 20, normalize});
    search({{}, duplicates(4, 80, 16), 16, 20, normalize});
    search({{}, std::vector<float>(140 * 8, 0.0f), 8, 5, normalize});
  }
}

// Positive rows of 11-bit values. Every second one has sums of few bits, which no truncation touches; the others lose
// with every product, and are a little better in truth.
inline std::vector<float> rough_and_smooth(int64_t rows, int64_t dim, uint64_t seed) {
  check::Random random{seed};
  std::vector<float> x(rows * dim, 1.0f);
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t d = 0; j % 2 == 1 && d < dim; d += 2) {
      const float odd = static_cast<float>(random.bits() % 256 * 2 + 1) * 0x1p-10f;
      x[j * dim + d] = 1.0f + odd;
      x[j * dim + d + 1] = 1.0f - odd;
    }
    const int64_t more = random.bits() % (dim / 16);
    for (int64_t d = 0; d < more; ++d) x[j * dim + d * 16] += 0x1p-9f;
  }
  return x;
}

inline void truncating_units() {
  emu::options() = {.truncate = true};
  std::vector<float> queries(2 * 512);
  for (int64_t d = 0; d < 512; ++d) {
    queries[d] = 1.0f;
    queries[512 + d] = 1.0f + static_cast<float>(d / 2 * 37 % 256) * 0x1p-9f;
  }
  search({queries, rough_and_smooth(500, 512, 1), 512, 9, false});
  search({queries, rough_and_smooth(500, 512, 2), 512, 9, true});
  // Too many that close for the first search's lists.
  emu::options() = {.multiprocessors = 1, .truncate = true};
  CHECK(search({std::vector<float>(256, 1.0f), rough_and_smooth(1500, 256, 3), 256, 9, false}).searched(1, 0));
}

inline void broken_rows() {
  emu::options() = {};
  std::vector<float> x = normal(290, 10, 8);
  for (int64_t row = 0; row < 290; row += 7) x[row * 10 + row % 10] = row % 2 ? NAN : -INFINITY;
  search({{}, x, 10, 6});
  search({{}, std::vector<float>(40 * 3, NAN), 3, 4});
  search({normal(3, 3, 1), std::vector<float>(40 * 3, INFINITY), 3, 4});
}

inline void batches_of_queries() {
  emu::options() = {};
  // Room for the lists of one block of rows only, in every search.
  CHECK(search({cluster(130, 10, 0.001, 3), cluster(530, 10, 0.001, 4), 10, 1, true, true, 1}).searched(130, 0));
  CHECK(search({duplicates(1, 3, 2), duplicates(1, 2500, 2), 2, 3, true, true, 1}).searched(3, 3));
  search({{}, normal(260, 20, 14), 20, 4, true, true, 1});
  search({normal(130, 20, 15), normal(200, 20, 16), 20, 4, true, true, 1});
}

}  // namespace neighbor_cases
