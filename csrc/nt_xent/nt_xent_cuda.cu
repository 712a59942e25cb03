// NT-Xent on the GPU, portable form: mma.sync m16n8k16 with cp.async, one source for every architecture from sm_80.
//
// Maths and what is saved: nt_xent.h. As in the CPU kernel the positive pair is left out of every tile and added in
// float32 at the end, where its terms would nearly cancel.
//
// Operands. Unit rows times 2^8 in float16, which keeps them away from its subnormals. Float32 inputs are split into
// hi + lo (22 bits) and a product is hi*hi + hi*lo + lo*hi, three matrix instructions; `reduced` uses hi alone. The
// weights W of the backward pass are scaled by a power of two so that the largest upstream gradient is at most 2^14,
// and split likewise: |W_ij| <= |g_i| + |g_j|, and what falls below float16's range is below 2^-38 of the largest.
//
// Tiling. A block of 4 warps owns 64 rows (16 per warp) and walks over tiles of 64 columns. The similarities of a tile
// stay in registers. Forward: a running maximum and sum per row. Backward: W is repacked in registers from the layout
// of a result to that of a left operand, and dZ (64 x 128) += W Z reads the same shared tile of Z transposed.
// Up to D = 128 the block's own rows are resident and the column tiles double-buffered. A larger D is walked over in
// chunks of 128, single-buffered, and the backward pass has one block per slice of 128 dimensions of dZ, which makes
// the similarities anew: correct for every D, meant for projection heads of 128.
//
// Parallelism and determinism. Where the row blocks are too few, the columns are divided over grid.y; each part writes
// its own partial result and a last kernel adds them in order. No atomics.
// Work: 2 M^2 D + 4 M^2 D flops (three times that when split), M^2 + M^2 exponentials; shared memory 48 KB reduced,
// 96 KB split (within sm_89's 99; two blocks per multiprocessor on sm_90). The symmetric half of the forward pass is not yet used.
#include <algorithm>
#include <cmath>

#include "common/device.h"
#include "nt_xent/nt_xent.h"

namespace scan_fast {
namespace {

constexpr int kRows = 64, kColumns = 64, kChunk = 128, kThreads = 128;
constexpr int kPieces = kChunk / 8;  // 16-byte pieces of a tile's row
constexpr int kTile = kRows * kChunk;
constexpr int kColumnSteps = kColumns / 16, kChunkSteps = kChunk / 16;
constexpr float kOperandScale = 256.0f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinNorm = 1e-12f;
constexpr int kRowThreads = 128;  // kernels with one warp per row

// What the kernels need to know, by value.
struct Params {
  int64_t samples, sample_begin, sample_count;
  int64_t local_rows;   // rows that this launch handles: views * sample_count
  int64_t dim, padded;  // D, and D rounded up to a multiple of 8: the row length of the packed operands
  int64_t anchors;      // 2N or N: rows with a weight
  int64_t splits;       // grid.y
  float temperature;
  float scale;  // from a product of operands to log2(exp(s))
  bool fixed_shift;

  __device__ int64_t rows() const { return 2 * samples; }
  __device__ int64_t global_row(int64_t local) const {
    return local < sample_count ? sample_begin + local : samples + sample_begin + local - sample_count;
  }
  __device__ int64_t positive(int64_t row) const { return row < samples ? row + samples : row - samples; }
};

// ---- per-row kernels: one warp per row ------------------------------------------------------------------------------

__device__ inline int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + static_cast<int>(threadIdx.x) / 32;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    normalize_kernel(const T* __restrict__ z0, const T* __restrict__ z1, float* __restrict__ unit,
                     float* __restrict__ inv_norm, Params p) {
  const int64_t row = warp_row();
  if (row >= p.rows()) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T* x = row < p.samples ? z0 + row * p.dim : z1 + (row - p.samples) * p.dim;
  // Scaled by the largest element, so that neither huge nor tiny rows lose their direction.
  float largest = 0;
  for (int64_t k = lane; k < p.dim; k += 32) largest = fmaxf(largest, fabsf(to_float(x[k])));
  largest = warp_max(largest);
  float sum = 0;
  for (int64_t k = lane; k < p.dim; k += 32) {
    const float value = largest > 0 ? to_float(x[k]) / largest : to_float(x[k]);
    sum += value * value;
  }
  const float root = sqrtf(warp_sum(sum));
  // norm = largest * root may leave float32's range although every quotient below is within it.
  const bool short_row = largest * root < kMinNorm;
  for (int64_t k = lane; k < p.dim; k += 32) {
    const float value = to_float(x[k]);
    unit[row * p.dim + k] = short_row ? value / kMinNorm : value / largest / root;
  }
  if (lane == 0) inv_norm[row] = short_row ? 1 / kMinNorm : 1 / largest / root;
}

// hi (and lo) of the scaled unit rows, padded with zeros to a multiple of 8.
template <bool kSplit>
__global__ void __launch_bounds__(kRowThreads)
    pack_kernel(const float* __restrict__ unit, half_t* __restrict__ packed, Params p) {
  const int64_t row = warp_row();
  if (row >= p.rows()) return;
  for (int64_t k = static_cast<int>(threadIdx.x) % 32; k < p.padded; k += 32) {
    const float value = k < p.dim ? unit[row * p.dim + k] * kOperandScale : 0.0f;
    const half_t hi = from_float<half_t>(value);
    packed[row * p.padded + k] = hi;
    if (kSplit) packed[(p.rows() + row) * p.padded + k] = from_float<half_t>(value - to_float(hi));
  }
}

__device__ inline float row_dot(const float* __restrict__ x, const float* __restrict__ y, int64_t dim) {
  float sum = 0;
  for (int64_t k = static_cast<int>(threadIdx.x) % 32; k < dim; k += 32) sum += x[k] * y[k];
  return warp_sum(sum);
}

// From the parts' maxima and sums over the negatives (in log2) to the loss and the lse less 1/tau.
__global__ void __launch_bounds__(kRowThreads)
    finish_forward_kernel(const float* __restrict__ partial_max, const float* __restrict__ partial_sum,
                          const float* __restrict__ unit, float* __restrict__ losses, float* __restrict__ shifted_lse,
                          Params p) {
  const int64_t local = warp_row();
  if (local >= p.local_rows) return;
  float largest = -INFINITY;
  for (int64_t s = 0; s < p.splits; ++s) largest = fmaxf(largest, partial_max[s * p.local_rows + local]);
  const float shift = largest == -INFINITY ? 0.0f : largest;
  float sum = 0;
  for (int64_t s = 0; s < p.splits; ++s) {
    const float part = partial_sum[s * p.local_rows + local];
    // A part without negatives has maximum -infinity and sum zero.
    sum += part == 0 ? 0.0f : part * exp2f(partial_max[s * p.local_rows + local] - shift);
  }
  const int64_t row = p.global_row(local);
  const float positive = row_dot(unit + row * p.dim, unit + p.positive(row) * p.dim, p.dim);
  if (static_cast<int>(threadIdx.x) % 32 != 0) return;
  const float shifted = (positive - 1) / p.temperature;
  const float negatives = logf(sum) + (shift * kLn2 - 1 / p.temperature);
  const float excess = negatives - shifted;
  const float loss = excess > 0 ? excess + log1pf(expf(-excess)) : log1pf(expf(excess));
  losses[local] = loss;
  shifted_lse[local] = loss + shifted;
}

// One block: weight_i (zero for rows that are no anchors), shift_i, and 1 / (all scales) for the sums of W Z.
__global__ void __launch_bounds__(1024)
    weights_kernel(const float* __restrict__ grad_losses, const float* __restrict__ shifted_lse,
                   float* __restrict__ weight, float* __restrict__ shift, float* __restrict__ unscale, Params p) {
  SCAN_FAST_SHARED(float, largest_of, 32);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float largest = 0;
  for (int64_t i = thread; i < p.anchors; i += threads) largest = fmaxf(largest, fabsf(grad_losses[i]));
  largest = warp_max(largest);
  if (thread % 32 == 0) largest_of[thread / 32] = largest;
  __syncthreads();
  largest = 0;
  for (int w = 0; w < threads / 32; ++w) {
    const float other = largest_of[w];
    largest = fmaxf(largest, other);
  }
  // The power of two that brings the largest |g| to [2^13, 2^14); kept within float32 for extreme gradients.
  const int exponent = largest > 0 && largest < INFINITY ? max(-100, min(100, 13 - ilogbf(largest))) : 0;
  const float factor = ldexpf(1.0f, exponent);
  for (int64_t i = thread; i < p.rows(); i += threads) {
    const bool anchor = i < p.anchors;
    const float lse = anchor ? shifted_lse[i] : 0.0f;
    const float g = anchor ? grad_losses[i] * factor : 0.0f;
    weight[i] = p.fixed_shift && anchor ? g * expf(-lse) : g;
    shift[i] = (lse + 1 / p.temperature) * kLog2E;
  }
  if (thread == 0) *unscale = 1 / (factor * kOperandScale);
}

// du, the normalise backward, and the output type.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    finish_backward_kernel(const float* __restrict__ partial, const float* __restrict__ unit,
                           const float* __restrict__ inv_norm, const float* __restrict__ losses,
                           const float* __restrict__ grad_losses, const float* __restrict__ unscale,
                           T* __restrict__ grad_z0, T* __restrict__ grad_z1, Params p) {
  const int64_t local = warp_row();
  if (local >= p.local_rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = p.global_row(local), other = p.positive(row);
  const int64_t first = row < other ? row : other, second = row < other ? other : row;
  float pull = grad_losses[first] * expm1f(-losses[first]);
  if (second < p.anchors) pull += grad_losses[second] * expm1f(-losses[second]);
  const float factor = *unscale;
  const auto du = [&](int64_t k) {
    float sum = 0;
    for (int64_t s = 0; s < p.splits; ++s) sum += partial[(s * p.local_rows + local) * p.dim + k];
    return (sum * factor + pull * unit[other * p.dim + k]) / p.temperature;
  };
  float radial = 0;
  for (int64_t k = lane; k < p.dim; k += 32) radial += du(k) * unit[row * p.dim + k];
  radial = warp_sum(radial);
  // A row shorter than 1e-12 was divided by that constant, so nothing is projected out.
  if (inv_norm[row] >= 1 / kMinNorm) radial = 0;
  T* out = local < p.sample_count ? grad_z0 + local * p.dim : grad_z1 + (local - p.sample_count) * p.dim;
  for (int64_t k = lane; k < p.dim; k += 32) {
    out[k] = from_float<T>((du(k) - radial * unit[row * p.dim + k]) * inv_norm[row]);
  }
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

// Where a row's piece lies in a tile: eight rows that ldmatrix reads together lie in distinct banks.
__device__ __forceinline__ int tile_at(int row, int piece) { return row * kChunk + (piece ^ (row % 8)) * 8; }

// Copies 64 rows of one chunk, hi and (kSplit) lo, into a tile; rows and dimensions that do not exist become zeros.
// row_of(r) gives the global row of tile row r, or -1.
template <bool kSplit, typename RowOf>
__device__ __forceinline__ void load_tile(const Shared<half_t>& tile, const half_t* __restrict__ packed,
                                          const Params& p, int64_t chunk, RowOf row_of) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
    const int r = i / kPieces, piece = i % kPieces;
    const int64_t row = row_of(r), k = chunk * kChunk + piece * 8;
    const bool exists = row >= 0 && k < p.padded;
#pragma unroll
    for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
      const half_t* from = exists ? packed + (part * p.rows() + row) * p.padded + k : packed;
      cp_async_16((tile + part * kTile + tile_at(r, piece)).get(), from, exists ? 16 : 0);
    }
  }
}

// s (16 rows of this warp x 64 columns) += A B^T over one chunk.
template <bool kSplit>
__device__ __forceinline__ void add_products(float (&s)[2 * kColumnSteps][4], const Shared<half_t>& a_tile,
                                             const Shared<half_t>& b_tile, int steps) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int k = 0; k < steps; ++k) {
    const int a_at = tile_at(warp * 16 + lane % 16, 2 * k + lane / 16);
    const int b_at = tile_at(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
    uint32_t a[kSplit ? 2 : 1][4];
#pragma unroll
    for (int part = 0; part < (kSplit ? 2 : 1); ++part) {
      ldmatrix_x4(a[part], (a_tile + part * kTile + a_at).get());
    }
#pragma unroll
    for (int j = 0; j < kColumnSteps; ++j) {
      uint32_t b[4];
      ldmatrix_x4(b, (b_tile + b_at + j * 16 * kChunk).get());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
        mma_16816<half_t>(s[2 * j + h], a[0], half);
        if constexpr (kSplit) mma_16816<half_t>(s[2 * j + h], a[1], half);
      }
      if constexpr (kSplit) {
        ldmatrix_x4(b, (b_tile + kTile + b_at + j * 16 * kChunk).get());
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
          mma_16816<half_t>(s[2 * j + h], a[0], half);
        }
      }
    }
  }
}

// Calls consume(s, column, b_tile) for each of this block's column tiles; s holds operand products, b_tile the chunk
// `last_chunk` of the tile's rows. Every thread takes part. The columns [0, column_end) are divided over grid.y.
template <bool kSplit, typename Consume>
__device__ __forceinline__ void for_each_tile(const half_t* __restrict__ packed, const Params& p, int64_t column_end,
                                              int64_t last_chunk, Consume consume) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  constexpr int kOperand = (kSplit ? 2 : 1) * kTile;
  const Shared<half_t> a_tile = dynamic.as<half_t>(), b_tiles = a_tile + kOperand;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t chunks = (p.dim + kChunk - 1) / kChunk;
  const int64_t tiles = (column_end + kColumns - 1) / kColumns;
  const int64_t begin = tiles * blockIdx.y / p.splits, end = tiles * (blockIdx.y + 1) / p.splits;
  const auto load_rows = [&](int64_t chunk) {
    load_tile<kSplit>(a_tile, packed, p, chunk, [&](int r) {
      return first_row + r < p.local_rows ? p.global_row(first_row + r) : static_cast<int64_t>(-1);
    });
  };
  const auto load_columns = [&](int64_t tile, int64_t chunk, const Shared<half_t>& to) {
    load_tile<kSplit>(to, packed, p, chunk, [&](int r) {
      return tile * kColumns + r < p.rows() ? tile * kColumns + r : static_cast<int64_t>(-1);
    });
  };
  const auto steps_of = [&](int64_t chunk) {
    const int64_t left = p.padded - chunk * kChunk;
    return static_cast<int>(left < kChunk ? (left + 15) / 16 : kChunkSteps);
  };

  if (chunks == 1) {
    if (begin < end) {
      load_rows(0);
      load_columns(begin, 0, b_tiles);
    }
    cp_async_commit();
    for (int64_t tile = begin; tile < end; ++tile) {
      const Shared<half_t> now = b_tiles + (tile - begin) % 2 * kOperand;
      if (tile + 1 < end) load_columns(tile + 1, 0, b_tiles + (tile + 1 - begin) % 2 * kOperand);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      float s[2 * kColumnSteps][4] = {};
      add_products<kSplit>(s, a_tile, now, steps_of(0));
      consume(s, static_cast<int>(tile * kColumns), now);
      __syncthreads();
    }
  } else {
    for (int64_t tile = begin; tile < end; ++tile) {
      float s[2 * kColumnSteps][4] = {};
      for (int64_t c = 1; c <= chunks; ++c) {
        const int64_t chunk = (last_chunk + c) % chunks;
        load_rows(chunk);
        load_columns(tile, chunk, b_tiles);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        add_products<kSplit>(s, a_tile, b_tiles, steps_of(chunk));
        if (c == chunks) consume(s, static_cast<int>(tile * kColumns), b_tiles);
        __syncthreads();
      }
    }
  }
  cp_async_wait<0>();
}

// Element r of n-tile t of this thread: row lane/4 + 8 * (r/2) of its warp's 16, column 8t + 2 * (lane%4) + r%2.
__device__ __forceinline__ int fragment_row(int half) {
  return static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
}
__device__ __forceinline__ int fragment_column(int t, int r) {
  return 8 * t + 2 * (static_cast<int>(threadIdx.x) % 4) + r % 2;
}

template <bool kSplit>
__global__ void __launch_bounds__(kThreads, kSplit ? 2 : 3)
    forward_kernel(const half_t* __restrict__ packed, float* __restrict__ partial_max, float* __restrict__ partial_sum,
                   Params p) {
  int self[2], positive[2];
  float largest[2], sum[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t local = static_cast<int64_t>(blockIdx.x) * kRows + fragment_row(h);
    self[h] = local < p.local_rows ? static_cast<int>(p.global_row(local)) : 0;
    positive[h] = static_cast<int>(p.positive(self[h]));
    largest[h] = -INFINITY;
    sum[h] = 0;
  }
  const int column_end = static_cast<int>(p.rows());
  for_each_tile<kSplit>(packed, p, column_end, 0, [&](float(&s)[2 * kColumnSteps][4], int column,
                                                      const Shared<half_t>&) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int t = 0; t < 2 * kColumnSteps; ++t) {
#pragma unroll
        for (int r = 2 * h; r < 2 * h + 2; ++r) {
          const int j = column + fragment_column(t, r);
          s[t][r] = j == self[h] || j == positive[h] || j >= column_end ? -INFINITY : s[t][r] * p.scale;
          tile_max = fmaxf(tile_max, s[t][r]);
        }
      }
      tile_max = fmaxf(largest[h], tile_max);
      // Any finite shift serves where nothing counts yet.
      const float shift = tile_max == -INFINITY ? 0.0f : tile_max;
      float tile_sum = 0;
#pragma unroll
      for (int t = 0; t < 2 * kColumnSteps; ++t) {
        tile_sum += exp2_approx(s[t][2 * h] - shift) + exp2_approx(s[t][2 * h + 1] - shift);
      }
      sum[h] = (sum[h] == 0 ? 0.0f : sum[h] * exp2_approx(largest[h] - shift)) + tile_sum;
      largest[h] = tile_max;
    }
  });
  // The four lanes that share a row, in a fixed order.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float row_max = largest[h];
    row_max = fmaxf(row_max, __shfl_xor_sync(kFullMask, row_max, 1));
    row_max = fmaxf(row_max, __shfl_xor_sync(kFullMask, row_max, 2));
    const float shift = row_max == -INFINITY ? 0.0f : row_max;
    float row_sum = sum[h] == 0 ? 0.0f : sum[h] * exp2f(largest[h] - shift);
    row_sum += __shfl_xor_sync(kFullMask, row_sum, 1);
    row_sum += __shfl_xor_sync(kFullMask, row_sum, 2);
    const int64_t local = static_cast<int64_t>(blockIdx.x) * kRows + fragment_row(h);
    if (threadIdx.x % 4 == 0 && local < p.local_rows) {
      partial_max[blockIdx.y * p.local_rows + local] = row_max;
      partial_sum[blockIdx.y * p.local_rows + local] = row_sum;
    }
  }
}

template <bool kSplit, bool kFixedShift>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const half_t* __restrict__ packed, const float* __restrict__ weight,
                    const float* __restrict__ shift, float* __restrict__ partial, Params p) {
  const int64_t first_local = static_cast<int64_t>(blockIdx.x) * kRows, slice = blockIdx.z;
  int self[2], positive[2];
  float row_weight[2], row_shift[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t local = first_local + fragment_row(h);
    const bool exists = local < p.local_rows;
    self[h] = exists ? static_cast<int>(p.global_row(local)) : 0;
    positive[h] = static_cast<int>(p.positive(self[h]));
    row_weight[h] = exists ? weight[self[h]] : 0.0f;
    row_shift[h] = exists ? shift[self[h]] : 0.0f;
  }
  float dz[2 * kChunkSteps][4] = {};
  const int64_t slice_left = p.padded - slice * kChunk;
  const int slice_steps = static_cast<int>(slice_left < kChunk ? (slice_left + 15) / 16 : kChunkSteps);
  // Rows of the second view that are no anchors meet weights only in the columns of the first.
  const bool first_view_only = first_local >= p.sample_count && p.anchors < p.rows();
  const int column_end = static_cast<int>(first_view_only ? p.samples : p.rows());
  for_each_tile<kSplit>(packed, p, column_end, slice, [&](float(&s)[2 * kColumnSteps][4], int column,
                                                          const Shared<half_t>& b_tile) {
#pragma unroll
    for (int t = 0; t < 2 * kColumnSteps; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = column + fragment_column(t, c);
        const bool exists = j < column_end;
        const float column_weight = exists ? weight[j] : 0.0f;
        const float column_shift = kFixedShift || !exists ? 0.0f : shift[j];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& value = s[t][2 * h + c];
          const bool counts = exists && j != self[h] && j != positive[h];
          float w;
          if constexpr (kFixedShift) {
            w = exp2_approx((value - kOperandScale * kOperandScale) * p.scale) * (row_weight[h] + column_weight);
          } else {
            // Probabilities: at tiny temperatures the rounding of s alone could lift their logarithms above zero.
            const float by_row = value * p.scale - row_shift[h], by_column = value * p.scale - column_shift;
            w = exp2_approx(by_row > 0 ? 0.0f : by_row) * row_weight[h] +
                exp2_approx(by_column > 0 ? 0.0f : by_column) * column_weight;
          }
          value = counts ? w : 0.0f;
        }
      }
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < kColumnSteps; ++j) {
      uint32_t w[kSplit ? 2 : 1][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float x = s[2 * j + q / 2][q % 2 * 2], y = s[2 * j + q / 2][q % 2 * 2 + 1];
        w[0][q] = pack2<half_t>(x, y);
        if constexpr (kSplit) {
          const float2 high = unpack2<half_t>(w[0][q]);
          w[1][q] = pack2<half_t>(x - high.x, y - high.y);
        }
      }
#pragma unroll
      for (int n = 0; n < kChunkSteps; ++n) {
        if (n >= slice_steps) break;
        const int b_at = tile_at(j * 16 + lane % 16, 2 * n + lane / 16);
        uint32_t b[4];
        ldmatrix_x4_trans(b, (b_tile + b_at).get());
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
          mma_16816<half_t>(dz[2 * n + h], w[0], half);
          if constexpr (kSplit) mma_16816<half_t>(dz[2 * n + h], w[1], half);
        }
        if constexpr (kSplit) {
          ldmatrix_x4_trans(b, (b_tile + kTile + b_at).get());
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
            mma_16816<half_t>(dz[2 * n + h], w[0], half);
          }
        }
      }
    }
  });
#pragma unroll
  for (int t = 0; t < 2 * kChunkSteps; ++t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t local = first_local + fragment_row(r / 2), k = slice * kChunk + fragment_column(t, r);
      if (local < p.local_rows && k < p.dim) partial[(blockIdx.y * p.local_rows + local) * p.dim + k] = dz[t][r];
    }
  }
}

// ---- host ------------------------------------------------------------------------------------------------------------

constexpr double kFixedShiftTemperature = 0.03;  // exp(-2 / 0.03) = 1e-29

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Enough parts of the columns to give each multiprocessor two blocks.
int64_t column_splits(int64_t local_rows, int64_t columns, int64_t slices) {
  const int64_t blocks = ceil_div(local_rows, kRows) * slices;
  return std::clamp<int64_t>(ceil_div(2 * multiprocessors(), blocks), 1,
                             std::min<int64_t>(16, ceil_div(columns, kColumns)));
}

Params make_params(const NTXentProblem& problem, int64_t local_rows, int64_t slices) {
  // Rows are counted in 32 bits inside the tiles; addresses are 64-bit.
  if (problem.rows() > (int64_t{1} << 30)) throw std::runtime_error("nt_xent: more than 2^30 rows");
  Params p{};
  p.samples = problem.samples;
  p.sample_begin = problem.sample_begin;
  p.sample_count = problem.sample_count;
  p.local_rows = local_rows;
  p.dim = problem.dim;
  p.padded = ceil_div(problem.dim, 8) * 8;
  p.anchors = problem.anchors();
  p.splits = column_splits(local_rows, problem.rows(), slices);
  p.temperature = static_cast<float>(problem.temperature);
  p.scale = static_cast<float>(1.4426950408889634 / problem.temperature / (kOperandScale * kOperandScale));
  p.fixed_shift = problem.temperature >= kFixedShiftTemperature;
  return p;
}

Params forward_params(const NTXentProblem& problem) { return make_params(problem, problem.local_anchors(), 1); }
Params backward_params(const NTXentProblem& problem) {
  return make_params(problem, 2 * problem.sample_count, ceil_div(problem.dim, kChunk));
}

// Hands out parts of the workspace, each aligned to 256 bytes; with a null base it only measures.
struct Carver {
  unsigned char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return part;
  }
};

struct ForwardWorkspace {
  half_t* packed;
  float *partial_max, *partial_sum;
  ForwardWorkspace(Carver& carver, const Params& p, bool reduced)
      : packed(carver.take<half_t>((reduced ? 1 : 2) * 2 * p.samples * p.padded)),
        partial_max(carver.take<float>(p.splits * p.local_rows)),
        partial_sum(carver.take<float>(p.splits * p.local_rows)) {}
};

struct BackwardWorkspace {
  half_t* packed;
  float *weight, *shift, *unscale, *partial;
  BackwardWorkspace(Carver& carver, const Params& p, bool reduced)
      : packed(carver.take<half_t>((reduced ? 1 : 2) * 2 * p.samples * p.padded)),
        weight(carver.take<float>(2 * p.samples)),
        shift(carver.take<float>(2 * p.samples)),
        unscale(carver.take<float>(1)),
        partial(carver.take<float>(p.splits * p.local_rows * p.dim)) {}
};

dim3 grid_of_rows(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / 32))); }

// The block's own rows and the column tiles: two of these where the rows are resident, one where chunks follow.
size_t tile_bytes(const Params& p, bool reduced) {
  return static_cast<size_t>(p.dim <= kChunk ? 3 : 2) * (reduced ? 1 : 2) * kTile * sizeof(half_t);
}

void pack(const float* unit, half_t* packed, const Params& p, bool reduced, StreamHandle stream) {
  launch(reduced ? pack_kernel<false> : pack_kernel<true>, grid_of_rows(2 * p.samples), dim3(kRowThreads), 0, stream,
         unit, packed, p);
}

}  // namespace

int64_t nt_xent_forward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  Carver carver{nullptr};
  ForwardWorkspace(carver, forward_params(problem), reduced);
  return carver.used;
}

int64_t nt_xent_backward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  Carver carver{nullptr};
  BackwardWorkspace(carver, backward_params(problem), reduced);
  return carver.used;
}

void nt_xent_forward_cuda(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream) {
  const Params p = forward_params(problem);
  Carver carver{static_cast<unsigned char*>(workspace)};
  const ForwardWorkspace parts(carver, p, reduced);
  dispatch_dtype(dtype, [&]<typename T>() {
    launch(normalize_kernel<T>, grid_of_rows(problem.rows()), dim3(kRowThreads), 0, stream, static_cast<const T*>(z0),
           static_cast<const T*>(z1), unit, inv_norm, p);
  });
  pack(unit, parts.packed, p, reduced, stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.local_rows, kRows)), static_cast<unsigned>(p.splits));
  launch(reduced ? forward_kernel<false> : forward_kernel<true>, grid, dim3(kThreads), tile_bytes(p, reduced), stream,
         parts.packed, parts.partial_max, parts.partial_sum, p);
  launch(finish_forward_kernel, grid_of_rows(p.local_rows), dim3(kRowThreads), 0, stream, parts.partial_max,
         parts.partial_sum, unit, losses, shifted_lse, p);
}

void nt_xent_backward_cuda(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const float* grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream) {
  const Params p = backward_params(problem);
  Carver carver{static_cast<unsigned char*>(workspace)};
  const BackwardWorkspace parts(carver, p, reduced);
  pack(unit, parts.packed, p, reduced, stream);
  launch(weights_kernel, dim3(1), dim3(1024), 0, stream, grad_losses, shifted_lse, parts.weight, parts.shift,
         parts.unscale, p);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.local_rows, kRows)), static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(ceil_div(p.dim, kChunk)));
  const auto kernel = reduced ? (p.fixed_shift ? backward_kernel<false, true> : backward_kernel<false, false>)
                              : (p.fixed_shift ? backward_kernel<true, true> : backward_kernel<true, false>);
  launch(kernel, grid, dim3(kThreads), tile_bytes(p, reduced), stream, parts.packed, parts.weight, parts.shift,
         parts.partial, p);
  dispatch_dtype(dtype, [&]<typename T>() {
    launch(finish_backward_kernel<T>, grid_of_rows(p.local_rows), dim3(kRowThreads), 0, stream, parts.partial, unit,
           inv_norm, losses, grad_losses, parts.unscale, static_cast<T*>(grad_z0), static_cast<T*>(grad_z1), p);
  });
}

}  // namespace scan_fast
