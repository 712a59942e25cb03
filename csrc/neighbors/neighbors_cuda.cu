// Exact top-k neighbours on the GPU. The definition, and why a fast search can be exact, is in neighbors.h.
//
// Kernels, in order; no host synchronisation, results independent of the order in which blocks and threads run:
//   cuda_prepare.cuh
//     measure_rows     warp per row: |v| in float64, and the longest row
//     round_rows       warp per row: u = v * scale as float16 (padded to kChunk columns), |u - u^|, |u^| and maxima
//     open_queries     thread per query: its margin 2 eps, whether it can be searched at all
//   cuda_search.cuh
//     search_tiles     block per 128 queries x a share of the columns
//   cuda_decide.cuh
//     decide           block per query: exact similarities of the candidates, sorted, k best written
//     search_exactly   a few blocks loop over the undecided queries: float64 against all rows, radix selection
//
// This file chooses batches, splits and memory, and launches.
#include <algorithm>
#include <type_traits>

#include "neighbors/cuda_decide.cuh"
#include "neighbors/cuda_prepare.cuh"
#include "neighbors/cuda_search.cuh"

namespace scan_fast {
namespace {

struct Plan {
  int64_t padded_dim, batch, splits, capacity, decide_keys, exact_blocks, sort_keys;
  bool same, fast;
  size_t bytes;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two(int64_t at_least) {
  int64_t size = 1;
  while (size < at_least) size *= 2;
  return size;
}

Plan make_plan(const TopkProblem& problem, int64_t list_bytes) {
  Plan plan{};
  const int64_t q = problem.n_queries, n = problem.n_database, k = problem.k;
  const int64_t processors = multiprocessors();
  plan.same = problem.queries == problem.database && q == n;
  // With most rows being neighbours, there is nothing for a fast search to leave out.
  plan.fast = k <= kMaxFastK && 2 * k < n;
  plan.padded_dim = ceil_div(problem.dim, kChunk) * kChunk;
  plan.capacity = ceil_div(2 * kTileColumns + 4 * k, 128) * 128;
  plan.batch = std::max<int64_t>(list_bytes / (plan.capacity * static_cast<int64_t>(sizeof(uint2))), kTileRows);
  plan.batch = std::min(plan.batch / kTileRows * kTileRows, q);
  // Splitting the columns fills processors that the row blocks leave idle, at the price of more first-tile candidates.
  const int64_t blocks = ceil_div(plan.batch, kTileRows), tiles = ceil_div(n, kTileColumns);
  double best = 0;
  for (int64_t splits = 1; splits <= std::min<int64_t>(16, tiles); ++splits) {
    const double cost = static_cast<double>(ceil_div(blocks * splits, processors)) *
                        (static_cast<double>(ceil_div(tiles, splits)) + 4.0);
    if (splits == 1 || cost < 0.97 * best) {
      best = cost;
      plan.splits = splits;
    }
  }
  plan.batch = std::min(plan.batch, std::max<int64_t>(plan.batch / plan.splits / kTileRows, 1) * kTileRows);
  plan.decide_keys = power_of_two(std::max<int64_t>(1024, 2 * k));
  plan.sort_keys = power_of_two(k);
  plan.exact_blocks = std::clamp<int64_t>((int64_t{512} << 20) / ((n + plan.sort_keys) * 8), 1,
                                          std::min<int64_t>(4 * processors, std::max<int64_t>(q, 1)));
  return plan;
}

// Lays the arrays out from `base` on (null: to learn the size), each on a 256-byte boundary.
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
  take(scalars, 8);
  if (scalars != nullptr) {
    work.undecided_count = scalars;
    work.longest_query = scalars + 1;
    work.longest_database = plan.same ? scalars + 1 : scalars + 2;
    work.worst_residual = scalars + 3;
    work.longest_rounded = scalars + 4;
  }
  take(work.query_length, q);
  take(work.undecided, q);
  take(work.keys, plan.exact_blocks * (n + plan.sort_keys));
  if (plan.fast) {
    take(work.query_rounded, q * plan.padded_dim);
    take(work.query_residual, q);
    take(work.query_norm, q);
    take(work.margin, q);
    take(work.candidates, plan.batch * plan.splits * plan.capacity);
    take(work.counts, plan.batch * plan.splits);
  }
  if (plan.same) {
    work.database_length = work.query_length;
    work.database_rounded = work.query_rounded;
  } else {
    take(work.database_length, n);
    if (plan.fast) take(work.database_rounded, n * plan.padded_dim);
  }
  plan.bytes = used;
  return work;
}

dim3 grid_of(int64_t tasks, int64_t per_block) { return dim3(static_cast<unsigned>(ceil_div(tasks, per_block))); }

}  // namespace

size_t topk_neighbors_cuda_workspace(const TopkProblem& problem, int64_t list_bytes) {
  Plan plan = make_plan(problem, list_bytes);
  lay_out(problem, plan, nullptr);
  return plan.bytes;
}

void topk_neighbors_cuda(const TopkProblem& problem, float* similarity, int64_t* index, int64_t* searched_again,
                         void* workspace, StreamHandle stream, int64_t list_bytes) {
  if (problem.n_queries == 0) {
    zero_async(searched_again, sizeof(*searched_again), stream);
    return;
  }
  Plan plan = make_plan(problem, list_bytes);
  const Workspace work = lay_out(problem, plan, workspace);
  const int64_t q = problem.n_queries, n = problem.n_database, dim = problem.dim;
  constexpr int64_t kWarps = kThreads / 32;
  zero_async(work.undecided_count, 8 * sizeof(unsigned long long), stream);
  launch(measure_rows, grid_of(q, kWarps), dim3(kThreads), 0, stream, problem.queries, q, dim, work.query_length,
         work.longest_query);
  if (!plan.same) {
    launch(measure_rows, grid_of(n, kWarps), dim3(kThreads), 0, stream, problem.database, n, dim, work.database_length,
           work.longest_database);
  }
  if (plan.fast) {
    launch(round_rows, grid_of(n, kWarps), dim3(kThreads), 0, stream, problem.database, n, dim, plan.padded_dim,
           problem.normalize, work.database_length, work.longest_database, work.database_rounded,
           plan.same ? work.query_residual : nullptr, plan.same ? work.query_norm : nullptr, work.worst_residual,
           work.longest_rounded);
    if (!plan.same) {
      launch(round_rows, grid_of(q, kWarps), dim3(kThreads), 0, stream, problem.queries, q, dim, plan.padded_dim,
             problem.normalize, work.query_length, work.longest_query, work.query_rounded, work.query_residual,
             work.query_norm, nullptr, nullptr);
    }
    launch(open_queries, grid_of(q, kThreads), dim3(kThreads), 0, stream, problem, work);
    for (int64_t first = 0; first < q; first += plan.batch) {
      const int64_t batch = std::min(plan.batch, q - first);
      launch(search_tiles, dim3(static_cast<unsigned>(ceil_div(batch, kTileRows)), static_cast<unsigned>(plan.splits)),
             dim3(kThreads), kSearchShared, stream, problem, work, plan.padded_dim, first, batch,
             static_cast<int>(plan.splits), static_cast<int>(plan.capacity));
      launch(decide, dim3(static_cast<unsigned>(batch)), dim3(kDecideThreads),
             static_cast<size_t>(plan.decide_keys) * sizeof(unsigned long long), stream, problem, work, first,
             static_cast<int>(plan.splits), static_cast<int>(plan.capacity), static_cast<int>(plan.decide_keys),
             similarity, index);
    }
  } else {
    launch(leave_all_undecided, grid_of(q, kThreads), dim3(kThreads), 0, stream, problem, work);
  }
  launch(search_exactly, dim3(static_cast<unsigned>(plan.exact_blocks)), dim3(kExactThreads), 0, stream, problem, work,
         !plan.fast, plan.sort_keys, similarity, index);
  launch(report, dim3(1), dim3(1), 0, stream, work, !plan.fast, searched_again);
}

}  // namespace scan_fast
