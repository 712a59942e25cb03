// Exact top-k neighbours on the CPU. The definition, and why a fast search can be exact, is in neighbors.h.
//
// Three searches, each for the rows that the one before could not decide:
//   bfloat16 on AMX tiles (where the processor has them), short lists;
//   float32, long lists (its bound is about 100 times tighter);
//   float64 brute force.
// Tiling: a task is a block of query rows, packed once into the second cache (512 KiB); the packed database streams
// past it panel by panel, and each tile of similarities (a few KiB) is filtered while it is in the first cache. The
// N x N matrix never exists. Limit: 2 Q N D flops at the rate of the matrix unit; packing costs N D, the exact
// similarities of the candidates about 2 k Q D.
//
// Every search ends in the same exact similarities, so the result does not depend on the processor, on the number of
// threads or on which search decided a row.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "common/parallel.h"
#include "neighbors/cpu_kernels.h"
#include "neighbors/neighbors.h"

namespace scan_fast {
namespace {

using neighbors::AmxSession;
using neighbors::CandidateLists;
using neighbors::CpuKernels;
using neighbors::kAmxTile;

const CpuKernels& kernels() { return SCAN_FAST_BEST_ISA(neighbor_kernels)(); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cache-line aligned, uninitialised memory.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { grow(size); }
  void grow(int64_t size) {
    if (size <= size_) return;
    const size_t bytes = static_cast<size_t>(ceil_div(size * static_cast<int64_t>(sizeof(T)), 64)) * 64;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = size;
  }
  T* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T[], Free> memory_;
  int64_t size_ = 0;
};

// The rows of one side with what is known about them before any search.
struct Rows {
  const float* data;
  std::vector<double> length;  // sqrt(v.v), not clamped; non-finite exactly where the row has a non-finite entry
  std::vector<double> scale;   // to the units of the fast search
  double longest = 0;          // the largest finite length
  double unit = 1;             // "dot": the power of two in scale

  bool usable(int64_t row) const { return std::isfinite(length[row]); }
};

constexpr int64_t kRowsPerTask = 64;  // for work that is linear in the number of rows

double cosine_length(double length) { return std::max(length, 1e-12); }

Rows measure(const float* data, int64_t n, int64_t dim, bool normalize) {
  Rows rows{data, std::vector<double>(n), std::vector<double>(n)};
  parallel_for(ceil_div(n, kRowsPerTask), [&](int64_t task, int) {
    for (int64_t i = task * kRowsPerTask; i < std::min(n, (task + 1) * kRowsPerTask); ++i) {
      rows.length[i] = std::sqrt(kernels().dot(data + i * dim, data + i * dim, dim));
    }
  });
  for (const double length : rows.length) {
    if (std::isfinite(length)) rows.longest = std::max(rows.longest, length);
  }
  int exponent = 0;
  if (rows.longest > 0) std::frexp(rows.longest, &exponent);
  rows.unit = std::ldexp(1.0, -exponent);
  for (int64_t i = 0; i < n; ++i) rows.scale[i] = normalize ? 1 / cosine_length(rows.length[i]) : rows.unit;
  return rows;
}

// One search over all database rows: how they are rounded and packed.
struct Engine {
  bool amx;
  int64_t tile_rows, tile_columns;
  int64_t panel_size;  // elements of one packed panel of the database
  int64_t panels;
  Buffer<uint16_t> packed_bfloat16;
  Buffer<float> packed_float32;
  double longest = 0;        // max |u^_j|
  double worst_residual = 0;  // max |u_j - u^_j|
};

Engine make_engine(bool amx, const Rows& database, int64_t n, int64_t dim) {
  Engine engine{};
  engine.amx = amx;
  engine.tile_rows = amx ? kAmxTile : kernels().tile_rows;
  engine.tile_columns = amx ? kAmxTile : kernels().tile_columns;
  engine.panel_size = amx ? neighbors::amx_panel_size(dim) : dim * engine.tile_columns;
  engine.panels = ceil_div(n, engine.tile_columns);
  if (amx) {
    engine.packed_bfloat16.grow(engine.panels * engine.panel_size);
  } else {
    engine.packed_float32.grow(engine.panels * engine.panel_size);
  }
  std::vector<double> residual(engine.panels), length(engine.panels);
  parallel_for(engine.panels, [&](int64_t panel, int) {
    std::vector<float> rounded(dim);
    uint16_t* out16 = amx ? engine.packed_bfloat16.data() + panel * engine.panel_size : nullptr;
    float* out32 = amx ? nullptr : engine.packed_float32.data() + panel * engine.panel_size;
    if (amx) {
      std::fill_n(out16, engine.panel_size, uint16_t{0});
    } else {
      std::fill_n(out32, engine.panel_size, 0.0f);
    }
    for (int64_t c = 0; c < engine.tile_columns; ++c) {
      const int64_t j = panel * engine.tile_columns + c;
      if (j >= n || !database.usable(j)) continue;
      const auto cost = kernels().round(database.data + j * dim, database.scale[j], dim, amx, rounded.data());
      residual[panel] = std::max(residual[panel], cost.residual_squared);
      length[panel] = std::max(length[panel], cost.norm_squared);
      if (amx) {
        neighbors::amx_pack_database(rounded.data(), dim, c, out16);
      } else {
        for (int64_t d = 0; d < dim; ++d) out32[d * engine.tile_columns + c] = rounded[d];
      }
    }
  });
  engine.worst_residual = std::sqrt(*std::max_element(residual.begin(), residual.end()));
  engine.longest = std::sqrt(*std::max_element(length.begin(), length.end()));
  return engine;
}

struct Neighbor {
  float similarity;
  int32_t index;
};

bool better(const Neighbor& a, const Neighbor& b) {
  return a.similarity > b.similarity || (a.similarity == b.similarity && a.index < b.index);
}

// Everything that the searches of one call share.
struct Search {
  const TopkProblem& problem;
  const Rows& queries;
  const Rows& database;
  const std::vector<uint8_t>& skip;
  float* similarity;
  int64_t* index;

  float exact(int64_t i, int64_t j) const {
    const int64_t dim = problem.dim;
    const double sum = kernels().dot(problem.queries + i * dim, problem.database + j * dim, dim);
    const double similarity =
        problem.normalize ? sum / (cosine_length(queries.length[i]) * cosine_length(database.length[j])) : sum;
    return static_cast<float>(similarity) + 0.0f;  // -0 becomes 0, which it equals
  }

  // Writes the k best of the candidates; reorders them.
  void write(int64_t i, std::vector<Neighbor>& found) const {
    const int64_t k = problem.k, n = std::min<int64_t>(k, static_cast<int64_t>(found.size()));
    std::partial_sort(found.begin(), found.begin() + n, found.end(), better);
    for (int64_t rank = 0; rank < k; ++rank) {
      const bool valid = rank < n && found[rank].similarity > -std::numeric_limits<float>::infinity();
      similarity[i * k + rank] = valid ? found[rank].similarity : -std::numeric_limits<float>::infinity();
      index[i * k + rank] = valid ? found[rank].index : -1;
    }
  }

  // eps of neighbors.h for one rounded query, in the units of the fast search.
  double error_bound(int64_t i, const neighbors::RoundedRow& row, const Engine& engine) const {
    const double length = queries.length[i] * queries.scale[i];
    // Where float32 could overflow, far apart similarities can tie: no fast search can tell them apart.
    if (!problem.normalize && queries.length[i] * database.longest >= std::ldexp(1.0, 127)) {
      return std::numeric_limits<double>::infinity();
    }
    const double longest = engine.longest + engine.worst_residual;
    const double accumulation = static_cast<double>(problem.dim + 16) * std::ldexp(1.0, -23);
    const double underflow = static_cast<double>(problem.dim + 16) * std::ldexp(1.0, -124);
    // The exact similarity is rounded to float32: half a unit in the last place, at most, on either side of a tie.
    const double spacing = length * longest * std::ldexp(1.0, -23) +
                           std::ldexp(problem.normalize ? 1.0 : queries.unit * database.unit, -149);
    const double bound = length * engine.worst_residual + std::sqrt(row.residual_squared) * engine.longest +
                         accumulation * std::sqrt(row.norm_squared) * engine.longest + underflow + spacing;
    return bound * 1.001;  // for the rounding of this line and of the lengths
  }

  // Searches the given queries; returns those that it could not decide.
  std::vector<int64_t> fast(const std::vector<int64_t>& wanted, bool amx, int64_t capacity) const;
  void brute_force(const std::vector<int64_t>& wanted) const;
};

// A thread's scratch memory for one block of query rows.
struct Block {
  Buffer<uint16_t> packed_bfloat16;
  Buffer<float> packed_float32, rounded, tile, threshold, value;
  Buffer<int32_t> index, count, limit;
  Buffer<double> margin;
  Buffer<int64_t> self;
  Buffer<uint8_t> overflow;
  std::vector<Neighbor> found;

  CandidateLists lists(int64_t rows, int64_t capacity, int64_t k, const std::vector<uint8_t>& skip) {
    threshold.grow(rows);
    value.grow(rows * capacity);
    index.grow(rows * capacity);
    count.grow(rows);
    limit.grow(rows);
    margin.grow(rows);
    self.grow(rows);
    overflow.grow(rows);
    const float infinity = std::numeric_limits<float>::infinity();
    std::fill_n(threshold.data(), rows, infinity);  // padding rows stay closed
    std::fill_n(count.data(), rows, 0);
    std::fill_n(limit.data(), rows, static_cast<int32_t>(std::min<int64_t>(capacity, std::max<int64_t>(4 * k, 128))));
    std::fill_n(margin.data(), rows, 0.0);
    std::fill_n(self.data(), rows, int64_t{-1});
    std::fill_n(overflow.data(), rows, uint8_t{0});
    return {threshold.data(), value.data(), index.data(), count.data(),  limit.data(), overflow.data(),
            margin.data(),    self.data(),  skip.data(),  static_cast<int64_t>(skip.size()), capacity, k};
  }
};

std::vector<int64_t> Search::fast(const std::vector<int64_t>& wanted, bool amx, int64_t capacity) const {
  const int64_t dim = problem.dim, total = static_cast<int64_t>(wanted.size());
  if (total == 0) return {};
  const Engine engine = make_engine(amx, database, problem.n_database, dim);
  const int64_t tile = engine.tile_rows;
  // The packed block takes at most 512 KiB, its lists at most 64 MiB, and there are tasks enough for all threads.
  const int64_t row_bytes = dim * (amx ? 2 : 4);
  int64_t block_rows = std::min<int64_t>({512, (512 << 10) / row_bytes, (64 << 20) / (capacity * 8),
                                          ceil_div(total, 4 * max_threads())});
  block_rows = std::max<int64_t>(ceil_div(block_rows, tile), 1) * tile;
  const int64_t block_panel = amx ? neighbors::amx_panel_size(dim) : dim * tile;
  const int64_t blocks = ceil_div(total, block_rows);
  std::vector<Block> scratch(max_threads());
  std::vector<std::vector<int64_t>> undecided(blocks);

  parallel_for(blocks, [&](int64_t task, int thread) {
    Block& block = scratch[thread];
    const int64_t begin = task * block_rows, rows = std::min(block_rows, total - begin);
    const int64_t panels = ceil_div(rows, tile);
    CandidateLists lists = block.lists(panels * tile, capacity, problem.k, skip);
    block.rounded.grow(dim);
    block.tile.grow(engine.tile_rows * engine.tile_columns);
    if (amx) {
      block.packed_bfloat16.grow(panels * block_panel);
      std::fill_n(block.packed_bfloat16.data(), panels * block_panel, uint16_t{0});
    } else {
      block.packed_float32.grow(panels * block_panel);
      std::fill_n(block.packed_float32.data(), panels * block_panel, 0.0f);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = wanted[begin + r];
      if (!queries.usable(i)) continue;
      const auto cost = kernels().round(problem.queries + i * dim, queries.scale[i], dim, amx, block.rounded.data());
      const double bound = error_bound(i, cost, engine);
      if (!std::isfinite(bound)) {
        lists.overflow[r] = 1;
        continue;
      }
      lists.threshold[r] = -std::numeric_limits<float>::max();
      block.margin.data()[r] = 2 * bound;
      block.self.data()[r] = problem.exclude_self ? i : -1;
      if (amx) {
        neighbors::amx_pack_query(block.rounded.data(), dim, r % tile,
                                  block.packed_bfloat16.data() + r / tile * block_panel);
      } else {
        float* out = block.packed_float32.data() + r / tile * block_panel + r % tile;
        for (int64_t d = 0; d < dim; ++d) out[d * tile] = block.rounded.data()[d];
      }
    }

    if (amx) {
      const AmxSession session;
      for (int64_t p = 0; p < engine.panels; ++p) {
        const uint16_t* panel = engine.packed_bfloat16.data() + p * engine.panel_size;
        for (int64_t q = 0; q < panels; ++q) {
          neighbors::amx_product(block.packed_bfloat16.data() + q * block_panel, panel, dim, block.tile.data());
          kernels().filter(block.tile.data(), tile, engine.tile_columns, q * tile, p * engine.tile_columns, lists);
        }
      }
    } else {
      for (int64_t p = 0; p < engine.panels; ++p) {
        const float* panel = engine.packed_float32.data() + p * engine.panel_size;
        for (int64_t q = 0; q < panels; ++q) {
          kernels().product(block.packed_float32.data() + q * block_panel, panel, dim, block.tile.data());
          kernels().filter(block.tile.data(), tile, engine.tile_columns, q * tile, p * engine.tile_columns, lists);
        }
      }
    }

    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = wanted[begin + r];
      if (lists.overflow[r]) {
        undecided[task].push_back(i);
        continue;
      }
      kernels().tighten(lists, r, /*final=*/true);
      const int32_t* candidate = lists.index + r * capacity;
      block.found.clear();
      for (int64_t n = 0; n < lists.count[r]; ++n) {
        if (n + 1 < lists.count[r]) {
          const float* next = problem.database + candidate[n + 1] * dim;
          for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(next + d);
        }
        block.found.push_back({exact(i, candidate[n]), candidate[n]});
      }
      write(i, block.found);
    }
  });

  std::vector<int64_t> again;
  for (const auto& rows : undecided) again.insert(again.end(), rows.begin(), rows.end());
  return again;
}

void Search::brute_force(const std::vector<int64_t>& wanted) const {
  // A few queries share each database row while it is in the first cache.
  constexpr int64_t kGroup = 8;
  const int64_t total = static_cast<int64_t>(wanted.size()), k = problem.k;
  parallel_for(ceil_div(total, kGroup), [&](int64_t task, int) {
    const int64_t begin = task * kGroup, rows = std::min(kGroup, total - begin);
    std::vector<Neighbor> found[kGroup];
    float bound[kGroup];
    std::fill_n(bound, kGroup, -std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < problem.n_database; ++j) {
      if (skip[j]) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = wanted[begin + r];
        if (!queries.usable(i) || (problem.exclude_self && i == j)) continue;
        const float similarity = exact(i, j);
        // Later rows have larger indices, so one that only reaches the k-th best loses to it.
        if (!(similarity > bound[r])) continue;
        found[r].push_back({similarity, static_cast<int32_t>(j)});
        if (static_cast<int64_t>(found[r].size()) >= 2 * k + 64) {
          std::nth_element(found[r].begin(), found[r].begin() + (k - 1), found[r].end(), better);
          bound[r] = found[r][k - 1].similarity;
          found[r].resize(k);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) write(wanted[begin + r], found[r]);
  });
}

}  // namespace

int64_t topk_neighbors_cpu(const TopkProblem& problem, float* similarity, int64_t* index) {
  if (problem.n_queries == 0) return 0;
  const bool same = problem.queries == problem.database && problem.n_queries == problem.n_database;
  const Rows database = measure(problem.database, problem.n_database, problem.dim, problem.normalize);
  const Rows other = same ? Rows{} : measure(problem.queries, problem.n_queries, problem.dim, problem.normalize);
  std::vector<uint8_t> skip(problem.n_database);
  for (int64_t j = 0; j < problem.n_database; ++j) skip[j] = !database.usable(j);
  const Search search{problem, same ? database : other, database, skip, similarity, index};

  std::vector<int64_t> wanted(problem.n_queries);
  std::iota(wanted.begin(), wanted.end(), int64_t{0});
  if (2 * problem.k >= problem.n_database) {
    // Most rows are neighbours: there is nothing for a fast search to leave out.
    search.brute_force(wanted);
    return 0;
  }
  int64_t again = 0;
  if (neighbors::amx_is_usable()) {
    wanted = search.fast(wanted, /*amx=*/true, 1024 + 8 * problem.k);
    again = static_cast<int64_t>(wanted.size());
  }
  const bool first = !neighbors::amx_is_usable();
  wanted = search.fast(wanted, /*amx=*/false, 8192 + 8 * problem.k);
  if (first) again = static_cast<int64_t>(wanted.size());
  search.brute_force(wanted);
  return again;
}

}  // namespace scan_fast
