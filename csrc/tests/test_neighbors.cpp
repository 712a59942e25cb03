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
  int64_t again;
};

Found search(const Case& c) {
  const bool self = c.queries.empty();
  const std::vector<float>& q = self ? c.database : c.queries;
  const int64_t n_queries = static_cast<int64_t>(q.size()) / c.dim, n = static_cast<int64_t>(c.database.size()) / c.dim;
  const TopkProblem problem{q.data(), c.database.data(), n_queries, n, c.dim, c.k, c.normalize, self && c.exclude_self};
  Found found{std::vector<float>(n_queries * c.k, NAN), std::vector<int64_t>(n_queries * c.k, -7), -7};
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
    CHECK(search({{}, normal(300, 37, 1), 37, 7, normalize}).again == 0);
    CHECK(search({{}, normal(131, 129, 2), 129, 1, normalize}).again == 0);
    CHECK(search({normal(5, 3, 3), normal(530, 3, 4), 3, 20, normalize}).again == 0);
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
  CHECK(found[0].again == found[1].again && found[0].again == found[2].again);
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
  const Found found = search({duplicates(1, 2, 8), duplicates(2, 1100, 8), 8, 3});
  CHECK(found.again == 2);
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
  CHECK(search({{}, integers(60, 4, 12), 4, 59}).again == 0);
  CHECK(search({normal(4, 4, 1), normal(33, 4, 13), 4, 33}).again == 0);
}

void batches_of_queries() {
  emu::options() = {};
  // Room for the lists of one block of rows only.
  search({{}, normal(300, 20, 14), 20, 4, true, true, 1});
  search({normal(270, 20, 15), normal(200, 20, 16), 20, 4, true, true, 1});
}

void self_is_kept_on_request() {
  emu::options() = {};
  const Found found = search({{}, normal(70, 9, 17), 9, 2, true, false});
  for (int64_t i = 0; i < 70; ++i) CHECK(found.index[2 * i] == i);
}

void no_queries() {
  emu::options() = {};
  const std::vector<float> x = normal(5, 2, 1);
  int64_t again = -7;
  const TopkProblem problem{x.data(), x.data(), 0, 5, 2, 2, true, false};
  std::vector<unsigned char> workspace(topk_neighbors_cuda_workspace(problem));
  topk_neighbors_cuda(problem, nullptr, nullptr, &again, workspace.data(), nullptr);
  CHECK(again == 0);
}

}  // namespace

int main() {
  RUN(odd_sizes);
  RUN(any_order_of_threads);
  RUN(ties);
  RUN(more_copies_than_a_list_holds);
  RUN(broken_rows);
  RUN(magnitudes);
  RUN(most_rows_are_neighbours);
  RUN(batches_of_queries);
  RUN(self_is_kept_on_request);
  RUN(no_queries);
  return check::finish();
}
