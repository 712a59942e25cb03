// GPU neighbour search: workspace, and arithmetic of rows, exact sums and keys.
//
// Included by neighbors_cuda.cu and neighbors_sm90.cu only.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "common/device.h"
#include "common/panels.h"
#include "neighbors/neighbors.h"

namespace scan_fast {

// Arrays of the workspace, in global memory. u^ and u~ are packed in panels (common/panels.h), with rows padded to a
// multiple of kRowPadding. Padding rows of u^, and rows with a non-finite entry, are NaN: so are all their products,
// which no threshold lets through. The searches need not ask whether a column may be a neighbour.
struct TopkWorkspace {
  double* query_length;     // (Q,) |v|, non-finite if the row has a non-finite entry
  double* database_length;  // (N,); the same memory in a self-search
  half_t* query_rounded;    // packed u^
  half_t* database_rounded;
  half_t* query_low;  // packed u~, the rounded u - u^; written only if a query is searched again
  half_t* database_low;
  double* query_residual;   // (Q,) |u - u^|
  double* query_norm;       // (Q,) |u^|
  double* query_remainder;  // (Q,) |u - u^ - u~|
  double* margin;           // (Q,) 2 eps; +inf: only brute force can decide; -1: query without neighbours
  // Maxima as bit patterns of non-negative doubles, which order like integers: the longest query and database row, and
  // over the database |u - u^|, |u^| and |u - u^ - u~|.
  unsigned long long* longest_query;
  unsigned long long* longest_database;
  unsigned long long* worst_residual;
  unsigned long long* longest_rounded;
  unsigned long long* worst_remainder;
  unsigned long long* undecided_count;  // queries for search_finely
  unsigned long long* hard_count;       // queries for search_exactly
  int32_t* undecided;                   // (Q,)
  int32_t* hard;                        // (Q,)
  unsigned* tickets;                    // (blocks of search_finely,)
  uint2* candidates;         // search_tiles: (batch, splits, capacity); search_finely: (blocks, rows, capacity)
  int32_t* counts;           // the same without capacity; -1: the list overflowed
  unsigned long long* keys;  // search_exactly: (blocks, N + power of two of k); shares the memory of the candidates
};

namespace {

using Workspace = TopkWorkspace;

constexpr int kThreads = 256;
constexpr int64_t kRowPadding = 2 * kPanelRows;
constexpr double kUnit = 128;  // row length in the units of the fast search

// The candidates of one query: `splits` lists.
struct Candidates {
  const uint2* entries;
  const int32_t* counts;
  int64_t entry_stride, count_stride;  // distance between splits
  int splits;
};

__device__ __forceinline__ double max_of(const unsigned long long* bits) {
  double value;
  static_assert(sizeof(value) == sizeof(*bits));
  memcpy(&value, bits, sizeof(value));
  return value;
}

__device__ __forceinline__ void atomic_max(unsigned long long* bits, double value) {
  unsigned long long pattern;
  memcpy(&pattern, &value, sizeof(pattern));
  atomicMax(bits, pattern);
}

__device__ __forceinline__ double clamped(double length) { return length < 1e-12 ? 1e-12 : length; }

// Returns the power of two that scales the longest row to a length in [kUnit / 2, kUnit).
__device__ __forceinline__ double unit_scale(double longest) {
  int exponent = 0;
  if (longest > 0) frexp(longest, &exponent);
  return ldexp(kUnit, -exponent);
}

__device__ __forceinline__ double row_scale(double length, double longest, bool normalize) {
  return normalize ? kUnit / clamped(length) : unit_scale(longest);
}

// Lanes that share a row in kernels that read 16-byte vectors. A warp works on four rows at once.
constexpr int kRowLanes = 8, kRowsPerWarp = 32 / kRowLanes;

// Returns whether rows of x can be read four elements at a time.
__device__ __forceinline__ bool rows_of_vectors(const float* x, int64_t dim) {
  return dim % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// Computes the exact sums of neighbors.h, one row `a` with kRows rows `b`, by kRowLanes lanes. Lane g has the partial
// sums of that header's lanes 4 g to 4 g + 3: four independent chains of additions, and 16 bytes per access. The tree
// is the same: across lanes first (16, 8, 4), then within one (2, 1). Elements beyond dim count as +0, which changes no
// sum. All lanes of the warp take part; rows may differ by group of lanes.
template <int kRows>
__device__ __forceinline__ void exact_dots(const float* a, const float* const (&b)[kRows], int64_t dim, bool vectors,
                                           double (&sum)[kRows]) {
  double partial[kRows][4];
#pragma unroll
  for (int r = 0; r < kRows; ++r) partial[r][0] = partial[r][1] = partial[r][2] = partial[r][3] = 0;
  const int first = static_cast<int>(threadIdx.x) % kRowLanes * 4;
  if (vectors) {
#pragma unroll 2
    for (int64_t d = first; d < dim; d += 32) {
      const float4 x = ld_global<float4>(a + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 y = ld_global<float4>(b[r] + d);
        partial[r][0] += static_cast<double>(x.x) * static_cast<double>(y.x);
        partial[r][1] += static_cast<double>(x.y) * static_cast<double>(y.y);
        partial[r][2] += static_cast<double>(x.z) * static_cast<double>(y.z);
        partial[r][3] += static_cast<double>(x.w) * static_cast<double>(y.w);
      }
    }
  } else {
    for (int64_t d = first; d < dim; d += 32) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (d + j >= dim) break;
        const double x = static_cast<double>(a[d + j]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) partial[r][j] += x * static_cast<double>(b[r][d + j]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) {
        partial[r][j] += __shfl_xor_sync(kFullMask, partial[r][j], lanes);
      }
    }
    sum[r] = (partial[r][0] + partial[r][2]) + (partial[r][1] + partial[r][3]);
  }
}

// Larger keys are better: higher similarity first, then smaller index. No pair has key 0.
__device__ __forceinline__ unsigned long long make_key(float similarity, int64_t index) {
  const unsigned bits = __float_as_uint(similarity + 0.0f);  // -0 becomes 0
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

// Rows that exact_keys takes at a time. Each group of kRowLanes lanes has two.
constexpr int kExactRows = 2 * kRowsPerWarp;

// Calls use(c, key) with the exact keys of query i and the rows row_of(c) for 0 <= c < count <= kExactRows, in one lane
// each. Called by one warp. All rows are read before the first use.
template <typename RowOf, typename Use>
__device__ __forceinline__ void exact_keys(const TopkProblem& problem, const Workspace& work, int64_t i, int count,
                                           RowOf row_of, Use use) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / kRowLanes;
  const int64_t dim = problem.dim;
  int64_t rows[2];
  const float* data[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int c = group + r * kRowsPerWarp;
    rows[r] = row_of(c < count ? c : 0);
    data[r] = problem.database + rows[r] * dim;
  }
  double sum[2];
  exact_dots(problem.queries + i * dim, data, dim,
             rows_of_vectors(problem.queries, dim) && rows_of_vectors(problem.database, dim), sum);
  __syncwarp();
  if (lane % kRowLanes != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int c = group + r * kRowsPerWarp;
    if (c >= count) break;
    const double similarity =
        problem.normalize ? sum[r] / (clamped(work.query_length[i]) * clamped(work.database_length[rows[r]])) : sum[r];
    use(c, make_key(static_cast<float>(similarity), rows[r]));
  }
}

__device__ __forceinline__ void write_key(const TopkProblem& problem, float* similarity, int64_t* index, int64_t i,
                                          int64_t rank, unsigned long long key) {
  const unsigned ordered = static_cast<unsigned>(key >> 32);
  const unsigned bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  const bool valid = key != 0 && bits != 0xff800000u;  // -inf means missing
  similarity[i * problem.k + rank] = __uint_as_float(valid ? bits : 0xff800000u);
  index[i * problem.k + rank] = valid ? static_cast<int64_t>(0xffffffffu - static_cast<unsigned>(key)) : -1;
}

}  // namespace
}  // namespace scan_fast
