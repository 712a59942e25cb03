// The GPU neighbour search, run on the host, against a plain search with the same sums: equal bit for bit.
#include "neighbors_cases.h"

namespace {

using namespace neighbor_cases;

void more_copies_than_a_list_holds() {
  emu::options() = {};
  // 1,100 copies fit into the lists of the finer search, 2,500 into none.
  CHECK(search({duplicates(1, 2, 8), duplicates(2, 1100, 8), 8, 3}).searched(2, 0));
  CHECK(search({duplicates(1, 2, 8), duplicates(1, 2500, 8), 8, 3}).searched(2, 2));
}

// Three column splits of the finer search, each with equal rows, which are nearer in the first than in the others: all
// lists together have more values than the shared memory of a decision.
void many_candidates_in_several_splits() {
  emu::options() = {.multiprocessors = 3};
  std::vector<float> x;
  for (const int64_t rows : {1664, 1664, 1772}) {
    const float y = x.empty() ? 1.0f : rows == 1664 ? 2.0f : 3.0f;
    for (int64_t j = 0; j < rows; ++j) x.insert(x.end(), {1.0f, y, 0.0f});
  }
  CHECK(search({{1.0f, 1.0f, 0.0f}, x, 3, 5}).searched(1, 0));
}

void tight_clusters_are_decided_by_the_finer_product() {
  emu::options() = {.detect_races = true};
  for (const bool normalize : {true, false}) {
    // 1,500 rows whose similarities differ by far less than float16 resolves, then by less than 22 bits do.
    for (const double scale : {1.0, 0.03}) {
      const double spread = scale * (normalize ? 0.01 : 0.0005);
      const Found few = search({cluster(5, 24, spread, 1), cluster(1500, 24, spread, 2), 24, 5, normalize});
      CHECK(few.searched(5, 0));
    }
  }
  // More blocks of queries than blocks, in turns on the same lists; and a self-search.
  emu::options() = {.seed = 5};
  CHECK(search({cluster(200, 10, 0.01, 3), cluster(650, 10, 0.01, 4), 10, 2}).searched(200, 0));
  CHECK(search({{}, cluster(520, 70, 0.01, 5), 70, 1}).searched(520, 0));
}

void differences_in_the_last_places() {
  emu::options() = {};
  // Steps of one unit in the last place of float32, which 22 bits do not resolve: lists hold all of them, or none does.
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
        const auto up = [](int64_t count) { return (count + 255) / 256 * 256; };
        const int64_t rows = up(n) * (4 * padded + 8), more = up(queries) * (4 * padded + 48);
        CHECK(static_cast<int64_t>(topk_neighbors_cuda_workspace(other, kList)) <= rows + more + lists);
        CHECK(static_cast<int64_t>(topk_neighbors_cuda_workspace(self, kList)) <= up(n) * (4 * padded + 48) + lists);
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

// As on compute capabilities 8.6, 8.9 and 12.0.
void little_shared_memory() {
  emu::options() = {.detect_races = true, .shared_memory = 99 * 1024};
  CHECK(search({{}, normal(300, 200, 1), 200, 7}).searched(0, 0));
  CHECK(search({normal(5, 3, 3), normal(530, 3, 4), 3, 20, false}).searched(0, 0));
  emu::options() = {};
}

}  // namespace

int main() {
  RUN(little_shared_memory);
  RUN(odd_sizes);
  RUN(any_order_of_threads);
  RUN(ties);
  RUN(more_copies_than_a_list_holds);
  RUN(many_candidates_in_several_splits);
  RUN(tight_clusters_are_decided_by_the_finer_product);
  RUN(differences_in_the_last_places);
  RUN(one_giant_hides_nobody);
  RUN(zero_and_opposite_rows);
  RUN(truncating_units);
  RUN(broken_rows);
  RUN(magnitudes);
  RUN(most_rows_are_neighbours);
  RUN(batches_of_queries);
  RUN(self_is_kept_on_request);
  RUN(memory_is_bounded_as_documented);
  RUN(no_queries);
  return check::finish();
}
