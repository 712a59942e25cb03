// The CPU neighbour search against a plain one with the sums that neighbors/neighbors.h defines: equal in every bit.
#include <algorithm>

#include "cpu_check.h"
#include "neighbors/cpu_search.h"
#include "neighbors/neighbors.h"

namespace {

using namespace scan_fast;

double lane_sum(const float* a, const float* b, int64_t dim) {
  double lane[32] = {};
  for (int64_t d = 0; d < dim; ++d) lane[d % 32] += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  for (int half = 16; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

struct Case {
  std::vector<float> queries, database;  // queries empty: a self-search
  int64_t dim, k;
  bool normalize = true;
};

SearchedAgain search(const Case& c) {
  const bool self = c.queries.empty();
  const std::vector<float>& q = self ? c.database : c.queries;
  const int64_t rows = static_cast<int64_t>(q.size()) / c.dim, n = static_cast<int64_t>(c.database.size()) / c.dim;
  const TopkProblem problem{q.data(), c.database.data(), rows, n, c.dim, c.k, c.normalize, self};
  std::vector<float> similarity(rows * c.k, NAN);
  std::vector<int64_t> index(rows * c.k, -7);
  const SearchedAgain again = topk_neighbors_cpu(problem, similarity.data(), index.data());
  std::vector<double> length(n), query_length(rows);
  for (int64_t j = 0; j < n; ++j)
    length[j] = std::sqrt(lane_sum(&c.database[j * c.dim], &c.database[j * c.dim], c.dim));
  for (int64_t i = 0; i < rows; ++i) query_length[i] = std::sqrt(lane_sum(&q[i * c.dim], &q[i * c.dim], c.dim));
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t j = 0; j < n; ++j) {
      if (!std::isfinite(length[j]) || !std::isfinite(query_length[i]) || (self && i == j)) continue;
      double sum = lane_sum(&q[i * c.dim], &c.database[j * c.dim], c.dim);
      if (c.normalize) sum /= std::max(query_length[i], 1e-12) * std::max(length[j], 1e-12);
      all.emplace_back(-static_cast<float>(sum), j);
    }
    std::sort(all.begin(), all.end());
    all.resize(c.k, {INFINITY, -1});
    for (int64_t rank = 0; rank < c.k; ++rank) {
      CHECK(similarity[i * c.k + rank] == -all[rank].first);
      CHECK(index[i * c.k + rank] == all[rank].second);
    }
  }
  return again;
}

std::vector<float> normal(int64_t rows, int64_t dim, uint64_t seed) {
  check::Random random{seed};
  std::vector<float> x(rows * dim);
  for (float& value : x) value = static_cast<float>(random.normal());
  return x;
}

// The float32 search decides every row: none is left to brute force.
void odd_sizes() {
  for (const bool normalize : {true, false}) {
    CHECK(search({{}, normal(300, 37, 1), 37, 7, normalize}).exactly == 0);
    CHECK(search({{}, normal(131, 129, 2), 129, 1, normalize}).exactly == 0);
    CHECK(search({normal(45, 3, 3), normal(530, 3, 4), 3, 20, normalize}).exactly == 0);
    search({{}, normal(2, 1, 3), 1, 1, normalize});
    search({normal(3, 2, 3), normal(1, 2, 4), 2, 1, normalize});
  }
}

void several_blocks() {
  CHECK(search({{}, normal(1100, 24, 5), 24, 10}).exactly == 0);
  CHECK(search({normal(600, 24, 6), normal(900, 24, 7), 24, 10}).exactly == 0);
}

void ties_and_duplicates() {
  check::Random random{8};
  std::vector<float> integers(520 * 5);
  for (float& value : integers) value = static_cast<float>(static_cast<int>(random.bits() % 5) - 2);
  for (const bool normalize : {true, false}) {
    search({{}, integers, 5, 20, normalize});
    search({{}, std::vector<float>(140 * 8, 0.0f), 8, 5, normalize});
  }
}

void rows_that_are_not_finite() {
  std::vector<float> x = normal(290, 10, 8);
  for (int64_t row = 0; row < 290; row += 7) x[row * 10 + row % 10] = row % 2 ? NAN : -INFINITY;
  search({{}, x, 10, 6});
}

// Tiles of rows that are rounded and packed, by every product that this processor has.
void products_of_packed_rows() {
  using neighbors::TileProducts;
  for (const auto which : {TileProducts::kFloat32, TileProducts::kBf16Vectors, TileProducts::kBf16Amx}) {
    if (which == TileProducts::kBf16Amx && !amx_is_usable()) continue;
    for (const int64_t dim : {1, 2, 33, 64, 129}) {
      const neighbors::TileEngine engine(which, dim);
      const neighbors::EngineSession session(engine);
      const int64_t rows = 2 * engine.tile_columns, panels = rows / engine.panel_rows;
      const std::vector<float> x = normal(rows, dim, 11);
      std::vector<float> rounded(rows * dim), tile(engine.tile_rows * engine.tile_columns, NAN);
      neighbors::Buffer<uint8_t> left, right;
      for (auto* side : {&left, &right}) {
        side->grow(panels * engine.panel_bytes);
        std::fill_n(side->data(), panels * engine.panel_bytes, uint8_t{0});
      }
      for (int64_t i = 0; i < rows; ++i) {
        neighbors::kernels().round(&x[i * dim], 1.0, dim, engine.rounds_to_bf16(), &rounded[i * dim]);
        engine.pack_left(&rounded[i * dim], i, left.data());
        engine.pack_right(&rounded[i * dim], i, right.data());
      }
      const int64_t first_row = engine.tile_rows, first_column = engine.tile_columns;
      engine.multiply(left.data(), first_row, right.data(), first_column, tile.data());
      for (int64_t i = 0; i < engine.tile_rows; ++i) {
        for (int64_t j = 0; j < engine.tile_columns; ++j) {
          const double exact = lane_sum(&rounded[(first_row + i) * dim], &rounded[(first_column + j) * dim], dim);
          CHECK_NEAR(tile[i * engine.tile_columns + j], exact, 1e-6 * static_cast<double>(dim + 1));
        }
      }
    }
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(odd_sizes);
  RUN(several_blocks);
  RUN(ties_and_duplicates);
  RUN(rows_that_are_not_finite);
  RUN(products_of_packed_rows);
  return check::finish();
}
