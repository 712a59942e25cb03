// Tensor layer of the neighbour search: checks, allocation, device dispatch.
#include <ATen/ATen.h>
#include <torch/library.h>

#ifdef SCAN_FAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <tuple>

#include "common/op_checks.h"
#include "common/sm90_switch.h"
#include "neighbors/neighbors.h"

namespace scan_fast {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check_arguments(const at::Tensor& queries, const at::Tensor& database, int64_t k, bool exclude_self) {
  check_readable(queries, "queries");
  check_readable(database, "database");
  for (const at::ScalarType dtype : {queries.scalar_type(), database.scalar_type()}) {
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                      "queries and database must be float32, bfloat16 or float16, got ", dtype);
  }
  TORCH_CHECK_VALUE(
      queries.dim() == 2 && database.dim() == 2 && queries.size(1) == database.size(1) && queries.size(1) >= 1,
      "queries and database must be (Q, D) and (N, D) with D from 1 on, got ", queries.sizes(), " and ",
      database.sizes());
  TORCH_CHECK_VALUE(queries.device() == database.device(), "queries and database must be on one device, got ",
                    queries.device(), " and ", database.device());
  TORCH_CHECK_VALUE(k >= 1 && k <= database.size(0), "k must be from 1 to ", database.size(0), ", got ", k);
  TORCH_CHECK_VALUE(queries.size(0) <= kMaxCount && database.size(0) <= kMaxCount && database.size(1) <= kMaxCount,
                    "queries and database may have at most ", kMaxCount, " rows and columns, got ", queries.sizes(),
                    " and ", database.sizes());
  TORCH_CHECK_VALUE(!exclude_self || queries.size(0) <= database.size(0),
                    "exclude_self needs queries to be the first rows of the database, got ", queries.sizes(), " and ",
                    database.sizes());
}

TopkProblem make_problem(const at::Tensor& queries, const at::Tensor& database, int64_t k, bool normalize,
                         bool exclude_self) {
  return {queries.const_data_ptr<float>(),
          database.const_data_ptr<float>(),
          queries.size(0),
          database.size(0),
          queries.size(1),
          k,
          normalize,
          exclude_self};
}

#ifdef SCAN_FAST_WITH_SM90
Sm90Switch sm90_switch("neighbors");
#endif

#ifdef SCAN_FAST_WITH_CUDA
TileSearch* gpu_search() {
#ifdef SCAN_FAST_WITH_SM90
  if (sm90_switch.on() && search_tiles_sm90_runs_here()) return search_tiles_sm90;
#endif
  return search_tiles_portable;
}
#endif

Result topk_neighbors(const at::Tensor& queries, const at::Tensor& database, int64_t k, bool normalize,
                      bool exclude_self) {
  check_arguments(queries, database, k, exclude_self);
  const at::Tensor q = *dense(queries.to(at::kFloat), "queries");
  const at::Tensor x = queries.is_same(database) ? q : *dense(database.to(at::kFloat), "database");
  const TopkProblem problem = make_problem(q, x, k, normalize, exclude_self);
  at::Tensor similarity = at::empty({q.size(0), k}, q.options());
  at::Tensor index = at::empty({q.size(0), k}, q.options().dtype(at::kLong));
  static_assert(sizeof(SearchedAgain) == 2 * sizeof(int64_t));
  at::Tensor searched_again = at::empty({2}, index.options());
#ifdef SCAN_FAST_WITH_CUDA
  if (q.is_cuda()) {
    const c10::cuda::CUDAGuard guard(q.device());
    const at::Tensor workspace =
        at::empty({static_cast<int64_t>(topk_neighbors_cuda_workspace(problem))}, q.options().dtype(at::kByte));
    topk_neighbors_cuda(problem, similarity.mutable_data_ptr<float>(), index.mutable_data_ptr<int64_t>(),
                        static_cast<SearchedAgain*>(searched_again.mutable_data_ptr()), workspace.mutable_data_ptr(),
                        c10::cuda::getCurrentCUDAStream().stream(), *gpu_search());
    return {similarity, index, searched_again};
  }
#endif
  const SearchedAgain again =
      topk_neighbors_cpu(problem, similarity.mutable_data_ptr<float>(), index.mutable_data_ptr<int64_t>());
  int64_t* const counts = searched_again.mutable_data_ptr<int64_t>();
  counts[0] = again.finely;
  counts[1] = again.exactly;
  return {similarity, index, searched_again};
}

}  // namespace
}  // namespace scan_fast

// searched_again: (2,) int64, see SearchedAgain in neighbors.h.
TORCH_LIBRARY_FRAGMENT(scan_fast, library) {
  library.def(
      "topk_neighbors(Tensor queries, Tensor database, int k, bool normalize, bool exclude_self)"
      " -> (Tensor similarity, Tensor index, Tensor searched_again)");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, library) { library.impl("topk_neighbors", &scan_fast::topk_neighbors); }
#ifdef SCAN_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(scan_fast, CUDA, library) { library.impl("topk_neighbors", &scan_fast::topk_neighbors); }
#endif
