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

// Arrays of the workspace, in global memory. u^ and u~ are packed in panels (common/panels.h); their rows are padded
// with zeros to a multiple of kRowPadding.
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

// Computes the exact sum of neighbors.h: lane l of the warp takes d = l mod 32.
__device__ __forceinline__ double exact_dot(const float* a, const float* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = threadIdx.x % 32; d < dim; d += 32) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return warp_sum(sum);
}

// Larger keys are better: higher similarity first, then smaller index. No pair has key 0.
__device__ __forceinline__ unsigned long long make_key(float similarity, int64_t index) {
  const unsigned bits = __float_as_uint(similarity + 0.0f);  // -0 becomes 0
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ __forceinline__ unsigned long long exact_key(const TopkProblem& problem, const Workspace& work, int64_t i,
                                                        int64_t j) {
  const double sum = exact_dot(problem.queries + i * problem.dim, problem.database + j * problem.dim, problem.dim);
  const double similarity =
      problem.normalize ? sum / (clamped(work.query_length[i]) * clamped(work.database_length[j])) : sum;
  return make_key(static_cast<float>(similarity), j);
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
