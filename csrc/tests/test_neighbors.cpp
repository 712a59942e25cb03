// The GPU neighbour search, run on the host, against a plain search with the same sums: equal bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "check.h"
#include "common/device.h"
#include "neighbors/neighbors.h"

namespace {

using namespace scan_fast;

// The sum of neighbors.h.
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
  bool normalize = true, exclude_self = true;
  int64_t list_bytes = kListBytes;
};

struct Found {
  std::vector<float> similarity;
  std::vector<int64_t> index;
  SearchedAgain again;

  bool searched(int64_t finely, int64_t exactly) const { return again.finely == finely && again.exactly == exactly; }
};

Found search(const Case& c) {
  const bool self = c.queries.empty();
  const std::vector<float>& q = self ? c.database : c.queries;
  const int64_t n_queries = static_cast<int64_t>(q.size()) / c.dim, n = static_cast<int64_t>(c.database.size()) / c.dim;
  const TopkProblem problem{q.data(), c.database.data(), n_queries, n, c.dim, c.k, c.normalize, self && c.exclude_self};
  Found found{std::vector<float>(n_queries * c.k, NAN), std::vector<int64_t>(n_queries * c.k, -7), {-7, -7}};
  const size_t bytes = topk_neighbors_cuda_workspace(problem, c.list_bytes);
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(256, (bytes + 255) / 256 * 256), std::free);
  std::memset(workspace.get(), 0xff, bytes);  // as if the memory had been used before
  topk_neighbors_cuda(problem, found.similarity.data(), found.index.data(), &found.again, workspace.get(), nullptr,
                      c.list_bytes);

  std::vector<double> length(n), query_length(n_queries);
  const auto measure = [&](const float* v) { return std::sqrt(lane_sum(v, v, c.dim)); };
  for (int64_t j = 0; j < n; ++j) length[j] = measure(&c.database[j * c.dim]);
  for (int64_t i = 0; i < n_queries; ++i) query_length[i] = measure(&q[i * c.dim]);
  for (int64_t i = 0; i < n_queries; ++i) {
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t j = 0; j < n; ++j) {
      if (!std::isfinite(length[j]) || !std::isfinite(query_length[i]) || (problem.exclude_self && i == j)) continue;
      double sum = lane_sum(&q[i * c.dim], &c.database[j * c.dim], c.dim);
      if (c.normalize) sum /= std::max(query_length[i], 1e-12) * std::max(length[j], 1e-12);
      if (static_cast<float>(sum) > -INFINITY) all.emplace_back(-static_cast<float>(sum), j);
    }
    std::sort(all.begin(), all.end());
    all.resize(c.k, {INFINITY, -1});
    for (int64_t rank = 0; rank < c.k; ++rank) {
      CHECK(found.similarity[i * c.k + rank] == -all[rank].first);
      CHECK(found.index[i * c.k + rank] == all[rank].second);
    }
  }
  return found;
}

std::vector<float> normal(int64_t rows, int64_t dim, uint64_t seed, double scale = 1) {
  check::Random random{seed};
  std::vector<float> x(rows * dim);
  for (float& value : x) value = static_cast<float>(scale * random.normal());
  return x;
}

std::vector<float> integers(int64_t rows, int64_t dim, uint64_t seed) {
  check::Random random{seed};
  std::vector<float> x(rows * dim);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random.bits() % 5) - 2);
  return x;
}

// `copies` copies of each of `kinds` rows.
std::vector<float> duplicates(int64_t kinds, int64_t copies, int64_t dim) {
  const std::vector<float> base = normal(kinds, dim, 5);
  std::vector<float> x;
  for (int64_t c = 0; c < copies; ++c) x.insert(x.end(), base.begin(), base.end());
  return x;
}

void odd_sizes() {
  emu::options() = {.detect_races = true};
  for (const bool normalize : {true, false}) {
    CHECK(search({{}, normal(300, 37, 1), 37, 7, normalize}).searched(0, 0));
    CHECK(search({{}, normal(131, 129, 2), 129, 1, normalize}).searched(0, 0));
    CHECK(search({normal(5, 3, 3), normal(530, 3, 4), 3, 20, normalize}).searched(0, 0));
    search({{}, normal(2, 1, 3), 1, 1, normalize});
    search({normal(3, 2, 3), normal(1, 2, 4), 2, 1, normalize});
  }
}

void any_order_of_threads() {
  std::vector<Found> found;
  for (const uint64_t seed : {0, 1, 2}) {
    emu::options() = {.detect_races = true, .seed = seed};
    found.push_back(search({integers(150, 6, 8), integers(270, 6, 9), 6, 9}));
  }
  for (const Found& other : found) CHECK(other.searched(found[0].again.finely, found[0].again.exactly));
}

void ties() {
  emu::options() = {};
  for (const bool normalize : {true, false}) {
    search({integers(30, 5, 1), integers(520, 5, 6), 5, 20, normalize});
    search({{}, duplicates(4, 80, 16), 16, 20, normalize});
    search({{}, std::vector<float>(140 * 8, 0.0f), 8, 5, normalize});
  }
}

void more_copies_than_a_list_holds() {
  emu::options() = {};
  // 1,100 copies fit into the lists of the finer search, 2,500 into none.
  CHECK(search({duplicates(1, 2, 8), duplicates(2, 1100, 8), 8, 3}).searched(2, 0));
  CHECK(search({duplicates(1, 2, 8), duplicates(1, 2500, 8), 8, 3}).searched(2, 2));
}

// Rows of length about one around a center, `spread` from it.
std::vector<float> cluster(int64_t rows, int64_t dim, double spread, uint64_t seed) {
  const std::vector<float> center = normal(1, dim, 99, 1 / std::sqrt(dim));
  std::vector<float> x = normal(rows, dim, seed, spread / std::sqrt(dim));
  for (int64_t e = 0; e < rows * dim; ++e) x[e] += center[e % dim];
  return x;
}

void tight_clusters_are_decided_by_the_finer_product() {
  emu::options() = {.detect_races = true};
  for (const bool normalize : {true, false}) {
    // 1,500 rows whose similarities differ by far less than float16 resolves, then by less than 22 bits do.
    for (const double scale : {1.0, 0.1, 0.03}) {
      const double spread = scale * (normalize ? 0.01 : 0.0005);
      const Found few = search({cluster(5, 24, spread, 1), cluster(1500, 24, spread, 2), 24, 5, normalize});
      CHECK(few.searched(5, 0));
    }
  }
  // More blocks of queries than blocks, in turns on the same lists; and a self-search.
  emu::options() = {.seed = 5};
  CHECK(search({cluster(200, 70, 0.01, 3), cluster(650, 70, 0.01, 4), 70, 2}).searched(200, 0));
  CHECK(search({{}, cluster(645, 40, 0.01, 5), 40, 3}).searched(645, 0));
}

void differences_in_the_last_places() {
  emu::options() = {};
  // Steps of one unit in the last place of float32, below what 22 bits resolve: lists hold all of them, or none does.
  std::vector<float> x(600 * 2), queries = {1.0f, 0.5f, 0.5f, 1.0f};
  for (int64_t j = 0; j < 600; ++j) {
    x[2 * j] = std::nextafter(1.0f, j % 2 ? 2.0f : 0.0f) + static_cast<float>(j % 7) * 0x1p-23f;
    x[2 * j + 1] = 1.0f - static_cast<float>(j % 11) * 0x1p-24f;
  }
  for (const bool normalize : {true, false}) search({queries, x, 2, 9, normalize});
  // Long rows of one sign: truncated sums err most.
  std::vector<float> ones(700 * 300, 1.0f);
  for (int64_t j = 0; j < 700; ++j) ones[j * 300 + j % 300] += static_cast<float>(j) * 0x1p-20f;
  search({std::vector<float>(2 * 300, 1.0f), ones, 300, 4, false});
}

void one_giant_hides_nobody() {
  emu::options() = {};
  // Dot products: all rows are scaled by the longest, so the others are left with few bits, or none.
  for (const float factor : {1e3f, 1e9f, 1e30f}) {
    std::vector<float> x = normal(270, 7, 20);
    for (int64_t d = 0; d < 7; ++d) x[100 * 7 + d] *= factor;
    search({normal(9, 7, 21), x, 7, 6, false});
    search({std::vector<float>(&x[98 * 7], &x[103 * 7]), x, 7, 6, false});
  }
  // Lengths spread over thirty powers of ten.
  std::vector<float> x = normal(140, 7, 22);
  for (int64_t j = 0; j < 140; ++j) {
    for (int64_t d = 0; d < 7; ++d) x[j * 7 + d] *= static_cast<float>(std::pow(10.0, j % 31 - 15));
  }
  search({{}, x, 7, 6, false});
  search({{}, x, 7, 6, true});
}

void zero_and_opposite_rows() {
  emu::options() = {};
  std::vector<float> x = normal(280, 6, 23);
  for (int64_t j = 0; j < 280; j += 3) std::fill_n(&x[j * 6], 6, j % 2 ? 0.0f : -0.0f);
  for (int64_t j = 1; j < 280; j += 9) {
    for (int64_t d = 0; d < 6; ++d) x[j * 6 + d] = -x[2 * 6 + d];
  }
  for (const bool normalize : {true, false}) search({{}, x, 6, 10, normalize});
}

void broken_rows() {
  emu::options() = {};
  std::vector<float> x = normal(290, 10, 8);
  for (int64_t row = 0; row < 290; row += 7) x[row * 10 + row % 10] = row % 2 ? NAN : -INFINITY;
  search({{}, x, 10, 6});
  search({{}, std::vector<float>(40 * 3, NAN), 3, 4});
  search({normal(3, 3, 1), std::vector<float>(40 * 3, INFINITY), 3, 4});
}

void magnitudes() {
  emu::options() = {};
  for (const double scale : {1e-42, 1e-20, 1e18, 1e25}) {
    for (const bool normalize : {true, false}) search({{}, normal(70, 12, 11, scale), 12, 5, normalize});
  }
}

void most_rows_are_neighbours() {
  emu::options() = {};
  CHECK(search({{}, integers(60, 4, 12), 4, 59}).searched(0, 0));
  CHECK(search({normal(4, 4, 1), normal(33, 4, 13), 4, 33}).searched(0, 0));
}

void batches_of_queries() {
  emu::options() = {};
  // Room for the lists of one block of rows only, in every search.
  CHECK(search({cluster(135, 10, 0.001, 3), cluster(650, 10, 0.001, 4), 10, 2, true, true, 1}).searched(135, 0));
  CHECK(search({duplicates(1, 3, 2), duplicates(1, 2500, 2), 2, 3, true, true, 1}).searched(3, 3));
  search({{}, normal(300, 20, 14), 20, 4, true, true, 1});
  search({normal(270, 20, 15), normal(200, 20, 16), 20, 4, true, true, 1});
}

void self_is_kept_on_request() {
  emu::options() = {};
  const Found found = search({{}, normal(70, 9, 17), 9, 2, true, false});
  for (int64_t i = 0; i < 70; ++i) CHECK(found.index[2 * i] == i);
}

void memory_is_bounded_as_documented() {
  emu::options() = {.multiprocessors = 132};
  constexpr int64_t kList = int64_t{64} << 20;
  for (const int64_t n : {10, 1000, 50000, 1281167}) {
    for (const int64_t dim : {3, 128, 2048}) {
      for (const int64_t k : {1, 50, 1000}) {
        if (k > n) continue;
        const float* const x = reinterpret_cast<const float*>(0x1000);
        const int64_t padded = (dim + 63) / 64 * 64;
        const int64_t queries = n / 3 + 1;
        const TopkProblem other{x, x + 1, queries, n, dim, k, true, false}, self{x, x, n, n, dim, k, true, true};
        const int64_t lists = std::max({kList, (1 + k / 128) << 20, 8 * (n + 2 * k)}) + (64 << 10);
        const int64_t rows = n * (4 * padded + 8), more = queries * (4 * padded + 48);
        CHECK(static_cast<int64_t>(topk_neighbors_cuda_workspace(other, kList)) <= rows + more + lists);
        CHECK(static_cast<int64_t>(topk_neighbors_cuda_workspace(self, kList)) <= n * (4 * padded + 48) + lists);
      }
    }
  }
}

void no_queries() {
  emu::options() = {};
  const std::vector<float> x = normal(5, 2, 1);
  SearchedAgain again{-7, -7};
  const TopkProblem problem{x.data(), x.data(), 0, 5, 2, 2, true, false};
  std::vector<unsigned char> workspace(topk_neighbors_cuda_workspace(problem));
  topk_neighbors_cuda(problem, nullptr, nullptr, &again, workspace.data(), nullptr);
  CHECK(again.finely == 0 && again.exactly == 0);
}

}  // namespace

int main() {
  RUN(odd_sizes);
  RUN(any_order_of_threads);
  RUN(ties);
  RUN(more_copies_than_a_list_holds);
  RUN(tight_clusters_are_decided_by_the_finer_product);
  RUN(differences_in_the_last_places);
  RUN(one_giant_hides_nobody);
  RUN(zero_and_opposite_rows);
  RUN(broken_rows);
  RUN(magnitudes);
  RUN(most_rows_are_neighbours);
  RUN(batches_of_queries);
  RUN(self_is_kept_on_request);
  RUN(memory_is_bounded_as_documented);
  RUN(no_queries);
  return check::finish();
}
