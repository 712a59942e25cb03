// Interface of the exact top-k neighbour search by dot product or cosine.
//
// similarity(i, j) = float32( sum_d q[i,d] x[j,d] )                               "dot"
//                  = float32( sum_d q[i,d] x[j,d] / (|q_i| |x_j|) )               "cosine", |v| = max(sqrt(v.v), 1e-12)
//
// Sums, lengths and the division are in float64. Each sum runs over 32 lanes (lane l takes d = l mod 32, ascending),
// which are added as a tree (l + 16, then 8, 4, 2, 1). Products of two float32 are exact in float64, so a CPU with
// fused multiply-add, a CPU without, and a GPU warp all get the same bits. The k best rows come in descending order,
// equal similarities by ascending index. A row with a non-finite entry has no neighbours and is never a neighbour.
// Missing neighbours, and similarities that overflow to -inf, are written as index -1 and similarity -inf.
//
// Why a fast search can be exact. Rows are scaled (to length one for "cosine", all by one power of two for "dot") and
// rounded to u^ with residual length r = |u - u^|. For a query i and every column j, by Cauchy-Schwarz,
//
//   |s_ij - s^_ij| <= |u_i| max_j r_j + r_i max_j |u^_j| + gamma |u^_i| max_j |u^_j| =: eps_i
//
// with gamma a bound on the float32 accumulation of the fast product. eps_i is enlarged by the spacing of float32, so
// that it also covers ties after the final rounding. Let t be a value that at least k columns reach in the fast search.
// Then a column with s^ < t - 2 eps_i is not among the k best. A search therefore keeps, per row, a list of every
// column that reaches t - 2 eps_i while t rises, and the exact similarities of these candidates decide. A row whose
// list overflows (many duplicates or near ties) is searched again with a finer product and a longer list, and finally
// by brute force:
//
//          first        second, eps about 100 times smaller (CPU after integers: 5)   last
//   CPU    16 bits      float32                                                       float64 (from float32 rows)
//   GPU    float16      float16 in two parts, u^ + u~ = u to 22 bits, three products  the same
//
// The 16 bits are bfloat16 if the CPU has instructions for it, or integers (neighbors_cpu.cpp). If neither is faster than
// float32, the CPU begins with float32. Brute force is never needed for data whose neighbours differ by more than about
// 1e-5 of |u_i||u_j|, nor for up to 2,000 (GPU) or 8,000 (CPU) equal or nearly equal rows.
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
  int64_t k;           // 1 <= k <= n_database
  bool normalize;
  bool exclude_self;  // query i is database row i and not its own neighbour; needs n_queries <= n_database
};

// Number of queries that were searched a second time, and of those that needed brute force. Both are 0 if most rows are
// neighbours (2 k >= n_database), because brute force is then the only search.
struct SearchedAgain {
  int64_t finely, exactly;
};

// Writes similarity (n_queries, k) and index (n_queries, k).
SearchedAgain topk_neighbors_cpu(const TopkProblem& problem, float* similarity, int64_t* index);

// One batch of the first search on the GPU: lists of `capacity` candidates for queries [first_query, first_query +
// queries) x `splits` column splits. first_query is a multiple of 128.
struct TopkWorkspace;  // cuda_common.cuh
struct TileBatch {
  int64_t first_query, queries;
  int panels, splits, capacity;
};
using TileSearch = void(const TopkProblem&, const TopkWorkspace&, const TileBatch&, StreamHandle);
TileSearch search_tiles_portable;    // sm_80 and up, neighbors_cuda.cu: the kernel search_tiles<stages>
TileSearch search_tiles_sm90;        // 9.0 only, neighbors_sm90.cu: the kernel search_tiles_sm90_kernel<Products<...>>
bool search_tiles_sm90_runs_here();  // on the current device; it accepts every problem
// Both run only if a fast search can exclude rows: k <= 1024 and 2 k < n_database. All other kernels are shared:
// measure_rows, round_rows, open_queries, decide, round_remainders, search_finely, search_exactly, report.

// The same on the current CUDA device and `stream`, asynchronously. No host decision depends on the data, so a call can
// be captured in a CUDA graph. All pointers are device memory. `workspace` holds topk_neighbors_cuda_workspace bytes,
// aligned to 256. With D' = dim rounded up to 64, and rows rounded up to 256, this is
//
//   n_database (4 D' + 8) + n_queries (4 D' + 48) + list_bytes + 64 KiB     at most; a self-search has one set of rows
//
// list_bytes bounds the memory of candidate lists, which all searches use one after the other. If not all queries fit,
// they are searched in batches. The bound is exceeded only if it cannot hold the lists of one block of queries, (1 + k
// / 128) MiB, or the 8 (n_database + 2 k) bytes of one brute-force search.
constexpr int64_t kListBytes = int64_t{256} << 20;
size_t topk_neighbors_cuda_workspace(const TopkProblem& problem, int64_t list_bytes = kListBytes);
void topk_neighbors_cuda(const TopkProblem& problem, float* similarity, int64_t* index, SearchedAgain* searched,
                         void* workspace, StreamHandle stream, TileSearch search = search_tiles_portable,
                         int64_t list_bytes = kListBytes);

}  // namespace scan_fast
