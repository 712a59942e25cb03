// Exact top-k neighbours on the CPU. neighbors.h has the definition, and explains why a fast search can be exact.
//
// Searches in order, each for the rows that the previous ones could not decide:
//   16-bit values, short lists: bfloat16 on AMX tiles; or integers if they are faster than float32 (AVX-512-VNNI, AVX2, SSE2)
//   and the lengths of the rows are similar; or bfloat16 in vectors (AVX-512-BF16);
//   float32, long lists (its bound is about 100 times tighter than that of bfloat16);
//   float64 brute force.
// The fast searches process queries in blocks (cpu_blocks.cpp). If the queries are the database and many are undecided,
// they multiply every pair of rows once (cpu_symmetric.cpp). Packing costs N D, the exact similarities of the
// candidates about 2 k Q D.
//
// Why integers. Rows of length one have elements in [-1, 1]. In units of 2^-15 these are 16-bit integers, with a residual
// of about sqrt(D / 12) 2^-15: a fifth of that of bfloat16 for D = 512. One instruction multiplies pairs of them and adds
// the two products, so a register holds twice as many factors as in float32. The sums are exact: by Cauchy-Schwarz they
// and all partial sums are at most |u^_i| |u^_j| 2^30 < 2^31. Only their conversion to float32 rounds. Measured on Zen 3,
// for tiles in the L1 cache: 150 G operations per second and core, and 90 with float32. The limits are 162 and 97. With
// AVX-512 the instruction of VNNI also adds the products to the sums, which makes integers as fast as bfloat16 values; on
// Zen 5 their shorter lists save 4 to 10 % of a search.
//
// Every search ends with the same exact similarities. So the result does not depend on the CPU, on the number of
// threads or on which search decided a row.
#include <numeric>

#include "neighbors/cpu_search.h"

namespace scan_fast {
namespace neighbors {

const CpuKernels& kernels() { return SCAN_FAST_BEST_ISA(neighbor_kernels)(); }

float Search::exact(int64_t i, int64_t j) const {
  const int64_t dim = problem.dim;
  const double sum = kernels().dot(problem.queries + i * dim, problem.database + j * dim, dim);
  const double value =
      problem.normalize ? sum / (cosine_length(queries.length[i]) * cosine_length(database.length[j])) : sum;
  return static_cast<float>(value) + 0.0f;  // -0 becomes 0
}

void Search::write(int64_t i, std::vector<Neighbor>& found) const {
  const int64_t k = problem.k, n = std::min<int64_t>(k, static_cast<int64_t>(found.size()));
  std::partial_sort(found.begin(), found.begin() + n, found.end(), better);
  for (int64_t rank = 0; rank < k; ++rank) {
    const bool valid = rank < n && found[rank].similarity > -std::numeric_limits<float>::infinity();
    similarity[i * k + rank] = valid ? found[rank].similarity : -std::numeric_limits<float>::infinity();
    index[i * k + rank] = valid ? found[rank].index : -1;
  }
}

// Returns eps of neighbors.h for one rounded query, in the units of the fast search.
double Search::error_bound(int64_t i, const RoundedRow& rounded, const PackedDatabase& packed) const {
  const double length = queries.length[i] * queries.scale[i];
  // If float32 could overflow, distant similarities can tie, and no fast search can tell them apart.
  if (!problem.normalize && queries.length[i] * database.longest >= std::ldexp(1.0, 127)) {
    return std::numeric_limits<double>::infinity();
  }
  const double longest = packed.longest + packed.worst_residual;
  const double accumulation = static_cast<double>(problem.dim + 16) * std::ldexp(1.0, -23);
  const double underflow = static_cast<double>(problem.dim + 16) * std::ldexp(1.0, -124);
  // The exact similarity is rounded to float32: at most half a unit in the last place on either side of a tie.
  const double spacing = length * longest * std::ldexp(1.0, -23) +
                         std::ldexp(problem.normalize ? 1.0 : queries.unit * database.unit, -149);
  const double bound = length * packed.worst_residual + std::sqrt(rounded.residual_squared) * packed.longest +
                       accumulation * std::sqrt(rounded.norm_squared) * packed.longest + underflow + spacing;
  return bound * 1.001;  // covers the rounding of this expression and of the lengths
}

void Search::open(int64_t i, const RoundedRow& rounded, const PackedDatabase& packed, CandidateLists& lists,
                  int64_t row) const {
  const double bound = error_bound(i, rounded, packed);
  if (!std::isfinite(bound)) {
    lists.overflow[row] = 1;
    return;
  }
  lists.threshold[row] = -std::numeric_limits<float>::max();
  lists.margin[row] = 2 * bound;
  lists.self[row] = problem.exclude_self ? i : -1;
}

bool Search::decide(int64_t i, CandidateLists& lists, int64_t row, std::vector<Neighbor>& found) const {
  if (lists.overflow[row]) return false;
  kernels().tighten(lists, row, /*final=*/true);
  const int64_t first = row * lists.capacity, count = lists.count[row], k = std::min(problem.k, count);
  found.resize(count);
  for (int64_t c = 0; c < count; ++c) found[c] = {lists.value[first + c], lists.index[first + c]};
  const auto make_exact = [&](int64_t begin, int64_t end) {
    constexpr int64_t kAhead = 4;  // prefetch distance in rows
    for (int64_t c = begin; c < end; ++c) {
      const float* const next = problem.database + found[std::min(c + kAhead, end - 1)].index * problem.dim;
      for (int64_t d = 0; d < problem.dim; d += 16) __builtin_prefetch(next + d, 0, 2);
      found[c].similarity = exact(i, found[c].index);
    }
  };
  if (k < count) std::nth_element(found.begin(), found.begin() + k, found.end(), better);
  make_exact(0, k);
  // Once k exact similarities are known, half the margin suffices: a column eps below the least cannot enter.
  double least = std::numeric_limits<double>::infinity();
  for (int64_t c = 0; c < k; ++c) least = std::min(least, static_cast<double>(found[c].similarity));
  const double bound = least * (problem.normalize ? 1.0 : queries.unit * database.unit) - 0.5 * lists.margin[row];
  found.erase(std::remove_if(found.begin() + k, found.end(), [&](const Neighbor& c) { return c.similarity < bound; }),
              found.end());
  make_exact(k, static_cast<int64_t>(found.size()));
  write(i, found);
  return true;
}

}  // namespace neighbors

namespace {

using namespace neighbors;

constexpr int64_t kRowsPerTask = 64;  // for work that is linear in the number of rows

Rows measure(const float* data, int64_t n, int64_t dim, bool normalize) {
  Rows rows{data, std::vector<double>(n), std::vector<double>(n)};
  parallel_for(ceil_div(n, kRowsPerTask), [&](int64_t task, int) {
    for (int64_t i = task * kRowsPerTask; i < std::min(n, (task + 1) * kRowsPerTask); ++i) {
      rows.length[i] = std::sqrt(kernels().dot(data + i * dim, data + i * dim, dim));
    }
  });
  for (const double length : rows.length) {
    if (!std::isfinite(length)) continue;
    rows.longest = std::max(rows.longest, length);
    if (length > 0) rows.shortest = rows.shortest > 0 ? std::min(rows.shortest, length) : length;
  }
  int exponent = 0;
  if (rows.longest > 0) std::frexp(rows.longest, &exponent);
  rows.unit = std::ldexp(1.0, -exponent);
  for (int64_t i = 0; i < n; ++i) rows.scale[i] = normalize ? 1 / cosine_length(rows.length[i]) : rows.unit;
  return rows;
}

// Returns whether the first search should multiply integers of 16 bits. They have the same spacing for all rows, so for
// "dot" the rows must be of similar lengths: the bound of a short row would hardly exclude anything.
bool int16_serves(const Search& search) {
  constexpr double kRange = 2;
  constexpr int64_t kMaxDim = int64_t{1} << 24;  // keeps rounded rows shorter than 1.2, so that no product overflows
  return (kernels().prefers_int16 || cpu_has_avx512_vnni()) && search.problem.dim <= kMaxDim &&
         (search.problem.normalize || (search.queries.longest <= kRange * search.queries.shortest &&
                                       search.database.longest <= kRange * search.database.shortest));
}

void search_exactly(const Search& search, const std::vector<int64_t>& wanted) {
  const TopkProblem& problem = search.problem;
  // A few queries share each database row while it is in the L1 cache.
  constexpr int64_t kGroup = 8;
  const int64_t total = static_cast<int64_t>(wanted.size()), k = problem.k;
  parallel_for(ceil_div(total, kGroup), [&](int64_t task, int) {
    const int64_t begin = task * kGroup, rows = std::min(kGroup, total - begin);
    std::vector<Neighbor> found[kGroup];
    float bound[kGroup];
    std::fill_n(bound, kGroup, -std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < problem.n_database; ++j) {
      if (search.skip[j]) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = wanted[begin + r];
        if (!search.queries.usable(i) || (problem.exclude_self && i == j)) continue;
        const float similarity = search.exact(i, j);
        // Later rows have larger indices, so one that only equals the k-th best loses the tie.
        if (!(similarity > bound[r])) continue;
        found[r].push_back({similarity, static_cast<int32_t>(j)});
        if (static_cast<int64_t>(found[r].size()) >= 2 * k + 64) {
          std::nth_element(found[r].begin(), found[r].begin() + (k - 1), found[r].end(), better);
          bound[r] = found[r][k - 1].similarity;
          found[r].resize(k);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) search.write(wanted[begin + r], found[r]);
  });
}

// Limit for the lists of a symmetric search.
constexpr int64_t kSymmetricBytes = int64_t{256} << 20;

// Searches the open queries with one kind of product. Returns those that are still open. The capacity of a list is
// twice what is usually kept, and holds what the final threshold of hard rows lets through.
std::vector<int64_t> search_fast(const Search& search, const std::vector<int64_t>& wanted, bool self_search,
                                 TileProducts products) {
  const TopkProblem& problem = search.problem;
  const int64_t n = problem.n_database, open = static_cast<int64_t>(wanted.size());
  // A symmetric search does half the work for all rows and keeps the lists of all rows. So its lists are shorter and
  // take at most four times the memory of the database.
  const int64_t symmetric_capacity = 256 + 4 * problem.k;
  const bool symmetric =
      self_search && 2 * open > n && n * symmetric_capacity * 8 <= std::max(kSymmetricBytes, 16 * n * problem.dim);
  std::vector<int64_t> rest = symmetric ? search_symmetric(search, products, symmetric_capacity) : wanted;
  // If most rows are too close for integers, a symmetric search by float32 decides more at the same cost.
  if (symmetric && products == TileProducts::kInt16Vectors && 2 * static_cast<int64_t>(rest.size()) > n) return rest;
  return search_blocks(search, rest, products, (products == TileProducts::kFloat32 ? 8192 : 1024) + 8 * problem.k);
}

}  // namespace

SearchedAgain topk_neighbors_cpu(const TopkProblem& problem, float* similarity, int64_t* index) {
  if (problem.n_queries == 0) return {};
  const bool same = problem.queries == problem.database && problem.n_queries == problem.n_database;
  const Rows database = measure(problem.database, problem.n_database, problem.dim, problem.normalize);
  const Rows other = same ? Rows{} : measure(problem.queries, problem.n_queries, problem.dim, problem.normalize);
  std::vector<uint8_t> skip(problem.n_database);
  for (int64_t j = 0; j < problem.n_database; ++j) skip[j] = !database.usable(j);
  const Search search{problem, same ? database : other, database, skip, similarity, index};

  std::vector<int64_t> wanted(problem.n_queries);
  std::iota(wanted.begin(), wanted.end(), int64_t{0});
  SearchedAgain again{};
  // If most rows are neighbours, a fast search has nothing to exclude.
  if (2 * problem.k < problem.n_database) {
    const bool integers_first = cpu_has_avx512_vnni() || !cpu_multiplies_bf16_vectors();
    const TileProducts first = amx_is_usable()                          ? TileProducts::kBf16Amx
                               : integers_first && int16_serves(search) ? TileProducts::kInt16Vectors
                               : cpu_multiplies_bf16_vectors()          ? TileProducts::kBf16Vectors
                                                                        : TileProducts::kFloat32;
    wanted = search_fast(search, wanted, same, first);
    again.finely = static_cast<int64_t>(wanted.size());
    if (first != TileProducts::kFloat32) wanted = search_fast(search, wanted, same, TileProducts::kFloat32);
    again.exactly = static_cast<int64_t>(wanted.size());
  }
  search_exactly(search, wanted);
  return again;
}

}  // namespace scan_fast
