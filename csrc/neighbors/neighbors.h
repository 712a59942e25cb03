// Exact top-k neighbours by dot product or cosine: the contract between the tensor layer and the kernels.
//
// similarity(i, j) = float32( sum_d q[i,d] x[j,d] )                               "dot"
//                  = float32( sum_d q[i,d] x[j,d] / (|q_i| |x_j|) )               "cosine", |v| = max(sqrt(v.v), 1e-12)
//
// with sums, lengths and the division in float64. The sums run over 32 lanes (lane l takes d = l mod 32, ascending),
// which are added as a tree (l + 16, then 8, 4, 2, 1): products of two float32 are exact in float64, so a processor
// with fused multiply-add, one without, and a GPU warp all get the same bits. The k best rows come in descending order,
// equal similarities by ascending index. A row with a non-finite entry is nobody's neighbour and has none; missing
// neighbours, and similarities that overflow to -inf, are written as index -1 and similarity -inf.
//
// How a fast search can be exact. Rows are scaled (to length one for "cosine", all by one power of two for "dot") and
// rounded to u^ with residual length r = |u - u^|. For a query i and every column j, by Cauchy-Schwarz,
//
//   |s_ij - s^_ij| <= |u_i| max_j r_j + r_i max_j |u^_j| + gamma |u^_i| max_j |u^_j| =: eps_i
//
// where gamma covers the float32 accumulation of the fast product, and eps_i is enlarged by the spacing of float32 so
// that it also covers ties after the final rounding. If t is a value that at least k columns reach in the fast search,
// a column with s^ < t - 2 eps_i is not among the k best. A search therefore keeps, per row, every column that reaches
// t - 2 eps_i while t rises, and the exact similarities of those few decide. A row whose list outgrows its room (many
// duplicates, or many near ties) is searched again, at last by exact brute force.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

struct TopkProblem {
  const float* queries;   // (n_queries, dim), contiguous
  const float* database;  // (n_database, dim), contiguous; may be the same memory
  int64_t n_queries;
  int64_t n_database;  // below 2^31 - 256
  int64_t dim;         // below 2^31
  int64_t k;  // 1 <= k <= n_database
  bool normalize;
  bool exclude_self;  // query i is database row i and not its own neighbour; needs n_queries <= n_database
};

// Writes similarity (n_queries, k) and index (n_queries, k); returns how many queries the first search could not
// decide.
int64_t topk_neighbors_cpu(const TopkProblem& problem, float* similarity, int64_t* index);

// The same on the current CUDA device and `stream`, without waiting for it: all pointers are device memory, and
// searched_again is one int64. `workspace` holds topk_neighbors_cuda_workspace bytes, aligned to 256. list_bytes bounds
// the memory for lists of candidates: with more queries than fit, they are searched batch by batch.
constexpr int64_t kListBytes = int64_t{256} << 20;
size_t topk_neighbors_cuda_workspace(const TopkProblem& problem, int64_t list_bytes = kListBytes);
void topk_neighbors_cuda(const TopkProblem& problem, float* similarity, int64_t* index, int64_t* searched_again,
                         void* workspace, StreamHandle stream, int64_t list_bytes = kListBytes);

}  // namespace scan_fast
