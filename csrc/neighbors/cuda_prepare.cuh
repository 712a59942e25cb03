// GPU neighbour search: lengths, float16 copies of the rows, and the margin of each query.
//
// Included by neighbors_cuda.cu only.
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
    if (value <= DBL_MAX) atomic_max(longest, value);
  }
}

// residual and norm may be null (for a database that is not the queries), and so may the maxima.
__global__ void __launch_bounds__(kThreads)
    round_rows(const float* __restrict__ x, int64_t rows, int64_t padded_rows, int64_t dim, int panels, bool normalize,
               const double* __restrict__ length, const unsigned long long* longest, half_t* __restrict__ rounded,
               double* residual, double* norm, unsigned long long* worst_residual,
               unsigned long long* longest_rounded) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= padded_rows) return;
  const bool usable = row < rows && length[row] <= DBL_MAX;
  const double scale = usable ? row_scale(length[row], max_of(longest), normalize) : 0;
  double residual_squared = 0, norm_squared = 0;
  for (int64_t d = threadIdx.x % 32; d < panels * kPanelDims; d += 32) {
    const double exact = usable && d < dim ? static_cast<double>(x[row * dim + d]) * scale : 0;
    const half_t kept = from_float<half_t>(static_cast<float>(exact));
    const double wide = static_cast<double>(to_float(kept));
    residual_squared += (exact - wide) * (exact - wide);
    norm_squared += wide * wide;
    rounded[panel_at(row, d, panels)] = kept;
  }
  residual_squared = sqrt(warp_sum(residual_squared));
  norm_squared = sqrt(warp_sum(norm_squared));
  if (threadIdx.x % 32 != 0 || row >= rows) return;
  if (residual != nullptr) {
    residual[row] = residual_squared;
    norm[row] = norm_squared;
  }
  if (worst_residual != nullptr) {
    atomic_max(worst_residual, residual_squared);
    atomic_max(longest_rounded, norm_squared);
  }
}

// Packs the rounding residuals for the finer product. The grid is fixed; returns at once if every query is decided.
__global__ void __launch_bounds__(kThreads)
    round_remainders(const float* __restrict__ x, int64_t rows, int64_t padded_rows, int64_t dim, int panels,
                     bool normalize, const double* __restrict__ length, const unsigned long long* longest,
                     const half_t* __restrict__ rounded, half_t* __restrict__ low, double* remainder,
                     unsigned long long* worst_remainder, const unsigned long long* undecided_count) {
  if (*undecided_count == 0) return;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; row < padded_rows;
       row += warps) {
    const bool usable = row < rows && length[row] <= DBL_MAX;
    const double scale = usable ? row_scale(length[row], max_of(longest), normalize) : 0;
    double squared = 0;
    for (int64_t d = threadIdx.x % 32; d < panels * kPanelDims; d += 32) {
      const double exact = usable && d < dim ? static_cast<double>(x[row * dim + d]) * scale : 0;
      const double rest = exact - static_cast<double>(to_float(rounded[panel_at(row, d, panels)]));
      const half_t kept = from_float<half_t>(static_cast<float>(rest));
      const double left = rest - static_cast<double>(to_float(kept));
      squared += left * left;
      low[panel_at(row, d, panels)] = kept;
    }
    squared = sqrt(warp_sum(squared));
    if (threadIdx.x % 32 != 0 || row >= rows) continue;
    if (remainder != nullptr) remainder[row] = squared;
    if (worst_remainder != nullptr) atomic_max(worst_remainder, squared);
  }
}

// Inputs that all bounds share: the query's |u_i|, the database's largest |u_j|, |u_j - u^_j| and |u^_j|, and the
// distance at which two similarities differ after rounding to float32.
struct Magnitudes {
  double query, longest, residual, rounded, spacing;
};

__device__ __forceinline__ Magnitudes magnitudes(const TopkProblem& problem, const Workspace& work, int64_t i) {
  const double longest_query = max_of(work.longest_query), longest_database = max_of(work.longest_database);
  Magnitudes m;
  m.query = work.query_length[i] * row_scale(work.query_length[i], longest_query, problem.normalize);
  m.residual = max_of(work.worst_residual);
  m.rounded = max_of(work.longest_rounded);
  m.longest = m.rounded + m.residual;
  const double units = problem.normalize ? kUnit * kUnit : unit_scale(longest_query) * unit_scale(longest_database);
  m.spacing = m.query * m.longest * ldexp(1.0, -23) + units * ldexp(1.0, -149);
  return m;
}

// Bounds the error of a sum of products per |a||b|. Matrix units add 16 aligned products and the previous sum. They may
// truncate each of the 17, and the result, to 24 bits.
__device__ __forceinline__ double truncation(double products) { return (products * 1.125 + 4) * ldexp(1.0, -23); }
// In addition, every term may be flushed to zero.
__device__ __forceinline__ double underflow(double products) { return (products * 1.125 + 4) * ldexp(1.0, -124); }

__global__ void __launch_bounds__(kThreads) open_queries(TopkProblem problem, Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= problem.n_queries) return;
  const double length = work.query_length[i];
  if (!(length <= DBL_MAX)) {
    work.margin[i] = -1;
    return;
  }
  // If float32 could overflow, distant similarities can tie, and no fast search can tell them apart.
  if (!problem.normalize && length * max_of(work.longest_database) >= ldexp(1.0, 127)) {
    work.margin[i] = INFINITY;
    return;
  }
  const Magnitudes m = magnitudes(problem, work, i);
  const double dim = static_cast<double>(problem.dim) + 32;  // rounded up to whole products
  const double bound = m.query * m.residual + work.query_residual[i] * m.rounded +
                       truncation(dim) * work.query_norm[i] * m.rounded + underflow(dim) + m.spacing;
  work.margin[i] = 2 * 1.001 * bound;
}

// Returns the margin of search_finely, s^ = u^_i u^_j + (u^_i u~_j + u~_i u^_j). With u = u^ + u~ + e,
//   |u_i u_j - s^| <= |u~_i||u~_j| + |e_i||u_j| + (|u_i| + |e_i|)|e_j|.
// The first product is summed over 32 dimensions at a time, and these sums in float32 with rounding to nearest. The
// other two are summed without a break.
__device__ __forceinline__ double fine_margin(const TopkProblem& problem, const Workspace& work, int64_t i,
                                              int panels) {
  if (!(work.margin[i] <= DBL_MAX)) return work.margin[i];
  const Magnitudes m = magnitudes(problem, work, i);
  const double worst = max_of(work.worst_remainder), mine = work.query_remainder[i], norm = work.query_norm[i];
  const double low = work.query_residual[i] + mine, low_database = m.residual + worst;
  const double dim = static_cast<double>(panels) * kPanelDims;
  const double additions = (dim / 32 + 2) * ldexp(1.0, -24);
  const double bound = low * low_database + mine * m.longest + (m.query + mine) * worst +
                       (truncation(32) + additions) * norm * m.rounded +
                       truncation(2 * dim) * (norm * low_database + low * m.rounded) + underflow(3 * dim) + m.spacing;
  return 2 * 1.001 * bound;
}

}  // namespace
}  // namespace scan_fast
