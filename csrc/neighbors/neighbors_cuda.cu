// Exact top-k neighbours on the GPU. The definition, and why a fast search can be exact, is in neighbors.h.
//
// Kernels, in order; no host synchronisation, results independent of the order in which blocks and threads run:
//   measure_rows     warp per row: |v| in float64, and the longest row
//   round_rows       warp per row: u = v * scale as float16 (padded to kChunk columns), |u - u^|, |u^| and their maxima
//   open_queries     thread per query: its margin 2 eps, whether it can be searched at all
//   search_tiles     block per 128 queries x a share of the columns; see below
//   decide           block per query: exact similarities of the candidates, sorted, k best written
//   search_exactly   a few blocks loop over the undecided queries: float64 against all rows, radix selection
//
// search_tiles: 128 x 256 tile per block, 64 columns of dim at a time through a ring of kStages cp.async stages that
// runs on across tiles; 8 warps (2 x 4) of 64 x 64 with mma.m16n8k16 (float16 in, float32 sums): 128 accumulators a
// thread. 16-byte chunks of a row are stored at chunk ^ (row % 8), so that neither cp.async nor ldmatrix meets a bank
// conflict. Per tile, a thread takes the maximum of its 16 values of a row and compares it with the row's threshold:
// about one instruction per element. Survivors (about k + k ln(N / k) a row) go to the row's list in global memory
// (second cache), the slot from an atomic in shared memory. Thresholds rise only between tiles, behind barriers, so the
// set of candidates is the same in every run; only its order in the list varies, and nothing depends on that.
//
// Limit: 2 Q N D flops at the float16 rate. Per 64 columns of dim a block moves 48 KiB for 4.2 Mflop, 87 flop per byte
// of the second cache. float16 rather than bfloat16: same speed, eight times finer, so fewer candidates. Rows are
// scaled to length 128 to stay clear of float16's subnormal range.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/device.h"
#include "neighbors/neighbors.h"

namespace scan_fast {
namespace {

constexpr int kTileRows = 128, kTileColumns = 256, kChunk = 64, kStages = 3;
constexpr int kThreads = 256;
constexpr int kStageHalves = (kTileRows + kTileColumns) * kChunk;
constexpr size_t kSearchShared = size_t{kStages} * kStageHalves * sizeof(half_t);
constexpr double kUnit = 128;        // the length that the fast search scales rows to
constexpr int64_t kMaxFastK = 1024;  // the keys of one query's candidates must fit in shared memory
constexpr int kDecideThreads = 128, kExactThreads = 256;

// What the kernels share in global memory.
struct Workspace {
  double* query_length;      // (Q,) |v|, non-finite where the row has a non-finite entry
  double* database_length;   // (N,); the same memory in a self-search
  half_t* query_rounded;     // (Q, padded dim); likewise
  half_t* database_rounded;  // (N, padded dim)
  double* query_residual;    // (Q,) |u - u^|
  double* query_norm;        // (Q,) |u^|
  double* margin;            // (Q,) 2 eps; +inf: only the exact search can decide; -1: a query without neighbours
  // Maxima as the bit patterns of non-negative doubles, which order like integers: the longest query and database row,
  // and over the database |u - u^| and |u^|.
  unsigned long long* longest_query;
  unsigned long long* longest_database;
  unsigned long long* worst_residual;
  unsigned long long* longest_rounded;
  unsigned long long* undecided_count;
  int32_t* undecided;      // (Q,) queries for search_exactly
  uint2* candidates;       // (batch, splits, capacity): similarity bits and column
  int32_t* counts;         // (batch, splits); -1: the list outgrew its room
  unsigned long long* keys;  // (exact blocks, N + power of two of k)
};

struct Plan {
  int64_t padded_dim, batch, splits, capacity, decide_keys, exact_blocks, sort_keys;
  bool same, fast;
  size_t bytes;
};

// ---- small device functions --------------------------------------------------------------------------------------

__device__ __forceinline__ double max_of(const unsigned long long* bits) {
  double value;
  static_assert(sizeof(value) == sizeof(*bits));
  memcpy(&value, bits, sizeof(value));
  return value;
}

__device__ __forceinline__ void raise(unsigned long long* bits, double value) {
  unsigned long long pattern;
  memcpy(&pattern, &value, sizeof(pattern));
  atomicMax(bits, pattern);
}

__device__ __forceinline__ double clamped(double length) { return length < 1e-12 ? 1e-12 : length; }

// The power of two that brings the longest row to a length in [kUnit / 2, kUnit).
__device__ __forceinline__ double unit_scale(double longest) {
  int exponent = 0;
  if (longest > 0) frexp(longest, &exponent);
  return ldexp(kUnit, -exponent);
}

__device__ __forceinline__ double row_scale(double length, double longest, bool normalize) {
  return normalize ? kUnit / clamped(length) : unit_scale(longest);
}

// The sum of neighbors.h: lane l of the warp takes d = l mod 32.
__device__ __forceinline__ double exact_dot(const float* a, const float* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = threadIdx.x % 32; d < dim; d += 32) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return warp_sum(sum);
}

// Larger is better: by similarity, then by the smaller index. No pair has key 0.
__device__ __forceinline__ unsigned long long make_key(float similarity, int64_t index) {
  const unsigned bits = __float_as_uint(similarity + 0.0f);  // -0 becomes 0, which it equals
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
  const bool valid = key != 0 && bits != 0xff800000u;  // -inf counts as missing
  similarity[i * problem.k + rank] = __uint_as_float(valid ? bits : 0xff800000u);
  index[i * problem.k + rank] = valid ? static_cast<int64_t>(0xffffffffu - static_cast<unsigned>(key)) : -1;
}

// ---- preparation -------------------------------------------------------------------------------------------------

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

// ---- the fast search ---------------------------------------------------------------------------------------------

// One warp: the largest value found by bisection that at least k entries reach. Called with count > k.
template <typename ValueAt>
__device__ __forceinline__ float reached_by(int64_t k, int count, int steps, ValueAt value_at) {
  const int lane = threadIdx.x % 32;
  float low = FLT_MAX, high = -FLT_MAX;
  for (int e = lane; e < count; e += 32) {
    const float v = value_at(e);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  low = warp_min(low);
  high = warp_max(high);
  for (int step = 0; step < steps; ++step) {
    const float middle = low + 0.5f * (high - low);
    if (middle <= low || middle > high) break;
    int hits = 0;
    for (int e = lane; e < count; e += 32) hits += value_at(e) >= middle;
    if (warp_sum(hits) >= k) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ float lowered(float reached, double margin) {
  const double bound = static_cast<double>(reached) - margin;
  const float threshold = static_cast<float>(bound);
  return static_cast<double>(threshold) > bound ? nextafterf(threshold, -INFINITY) : threshold;
}

// One warp raises a row's threshold and drops the candidates that fall below it; returns how many stay.
__device__ __forceinline__ int tighten(uint2* list, int count, int64_t k, double margin, float& threshold) {
  const int lane = threadIdx.x % 32;
  const float reached = reached_by(k, count, 14, [&](int e) { return __uint_as_float(list[e].x); });
  const float bound = lowered(reached, margin);
  threshold = bound > threshold ? bound : threshold;
  int kept = 0;
  for (int base = 0; base < count; base += 32) {
    const bool inside = base + lane < count;
    uint2 entry = make_uint2(0, 0);
    if (inside) entry = list[base + lane];
    const bool stays = inside && __uint_as_float(entry.x) >= threshold;
    const unsigned ballot = __ballot_sync(kFullMask, stays);
    // Entries only move towards the front, and all 32 were read before the ballot.
    if (stays) list[kept + __popc(ballot & ((1u << lane) - 1))] = entry;
    kept += __popc(ballot);
    __syncwarp();
  }
  return kept;
}

__global__ void __launch_bounds__(kThreads, 1)
    search_tiles(TopkProblem problem, Workspace work, int64_t padded_dim, int64_t first_query, int64_t batch,
                 int splits, int capacity) {
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(float, threshold, kTileRows);
  SCAN_FAST_SHARED(int, count, kTileRows);
  SCAN_FAST_SHARED(int, limit, kTileRows);
  const Shared<half_t> stages = memory.as<half_t>();

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 64;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * kTileRows;  // in the batch
  const int split = static_cast<int>(blockIdx.y);
  const int n = static_cast<int>(problem.n_database), k = static_cast<int>(problem.k);

  // This block's share of the column tiles.
  const int64_t tiles = (problem.n_database + kTileColumns - 1) / kTileColumns;
  const int first_tile = static_cast<int>(tiles * split / splits);
  const int last_tile = static_cast<int>(tiles * (split + 1) / splits);
  const int chunks = static_cast<int>(padded_dim / kChunk);

  const int first_limit = 4 * k < 128 ? 128 : 4 * k;
  const int last_limit = capacity - kTileColumns;  // the next tile must fit
  if (thread < kTileRows) {
    const int64_t row = block_row + thread;
    const double margin = row < batch ? work.margin[first_query + row] : -1.0;
    threshold[thread] = margin >= 0 && margin <= DBL_MAX ? -FLT_MAX : INFINITY;
    count[thread] = 0;
    limit[thread] = first_limit < last_limit ? first_limit : last_limit;
  }

  // Thread: 16-byte chunk thread % 8 of rows thread / 8 + {0, 32, 64, ...}; 32 rows further on, the swizzle is the
  // same.
  const int load_row = thread / 8;
  const Shared<half_t> load_slot = stages + (load_row * kChunk + (thread % 8 ^ load_row % 8) * 8);
  const half_t* const query_source =
      work.query_rounded + (first_query + block_row) * padded_dim + thread % 8 * 8;
  const int query_rows = static_cast<int>(batch - block_row < kTileRows ? batch - block_row : kTileRows);
  int load_tile = first_tile;
  int load_depth = 0, load_stage = 0;
  const auto load_next = [&] {
    if (load_tile < last_tile) {
      const int left = n - load_tile * kTileColumns;
      const int columns = left < kTileColumns ? left : kTileColumns;
      const half_t* const column_source =
          work.database_rounded + static_cast<int64_t>(load_tile) * kTileColumns * padded_dim + thread % 8 * 8 +
          load_depth;
      const Shared<half_t> slot = load_slot + load_stage * kStageHalves;
#pragma unroll 1
      for (int row = load_row; row < kTileRows; row += 32) {
        const bool inside = row < query_rows;
        cp_async_16((slot + (row - load_row) * kChunk).get(),
                    query_source + (inside ? row : 0) * padded_dim + load_depth, inside ? 16 : 0);
      }
#pragma unroll 2
      for (int row = load_row; row < kTileColumns; row += 32) {
        const bool inside = row < columns;
        cp_async_16((slot + (kTileRows + row - load_row) * kChunk).get(),
                    column_source + (inside ? row : 0) * padded_dim, inside ? 16 : 0);
      }
      load_depth += kChunk;
      if (load_depth == padded_dim) {
        load_depth = 0;
        ++load_tile;
      }
      load_stage = load_stage + 1 < kStages ? load_stage + 1 : 0;
    }
    cp_async_commit();
  };

  for (int stage = 0; stage < kStages - 1; ++stage) load_next();

  float sum[4][8][4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][c][e] = 0;
    }
  }

  int chunk_of_tile = 0, stage = 0;
  for (int tile = first_tile; tile < last_tile;) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all are done with the stage that is refilled next
    load_next();

    const Shared<half_t> a_tile = stages + stage * kStageHalves;
    const Shared<half_t> b_tile = a_tile + kTileRows * kChunk;
    stage = stage + 1 < kStages ? stage + 1 : 0;
#pragma unroll
    for (int depth = 0; depth < kChunk / 16; ++depth) {
      uint32_t a[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int row = warp_row + m * 16 + lane % 16, chunk = depth * 2 + lane / 16;
        ldmatrix_x4(a[m], (a_tile + (row * kChunk + (chunk ^ (row % 8)) * 8)).get());
      }
#pragma unroll
      for (int c = 0; c < 8; c += 2) {
        uint32_t b[4];
        const int row = warp_column + c * 8 + lane / 16 * 8 + lane % 8, chunk = depth * 2 + lane / 8 % 2;
        ldmatrix_x4(b, (b_tile + (row * kChunk + (chunk ^ (row % 8)) * 8)).get());
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma_16816<half_t>(sum[m][c], a[m], low);
          mma_16816<half_t>(sum[m][c + 1], a[m], high);
        }
      }
    }
    if (++chunk_of_tile < chunks) continue;
    chunk_of_tile = 0;

    // The tile is complete: enter what reaches its row's threshold. Thread: rows lane / 4 (+ 8), columns 2 (lane % 4) +
    // {0, 1}.
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        const float bound = threshold[row];
        float best = sum[m][0][half * 2];
#pragma unroll
        for (int c = 0; c < 8; ++c) best = fmaxf(best, fmaxf(sum[m][c][half * 2], sum[m][c][half * 2 + 1]));
        if (best >= bound) {
          const int64_t query = first_query + block_row + row;
          uint2* list = work.candidates + ((block_row + row) * splits + split) * capacity;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float value = sum[m][c][half * 2 + e];
              const int column = tile * kTileColumns + warp_column + c * 8 + lane % 4 * 2 + e;
              if (value >= bound && column < n && !(problem.exclude_self && column == query) &&
                  work.database_length[column] <= DBL_MAX) {
                const int slot = atomicAdd((count + row).get(), 1);
                list[slot] = make_uint2(__float_as_uint(value), static_cast<unsigned>(column));
              }
            }
          }
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[m][c][half * 2] = sum[m][c][half * 2 + 1] = 0;
      }
    }
    __syncthreads();  // the lists are complete
    for (int row = warp; row < kTileRows; row += kThreads / 32) {
      const int entries = count[row];
      if (entries <= limit[row] || entries <= k) continue;
      float bound = threshold[row];
      uint2* list = work.candidates + ((block_row + row) * splits + split) * capacity;
      int kept = tighten(list, entries, k, work.margin[first_query + block_row + row], bound);
      if (kept > last_limit) {
        bound = INFINITY;
        kept = -1;
      }
      __syncwarp();  // every lane has read this row's state
      if (lane == 0) {
        threshold[row] = bound;
        count[row] = kept;
        const int wanted = 2 * kept > first_limit ? 2 * kept : first_limit;
        limit[row] = wanted < last_limit ? wanted : last_limit;
      }
    }
    ++tile;
    // The barrier of the next step comes before the next tile reads thresholds.
  }
  cp_async_wait<0>();
  __syncthreads();
  if (thread < kTileRows && block_row + thread < batch) {
    const int entries = count[thread];
    work.counts[(block_row + thread) * splits + split] = entries;
  }
}

// ---- the decision ------------------------------------------------------------------------------------------------

// One block sorts keys[0, size), size a power of two, descending.
template <typename Keys>
__device__ __forceinline__ void sort_descending(Keys keys, int64_t size) {
  for (int64_t width = 2; width <= size; width *= 2) {
    for (int64_t stride = width / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int64_t low = pair / stride * stride * 2 + pair % stride, high = low + stride;
        const unsigned long long a = keys[low], b = keys[high];
        const bool descending = (low & width) == 0;
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Block b decides query first_query + b. max_keys: a power of two, at least k.
__global__ void __launch_bounds__(kDecideThreads)
    decide(TopkProblem problem, Workspace work, int64_t first_query, int splits, int capacity, int max_keys,
           float* __restrict__ similarity, int64_t* __restrict__ index) {
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(float, shared_bound, 1);
  SCAN_FAST_SHARED(int, shared_count, 1);
  const Shared<unsigned long long> keys = memory.as<unsigned long long>();
  const int64_t row = blockIdx.x, i = first_query + row, k = problem.k;
  const int thread = threadIdx.x, warp = thread / 32;
  const double margin = work.margin[i];
  const uint2* lists = work.candidates + row * splits * capacity;
  const int32_t* counts = work.counts + row * splits;

  if (margin < 0) {  // a query with a non-finite entry
    for (int64_t rank = thread; rank < k; rank += kDecideThreads) write_key(problem, similarity, index, i, rank, 0);
    return;
  }
  bool undecided = !(margin <= DBL_MAX);
  int total = 0;
  for (int s = 0; s < splits; ++s) {
    undecided = undecided || counts[s] < 0;
    total += counts[s];
  }
  if (undecided) {
    if (thread == 0) work.undecided[atomicAdd(work.undecided_count, 1ull)] = static_cast<int32_t>(i);
    return;
  }

  if (thread == 0) shared_count[0] = 0;
  if (warp == 0) {
    float bound = -FLT_MAX;
    if (total > k) {
      // Entry e of all lists together.
      const auto value_at = [&](int e) {
        int s = 0;
        while (e >= counts[s]) e -= counts[s++];
        return __uint_as_float(lists[static_cast<int64_t>(s) * capacity + e].x);
      };
      bound = lowered(reached_by(k, total, 40, value_at), margin);
    }
    if (thread == 0) shared_bound[0] = bound;
  }
  __syncthreads();
  const float bound = shared_bound[0];
  for (int s = 0; s < splits; ++s) {
    for (int e = thread; e < counts[s]; e += kDecideThreads) {
      const uint2 entry = lists[static_cast<int64_t>(s) * capacity + e];
      if (!(__uint_as_float(entry.x) >= bound)) continue;
      const int slot = atomicAdd(shared_count.get(), 1);
      if (slot < max_keys) keys[slot] = entry.y;
    }
  }
  __syncthreads();
  const int found = shared_count[0];
  if (found > max_keys) {
    if (thread == 0) work.undecided[atomicAdd(work.undecided_count, 1ull)] = static_cast<int32_t>(i);
    return;
  }
  int size = 1;
  while (size < found || size < k) size *= 2;
  for (int e = found + thread; e < size; e += kDecideThreads) keys[e] = 0ull;
  for (int e = warp; e < found; e += kDecideThreads / 32) {
    const unsigned column = static_cast<unsigned>(static_cast<unsigned long long>(keys[e]));
    __syncwarp();  // every lane has read the column
    const unsigned long long key = exact_key(problem, work, i, column);
    if (thread % 32 == 0) keys[e] = key;
  }
  sort_descending(keys, size);
  for (int64_t rank = thread; rank < k; rank += kDecideThreads) {
    const unsigned long long key = keys[rank];
    write_key(problem, similarity, index, i, rank, key);
  }
}

// Without a fast search every query is for search_exactly.
__global__ void __launch_bounds__(kThreads) leave_all_undecided(TopkProblem problem, Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < problem.n_queries) work.undecided[i] = static_cast<int32_t>(i);
}

// ---- the exact search --------------------------------------------------------------------------------------------

// Blocks share the undecided queries: keys of all rows, the k-th largest by radix selection (keys are distinct), a
// sort. all: every query, whatever undecided_count says.
__global__ void __launch_bounds__(kExactThreads)
    search_exactly(TopkProblem problem, Workspace work, bool all, int64_t sort_keys, float* __restrict__ similarity,
                   int64_t* __restrict__ index) {
  SCAN_FAST_SHARED(int, histogram, 256);
  SCAN_FAST_SHARED(unsigned long long, chosen, 1);
  SCAN_FAST_SHARED(long long, remaining, 1);
  SCAN_FAST_SHARED(int, filled, 1);
  const int thread = threadIdx.x, warp = thread / 32;
  const int64_t n = problem.n_database, k = problem.k;
  const int64_t queries = all ? problem.n_queries : static_cast<int64_t>(*work.undecided_count);
  unsigned long long* keys = work.keys + static_cast<int64_t>(blockIdx.x) * (n + sort_keys);
  unsigned long long* best = keys + n;

  for (int64_t q = blockIdx.x; q < queries; q += gridDim.x) {
    const int64_t i = work.undecided[q];
    const bool usable = work.query_length[i] <= DBL_MAX;
    for (int64_t j = warp; j < n; j += kExactThreads / 32) {
      unsigned long long key = 0;
      if (usable && work.database_length[j] <= DBL_MAX && !(problem.exclude_self && i == j)) {
        key = exact_key(problem, work, i, j);
      }
      if (thread % 32 == 0) keys[j] = key;
    }
    // The k-th largest key, eight bits at a time from the top.
    if (thread == 0) {
      chosen[0] = 0ull;
      remaining[0] = static_cast<long long>(k);
      filled[0] = 0;
    }
    for (int shift = 56; shift >= 0; shift -= 8) {
      histogram[thread] = 0;
      __syncthreads();
      const unsigned long long prefix = chosen[0];
      for (int64_t j = thread; j < n; j += kExactThreads) {
        const unsigned long long key = keys[j];
        if (shift == 56 || (key >> (shift + 8)) == (prefix >> (shift + 8))) {
          atomicAdd((histogram + static_cast<int>(key >> shift & 255)).get(), 1);
        }
      }
      __syncthreads();
      if (thread == 0) {
        long long left = remaining[0];
        int digit = 255;
        while (digit > 0 && histogram[digit] < left) left -= histogram[digit--];
        remaining[0] = left;
        chosen[0] = prefix | static_cast<unsigned long long>(digit) << shift;
      }
      __syncthreads();
    }
    const unsigned long long kth = chosen[0];  // 0 where there are fewer than k neighbours
    for (int64_t e = thread; e < sort_keys; e += kExactThreads) best[e] = 0;
    __syncthreads();
    for (int64_t j = thread; j < n; j += kExactThreads) {
      const unsigned long long key = keys[j];
      if (key != 0 && key >= kth) best[atomicAdd(filled.get(), 1)] = key;
    }
    sort_descending(best, sort_keys);
    for (int64_t rank = thread; rank < k; rank += kExactThreads) {
      write_key(problem, similarity, index, i, rank, best[rank]);
    }
    __syncthreads();
  }
}

__global__ void report(Workspace work, bool all, int64_t* searched_again) {
  *searched_again = all ? 0 : static_cast<int64_t>(*work.undecided_count);
}

// ---- the host side -----------------------------------------------------------------------------------------------

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
