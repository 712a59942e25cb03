// Exact top-k neighbours on the GPU. neighbors.h has the definition, and explains why a fast search can be exact.
//
// Kernels in launch order; no host synchronisation, and results do not depend on the order of blocks and threads:
//   cuda_prepare.cuh
//     measure_rows      eight lanes per row: |v| in float64, and the longest row
//     round_rows        eight lanes per row: u = v * scale as float16 (packed in panels), |u - u^|, |u^| and maxima
//     open_queries      one thread per query: its margin 2 eps, and whether a fast search can decide it
//   per batch of queries
//     search_tiles      cuda_search.cuh, one block per 128 queries and column split; on Hopper see neighbors_sm90.cu
//     decide            cuda_decide.cuh, one block per query: exact similarities of the candidates, sort, write k best
//   grids of fixed size for the undecided queries, usually none
//     round_remainders  cuda_prepare.cuh: the rounding residuals as float16
//     search_finely     cuda_fine.cuh: products of 22 bits, longer lists, exact similarities of the candidates
//     search_exactly    cuda_decide.cuh: float64 against all rows, radix selection
//
// This file chooses batches, splits and workspace, and launches the kernels.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "neighbors/cuda_fine.cuh"
#include "neighbors/cuda_search.cuh"

namespace scan_fast {
namespace {

struct Plan {
  int64_t processors, panels;
  int64_t batch, splits, capacity, decide_keys;  // search_tiles and decide
  int64_t fine_blocks, fine_capacity;            // search_finely, which has fine_capacity keys
  int64_t exact_blocks, sort_keys;               // search_exactly
  bool same, fast;
  size_t bytes;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t padded(int64_t rows) { return ceil_div(rows, kRowPadding) * kRowPadding; }

int64_t power_of_two(int64_t at_least) {
  int64_t size = 1;
  while (size < at_least) size *= 2;
  return size;
}

// Divides the work of search_tiles into batches and column splits, with room for `units` times the lists of a block's
// rows. Few waves of blocks are best, with a full last wave.
void plan_batches(Plan& plan, int64_t q, int64_t n, int64_t units) {
  const int64_t blocks = ceil_div(q, kTileRows), tiles = ceil_div(n, kTileColumns);
  double best = 0;
  for (int64_t splits = 1; splits <= std::min<int64_t>({16, tiles, units}); ++splits) {
    int64_t batch = std::min(blocks, units / splits);
    const int64_t whole_wave = plan.processors / std::gcd(plan.processors, splits);
    if (batch < blocks && batch > whole_wave) batch = batch / whole_wave * whole_wave;
    const int64_t waves =
        blocks / batch * ceil_div(batch * splits, plan.processors) + ceil_div(blocks % batch * splits, plan.processors);
    // The first tiles of a split are not filtered yet.
    const double cost = static_cast<double>(waves) * (static_cast<double>(ceil_div(tiles, splits)) + 4.0);
    if (splits == 1 || cost < 0.97 * best) {
      best = cost;
      plan.splits = splits;
      plan.batch = std::min(batch * kTileRows, q);
    }
  }
}

Plan make_plan(const TopkProblem& problem, int64_t list_bytes) {
  Plan plan{};
  const int64_t q = problem.n_queries, n = problem.n_database, k = problem.k;
  plan.processors = multiprocessors();
  plan.same = problem.queries == problem.database && q == n;
  // If most rows are neighbours, a fast search has nothing to exclude.
  plan.fast = k <= kMaxFastK && 2 * k < n && q > 0;
  plan.panels = panels_of(problem.dim);
  const auto fit = [&](int64_t entries) { return std::max<int64_t>(list_bytes / (entries * 8), 1); };
  if (plan.fast) {
    plan.capacity = ceil_div(2 * kTileColumns + 4 * k, 128) * 128;
    plan.decide_keys = power_of_two(std::max<int64_t>(1024, 2 * k));
    plan_batches(plan, q, n, fit(kTileRows * plan.capacity));
    plan.fine_capacity = power_of_two(std::max<int64_t>(2048, 4 * k));
    plan.fine_blocks = std::min(
        {plan.processors, fit(kFineRows * plan.fine_capacity), ceil_div(q, kFineRows) * ceil_div(n, 8 * kFineColumns)});
  }
  plan.sort_keys = power_of_two(k);
  plan.exact_blocks = std::min({4 * plan.processors, fit(n + plan.sort_keys), q});
  return plan;
}

// Lays out the arrays from `base` on, each aligned to 256 bytes. A null base only computes the size.
Workspace lay_out(const TopkProblem& problem, Plan& plan, void* base) {
  char* next = static_cast<char*>(base);
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = base == nullptr ? nullptr : reinterpret_cast<Element*>(next + used);
    used += (static_cast<size_t>(count) * sizeof(Element) + 255) / 256 * 256;
  };
  const int64_t q = problem.n_queries, n = problem.n_database;
  Workspace work{};
  unsigned long long* scalars;
  take(scalars, 8 + ceil_div(plan.fine_blocks, 2));  // zeroed before the first kernel
  if (scalars != nullptr) {
    work.undecided_count = scalars;
    work.longest_query = scalars + 1;
    work.longest_database = plan.same ? scalars + 1 : scalars + 2;
    work.worst_residual = scalars + 3;
    work.longest_rounded = scalars + 4;
    work.worst_remainder = scalars + 5;
    work.hard_count = scalars + 6;
    work.tickets = reinterpret_cast<unsigned*>(scalars + 8);
  }
  take(work.query_length, q);
  if (plan.fast) {
    take(work.query_rounded, packed_size(padded(q), plan.panels));
    take(work.query_low, packed_size(padded(q), plan.panels));
    take(work.query_residual, q);
    take(work.query_norm, q);
    take(work.query_remainder, q);
    take(work.margin, q);
    take(work.undecided, q);
    take(work.hard, q);
    take(work.counts, std::max(plan.batch * plan.splits, plan.fine_blocks * kFineRows));
  }
  if (plan.same) {
    work.database_length = work.query_length;
    work.database_rounded = work.query_rounded;
    work.database_low = work.query_low;
  } else {
    take(work.database_length, n);
    if (plan.fast) {
      take(work.database_rounded, packed_size(padded(n), plan.panels));
      take(work.database_low, packed_size(padded(n), plan.panels));
    }
  }
  // The searches run one after the other, so they share this memory.
  take(work.keys, std::max({plan.exact_blocks * (n + plan.sort_keys), plan.batch * plan.splits * plan.capacity,
                            plan.fine_blocks * kFineRows * plan.fine_capacity}));
  work.candidates = reinterpret_cast<uint2*>(work.keys);
  plan.bytes = used;
  return work;
}

dim3 grid_of(int64_t tasks, int64_t per_block) { return dim3(static_cast<unsigned>(ceil_div(tasks, per_block))); }

}  // namespace

void search_tiles_portable(const TopkProblem& problem, const TopkWorkspace& work, const TileBatch& batch,
                           StreamHandle stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(batch.queries, kTileRows)), static_cast<unsigned>(batch.splits));
  constexpr size_t kListHeads = 3 * kTileRows * sizeof(float);
  const bool fits_max_stages = search_shared(kMaxStages) + kListHeads <= shared_memory_limit();
  launch(fits_max_stages ? search_tiles<kMaxStages> : search_tiles<kMinStages>, grid, dim3(kThreads),
         search_shared(fits_max_stages ? kMaxStages : kMinStages), stream, problem, work, batch);
}

size_t topk_neighbors_cuda_workspace(const TopkProblem& problem, int64_t list_bytes) {
  Plan plan = make_plan(problem, list_bytes);
  lay_out(problem, plan, nullptr);
  return plan.bytes;
}

void topk_neighbors_cuda(const TopkProblem& problem, float* similarity, int64_t* index, SearchedAgain* searched,
                         void* workspace, StreamHandle stream, TileSearch search, int64_t list_bytes) {
  if (problem.n_queries == 0) {
    zero_async(searched, sizeof(*searched), stream);
    return;
  }
  Plan plan = make_plan(problem, list_bytes);
  const Workspace work = lay_out(problem, plan, workspace);
  const int64_t q = problem.n_queries, n = problem.n_database, dim = problem.dim;
  const dim3 threads(kThreads);
  const auto row_grid = [&](int64_t rows) {
    return grid_of(std::min(ceil_div(rows, kRowsPerBlock), 8 * plan.processors), 1);
  };
  zero_async(workspace, static_cast<size_t>(8 + ceil_div(plan.fine_blocks, 2)) * sizeof(unsigned long long), stream);
  launch(measure_rows, row_grid(q), threads, 0, stream, problem.queries, q, dim, work.query_length, work.longest_query);
  if (!plan.same) {
    launch(measure_rows, row_grid(n), threads, 0, stream, problem.database, n, dim, work.database_length,
           work.longest_database);
  }
  if (plan.fast) {
    const int panels = static_cast<int>(plan.panels);
    launch(round_rows, row_grid(padded(n)), threads, 0, stream, problem.database, n, padded(n), dim, panels,
           problem.normalize, work.database_length, work.longest_database, work.database_rounded,
           plan.same ? work.query_residual : nullptr, plan.same ? work.query_norm : nullptr, work.worst_residual,
           work.longest_rounded);
    if (!plan.same) {
      launch(round_rows, row_grid(padded(q)), threads, 0, stream, problem.queries, q, padded(q), dim, panels,
             problem.normalize, work.query_length, work.longest_query, work.query_rounded, work.query_residual,
             work.query_norm, nullptr, nullptr);
    }
    launch(open_queries, grid_of(q, kThreads), threads, 0, stream, problem, work);
    const int splits = static_cast<int>(plan.splits), capacity = static_cast<int>(plan.capacity);
    const int keys = static_cast<int>(plan.decide_keys), fine_capacity = static_cast<int>(plan.fine_capacity);
    for (int64_t first = 0; first < q; first += plan.batch) {
      const int64_t batch = std::min(plan.batch, q - first);
      search(problem, work, TileBatch{first, batch, panels, splits, capacity}, stream);
      launch(decide, dim3(static_cast<unsigned>(batch)), dim3(kDecideThreads), keys * sizeof(unsigned long long),
             stream, problem, work, first, splits, capacity, keys, similarity, index);
    }

    const auto round_again = [&](const float* x, int64_t rows, const double* length, const unsigned long long* longest,
                                 const half_t* rounded, half_t* low, double* remainder, unsigned long long* worst) {
      launch(round_remainders, row_grid(padded(rows)), threads, 0, stream, x, rows, padded(rows), dim, panels,
             problem.normalize, length, longest, rounded, low, remainder, worst, work.undecided_count);
    };
    round_again(problem.database, n, work.database_length, work.longest_database, work.database_rounded,
                work.database_low, plan.same ? work.query_remainder : nullptr, work.worst_remainder);
    if (!plan.same) {
      round_again(problem.queries, q, work.query_length, work.longest_query, work.query_rounded, work.query_low,
                  work.query_remainder, nullptr);
    }
    launch(search_finely, grid_of(plan.fine_blocks, 1), threads, kFineShared, stream, problem, work, panels,
           fine_capacity, fine_capacity, similarity, index);
  }
  launch(search_exactly, grid_of(plan.exact_blocks, 1), dim3(kExactThreads), 0, stream, problem, work, !plan.fast,
         plan.sort_keys, similarity, index);
  launch(report, dim3(1), dim3(1), 0, stream, work, searched);
}

}  // namespace scan_fast
