// GPU neighbour search: lengths, float16 copies of the rows, and the margin of each query.
//
// Eight lanes share a row and access 16 bytes at a time. Blocks take several groups of rows, and each raises a maximum
// over all rows once: atomics on one address run one after the other.
//
// Limit: memory. measure_rows reads 4 N D bytes, round_rows reads 4 N D and writes 2 N D. Predictions for 50,000 x 512
// on an H200: 26 us and 40 us, of which the conversions from and to float64 take 7 us and 21 us at 16 per cycle.
//
// Included by neighbors_cuda.cu only.
#pragma once

#include "common/row_groups.cuh"
#include "neighbors/cuda_common.cuh"

namespace scan_fast {
namespace {

constexpr int kRowsPerBlock = kThreads / kRowLanes;

// Raises the maxima bits[m] (null: none) to the largest value[m] of the block. Called once by all threads of a block.
template <int kMaxima>
__device__ __forceinline__ void raise_maxima(unsigned long long* const (&bits)[kMaxima], double (&value)[kMaxima]) {
  SCAN_FAST_SHARED(double, scratch, kMaxima* kThreads / 32);
  block_combine(value, scratch, [](double a, double b) { return a < b ? b : a; });
  if (threadIdx.x != 0) return;
  for (int m = 0; m < kMaxima; ++m) {
    if (bits[m] != nullptr) atomic_max(bits[m], value[m]);
  }
}

__global__ void __launch_bounds__(kThreads) measure_rows(const float* __restrict__ x, int64_t rows, int64_t dim,
                                                         double* __restrict__ length, unsigned long long* longest) {
  const bool vectors = rows_of_vectors(x, dim);
  double most[1] = {0};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kRowsPerBlock) {
    const int64_t row = first + threadIdx.x / kRowLanes;
    const float* const data[1] = {x + (row < rows ? row : rows - 1) * dim};
    double square[1];
    exact_dots(data[0], data, dim, vectors, square);
    const double value = sqrt(square[0]);
    if (row < rows && threadIdx.x % kRowLanes == 0) length[row] = value;
    if (value <= DBL_MAX && value > most[0]) most[0] = value;
  }
  raise_maxima({longest}, most);
}

// Sums over the lanes of a row.
__device__ __forceinline__ double row_sum(double value) {
#pragma unroll
  for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullMask, value, lanes);
  return value;
}

// Reads the elements d to d + 7 of a row, zeros from dim on.
__device__ __forceinline__ void load_eight(const float* row, int64_t d, int64_t dim, bool vectors, float (&value)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e += 4) {
    if (vectors) {
      const bool inside = d + e < dim;
      const float4 v = inside ? ld_global<float4>(row + d + e) : make_float4(0, 0, 0, 0);
      value[e] = v.x, value[e + 1] = v.y, value[e + 2] = v.z, value[e + 3] = v.w;
    } else {
#pragma unroll
      for (int j = e; j < e + 4; ++j) value[j] = d + j < dim ? row[d + j] : 0.0f;
    }
  }
}

constexpr uint32_t kTwoNans = 0x7fff7fff;  // as float16

// residual and norm may be null (for a database that is not the queries), and so may the maxima.
__global__ void __launch_bounds__(kThreads)
    round_rows(const float* __restrict__ x, int64_t rows, int64_t padded_rows, int64_t dim, int panels, bool normalize,
               const double* __restrict__ length, const unsigned long long* longest, half_t* __restrict__ rounded,
               double* residual, double* norm, unsigned long long* worst_residual,
               unsigned long long* longest_rounded) {
  const bool vectors = rows_of_vectors(x, dim);
  const int vector = static_cast<int>(threadIdx.x) % kRowLanes;
  double most[2] = {0, 0};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock; first < padded_rows;
       first += static_cast<int64_t>(gridDim.x) * kRowsPerBlock) {
    const int64_t row = first + threadIdx.x / kRowLanes;  // below padded_rows, a multiple of kRowsPerBlock
    const bool usable = row < rows && length[row] <= DBL_MAX;
    const double scale = usable ? row_scale(length[row], max_of(longest), normalize) : 0;
    double residual_squared = 0, norm_squared = 0;
    for (int panel = 0; panel < panels; ++panel) {
      const int64_t d = static_cast<int64_t>(panel) * kPanelDims + vector * 8;
      uint32_t packed[4] = {kTwoNans, kTwoNans, kTwoNans, kTwoNans};
      if (usable) {
        float value[8];
        load_eight(x + row * dim, d, dim, vectors, value);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const double a = static_cast<double>(value[2 * pair]) * scale;
          const double b = static_cast<double>(value[2 * pair + 1]) * scale;
          packed[pair] = pack2<half_t>(static_cast<float>(a), static_cast<float>(b));
          const float2 kept = unpack2<half_t>(packed[pair]);
          const double kept_a = static_cast<double>(kept.x), kept_b = static_cast<double>(kept.y);
          residual_squared += (a - kept_a) * (a - kept_a) + (b - kept_b) * (b - kept_b);
          norm_squared += kept_a * kept_a + kept_b * kept_b;
        }
      }
      st_global(rounded + panel_at(row, d, panels), make_uint4(packed[0], packed[1], packed[2], packed[3]));
    }
    residual_squared = sqrt(row_sum(residual_squared));
    norm_squared = sqrt(row_sum(norm_squared));
    if (residual_squared > most[0]) most[0] = residual_squared;
    if (norm_squared > most[1]) most[1] = norm_squared;
    if (residual != nullptr && vector == 0 && row < rows) {
      residual[row] = residual_squared;
      norm[row] = norm_squared;
    }
  }
  raise_maxima({worst_residual, longest_rounded}, most);
}

// Packs the rounding residuals for the finer product. The grid is fixed; returns at once if every query is decided.
// remainder and worst_remainder may be null.
__global__ void __launch_bounds__(kThreads)
    round_remainders(const float* __restrict__ x, int64_t rows, int64_t padded_rows, int64_t dim, int panels,
                     bool normalize, const double* __restrict__ length, const unsigned long long* longest,
                     const half_t* __restrict__ rounded, half_t* __restrict__ low, double* remainder,
                     unsigned long long* worst_remainder, const unsigned long long* undecided_count) {
  if (*undecided_count == 0) return;
  const bool vectors = rows_of_vectors(x, dim);
  const int vector = static_cast<int>(threadIdx.x) % kRowLanes;
  double most[1] = {0};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock; first < padded_rows;
       first += static_cast<int64_t>(gridDim.x) * kRowsPerBlock) {
    const int64_t row = first + threadIdx.x / kRowLanes;
    const bool usable = row < rows && length[row] <= DBL_MAX;
    const double scale = usable ? row_scale(length[row], max_of(longest), normalize) : 0;
    double squared = 0;
    for (int panel = 0; panel < panels; ++panel) {
      const int64_t d = static_cast<int64_t>(panel) * kPanelDims + vector * 8, at = panel_at(row, d, panels);
      uint32_t packed[4] = {0, 0, 0, 0};
      if (usable) {
        float value[8];
        load_eight(x + row * dim, d, dim, vectors, value);
        const uint4 bits = ld_global<uint4>(rounded + at);
        const uint32_t high[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float2 wide = unpack2<half_t>(high[pair]);
          const double a = static_cast<double>(value[2 * pair]) * scale - static_cast<double>(wide.x);
          const double b = static_cast<double>(value[2 * pair + 1]) * scale - static_cast<double>(wide.y);
          packed[pair] = pack2<half_t>(static_cast<float>(a), static_cast<float>(b));
          const float2 kept = unpack2<half_t>(packed[pair]);
          const double left_a = a - static_cast<double>(kept.x), left_b = b - static_cast<double>(kept.y);
          squared += left_a * left_a + left_b * left_b;
        }
      }
      st_global(low + at, make_uint4(packed[0], packed[1], packed[2], packed[3]));
    }
    squared = sqrt(row_sum(squared));
    if (squared > most[0]) most[0] = squared;
    if (remainder != nullptr && vector == 0 && row < rows) remainder[row] = squared;
  }
  raise_maxima({worst_remainder}, most);
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
