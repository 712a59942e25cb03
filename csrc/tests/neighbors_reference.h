// The neighbour search by its definition (neighbors/neighbors.h), for the tests of the CPU and of the CUDA kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "neighbors/neighbors.h"

namespace neighbor_cases {

using namespace scan_fast;

// The sum of neighbors.h.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("O3")))
#endif
__attribute__((no_sanitize("address", "undefined"))) inline double lane_sum(const float* a, const float* b,
                                                                            int64_t dim) {
  double lane[32] = {};
  int64_t first = 0;
  for (; first + 32 <= dim; first += 32) {
    for (int64_t l = 0; l < 32; ++l) lane[l] += static_cast<double>(a[first + l]) * static_cast<double>(b[first + l]);
  }
  for (int64_t d = first; d < dim; ++d) lane[d % 32] += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  for (int half = 16; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

// Checks the results of a search: equal in every bit.
inline void check_found(const TopkProblem& problem, const std::vector<float>& similarity,
                        const std::vector<int64_t>& index) {
  const int64_t dim = problem.dim, k = problem.k, n = problem.n_database;
  std::vector<double> length(n), query_length(problem.n_queries);
  const auto measure = [&](const float* v) { return std::sqrt(lane_sum(v, v, dim)); };
  for (int64_t j = 0; j < n; ++j) length[j] = measure(problem.database + j * dim);
  for (int64_t i = 0; i < problem.n_queries; ++i) query_length[i] = measure(problem.queries + i * dim);
  for (int64_t i = 0; i < problem.n_queries; ++i) {
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t j = 0; j < n; ++j) {
      if (!std::isfinite(length[j]) || !std::isfinite(query_length[i]) || (problem.exclude_self && i == j)) continue;
      double sum = lane_sum(problem.queries + i * dim, problem.database + j * dim, dim);
      if (problem.normalize) sum /= std::max(query_length[i], 1e-12) * std::max(length[j], 1e-12);
      if (static_cast<float>(sum) > -INFINITY) all.emplace_back(-static_cast<float>(sum), j);
    }
    std::partial_sort(all.begin(), all.begin() + std::min<int64_t>(k, all.size()), all.end());
    all.resize(k, {INFINITY, -1});
    for (int64_t rank = 0; rank < k; ++rank) {
      CHECK(similarity[i * k + rank] == -all[rank].first);
      CHECK(index[i * k + rank] == all[rank].second);
    }
  }
}

// Rows of independent normal values.
inline std::vector<float> normal(int64_t rows, int64_t dim, uint64_t seed, double scale = 1) {
  check::Random random{seed};
  std::vector<float> x(rows * dim);
  for (float& value : x) value = static_cast<float>(scale * random.normal());
  return x;
}

// Rows of small integers, with many ties.
inline std::vector<float> integers(int64_t rows, int64_t dim, uint64_t seed) {
  check::Random random{seed};
  std::vector<float> x(rows * dim);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random.bits() % 5) - 2);
  return x;
}

// Rows of length about one around a center, `spread` from it.
inline std::vector<float> cluster(int64_t rows, int64_t dim, double spread, uint64_t seed) {
  const std::vector<float> center = normal(1, dim, 99, 1 / std::sqrt(dim));
  std::vector<float> x = normal(rows, dim, seed, spread / std::sqrt(dim));
  for (int64_t e = 0; e < rows * dim; ++e) x[e] += center[e % dim];
  return x;
}

}  // namespace neighbor_cases
