// The GPU neighbour search: lengths, float16 copies of the rows, and each query's margin.
//
// Part of neighbors_cuda.cu, which alone includes it.
#pragma once

#include "neighbors/cuda_common.cuh"

namespace scan_fast {
namespace {

__global__ void __launch_bounds__(kThreads) measure_rows(const float* __restrict__ x, int64_t rows, int64_t dim,
                                                         double* __restrict__ length, unsigned long long* longest) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const double value = sqrt(exact_dot(x + row * dim, x + row * dim, dim));
  if (threadIdx.x % 32 == 0) {
    length[row] = value;
    if (value <= DBL_MAX) raise(longest, value);
  }
}

// residual and norm may be null (a database that is not also the queries), likewise the maxima.
__global__ void __launch_bounds__(kThreads)
    round_rows(const float* __restrict__ x, int64_t rows, int64_t dim, int64_t padded_dim, bool normalize,
               const double* __restrict__ length, const unsigned long long* longest, half_t* __restrict__ rounded,
               double* residual, double* norm, unsigned long long* worst_residual,
               unsigned long long* longest_rounded) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const bool usable = length[row] <= DBL_MAX;
  const double scale = usable ? row_scale(length[row], max_of(longest), normalize) : 0;
  double residual_squared = 0, norm_squared = 0;
  for (int64_t d = threadIdx.x % 32; d < padded_dim; d += 32) {
    const double exact = usable && d < dim ? static_cast<double>(x[row * dim + d]) * scale : 0;
    const half_t kept = from_float<half_t>(static_cast<float>(exact));
    const double wide = static_cast<double>(to_float(kept));
    residual_squared += (exact - wide) * (exact - wide);
    norm_squared += wide * wide;
    rounded[row * padded_dim + d] = kept;
  }
  residual_squared = sqrt(warp_sum(residual_squared));
  norm_squared = sqrt(warp_sum(norm_squared));
  if (threadIdx.x % 32 != 0) return;
  if (residual != nullptr) {
    residual[row] = residual_squared;
    norm[row] = norm_squared;
  }
  if (worst_residual != nullptr) {
    raise(worst_residual, residual_squared);
    raise(longest_rounded, norm_squared);
  }
}

__global__ void __launch_bounds__(kThreads) open_queries(TopkProblem problem, Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= problem.n_queries) return;
  const double length = work.query_length[i];
  if (!(length <= DBL_MAX)) {
    work.margin[i] = -1;
    return;
  }
  const double longest_query = max_of(work.longest_query), longest_database = max_of(work.longest_database);
  // Where float32 could overflow, far apart similarities can tie: no fast search can tell them apart.
  if (!problem.normalize && length * longest_database >= ldexp(1.0, 127)) {
    work.margin[i] = INFINITY;
    return;
  }
  const double scaled = length * row_scale(length, longest_query, problem.normalize);
  const double residual = max_of(work.worst_residual), rounded = max_of(work.longest_rounded);
  const double longest = rounded + residual;
  // Matrix units add 16 aligned products and the sum so far, and may truncate each of the 17 at 24 bits.
  const double terms = static_cast<double>(problem.dim) * 1.125 + 48;
  const double underflow = terms * ldexp(1.0, -124);
  const double units = problem.normalize ? kUnit * kUnit : unit_scale(longest_query) * unit_scale(longest_database);
  const double spacing = scaled * longest * ldexp(1.0, -23) + units * ldexp(1.0, -149);
  const double bound = scaled * residual + work.query_residual[i] * rounded +
                       terms * ldexp(1.0, -23) * work.query_norm[i] * rounded + underflow + spacing;
  work.margin[i] = 2 * 1.001 * bound;
}

}  // namespace
}  // namespace scan_fast
