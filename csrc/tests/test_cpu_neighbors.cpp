// The CPU neighbour search against a plain one with the sums that neighbors/neighbors.h defines: equal in every bit.
#include <algorithm>

#include "cpu_check.h"
#include "neighbors/cpu_search.h"
#include "neighbors_reference.h"

namespace {

using namespace scan_fast;
using neighbor_cases::check_found;
using neighbor_cases::cluster;
using neighbor_cases::integers;
using neighbor_cases::lane_sum;
using neighbor_cases::normal;

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
  check_found(problem, similarity, index);
  return again;
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
  for (const bool normalize : {true, false}) {
    search({{}, integers(520, 5, 8), 5, 20, normalize});
    search({{}, std::vector<float>(140 * 8, 0.0f), 8, 5, normalize});
  }
}

// Too many rows are close for the spacing of 16-bit values, so the float32 search decides.
void rows_that_are_close() {
  const bool coarse =
      amx_is_usable() || cpu_multiplies_bf16_vectors() || cpu_has_avx512_vnni() || neighbors::kernels().prefers_int16;
  const std::vector<float> x = cluster(1500, 24, 0.01, 9);
  for (const Case& c : {Case{{}, x, 24, 5}, Case{cluster(30, 24, 0.01, 10), x, 24, 5}}) {
    const SearchedAgain again = search(c);
    CHECK((again.finely > 0) == coarse);
    CHECK(again.exactly == 0);
  }
}

// Rows near the axes: their largest element rounds to 1, which is one more than the largest 16-bit integer.
void rows_along_axes() {
  std::vector<float> x = normal(700, 6, 12, 0.01);
  for (int64_t i = 0; i < 700; ++i) x[i * 6 + i % 6] = i % 4 < 2 ? 1.0f : -1.0f;
  for (int64_t i = 0; i < 60; ++i) std::fill_n(&x[i * 6], 6, 0.0f), x[i * 6 + i % 6] = i % 5 < 2 ? 3.0f : -2.0f;
  for (const bool normalize : {true, false}) CHECK(search({{}, x, 6, 8, normalize}).exactly == 0);
}

// "dot": rows of similar lengths, and rows that would lose every bit in the spacing of the longest one.
void rows_of_different_lengths() {
  for (const double range : {1.9, 1e6}) {
    std::vector<float> x = normal(400, 20, 13);
    for (int64_t i = 0; i < 400; ++i) {
      const double length = std::sqrt(lane_sum(&x[i * 20], &x[i * 20], 20));
      const double wanted = std::pow(range, static_cast<double>(i) / 400);
      for (int64_t d = 0; d < 20; ++d) x[i * 20 + d] = static_cast<float>(x[i * 20 + d] * wanted / length);
    }
    CHECK(search({{}, x, 20, 6, false}).exactly == 0);
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
  for (const auto which :
       {TileProducts::kFloat32, TileProducts::kInt16Vectors, TileProducts::kBf16Vectors, TileProducts::kBf16Amx}) {
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
        const double length = std::sqrt(lane_sum(&x[i * dim], &x[i * dim], dim));
        neighbors::kernels().round(&x[i * dim], 1 / length, dim, engine.rounding(), &rounded[i * dim]);
        engine.pack_left(&rounded[i * dim], i, left.data());
        engine.pack_right(&rounded[i * dim], i, right.data());
      }
      const int64_t first_row = engine.tile_rows, first_column = engine.tile_columns;
      engine.multiply(left.data(), first_row, right.data(), first_column, tile.data());
      for (int64_t i = 0; i < engine.tile_rows; ++i) {
        for (int64_t j = 0; j < engine.tile_columns; ++j) {
          const double exact = lane_sum(&rounded[(first_row + i) * dim], &rounded[(first_column + j) * dim], dim);
          CHECK_NEAR(tile[i * engine.tile_columns + j], exact, 1e-7 * static_cast<double>(dim + 16));
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
  RUN(rows_that_are_close);
  RUN(rows_along_axes);
  RUN(rows_of_different_lengths);
  RUN(rows_that_are_not_finite);
  RUN(products_of_packed_rows);
  return check::finish();
}
