// Forward kernel of NT-Xent, portable: sums of exponentials over the columns.
//
// The similarities are symmetric. Among anchors only tiles on and below the diagonal are formed, and one exponential
// serves its row and its column (cuda_schedule.cuh). At temperatures of 0.03 and above one shift, 1/tau, suits all
// rows. Below, a first pass finds each row's maximum over its negatives, and a second pass sums relative to it.
#pragma once

#include <cmath>

#include "nt_xent/cuda_schedule.cuh"
#include "nt_xent/cuda_tiles.cuh"

namespace scan_fast {
namespace {

constexpr int kInner = 64;  // rows of an inner tile

enum class Pass { kSums, kMaxima, kShiftedSums };

template <Pass kPass>
__device__ __forceinline__ float combined(float x, float y) {
  return kPass == Pass::kMaxima ? fmaxf(x, y) : x + y;
}
template <Pass kPass>
__device__ __forceinline__ float nothing() {
  return kPass == Pass::kMaxima ? -INFINITY : 0.0f;
}

// Maps positions (cuda_schedule.cuh) to rows of [z0; z1].
struct Positions {
  int samples, begin, count;
  bool both;

  __device__ explicit Positions(const Params& p)
      : samples(p.samples), begin(p.sample_begin), count(p.sample_count), both(p.anchors == p.rows()) {}
  __device__ int row_of_anchor(int i) const { return i < count ? begin + i : samples - count + begin + i; }
  __device__ int row_of_other(int i) const {
    const int first_views = samples - count;
    if (i < first_views) return i < begin ? i : i + count;
    i -= first_views;
    return samples + (!both || i < begin ? i : i + count);
  }
  // Distance from the anchor of a first view to its positive. Here the others are numbered after the anchors.
  __device__ int positive_offset() const { return both ? count : samples + begin; }
};

// partial: (slots, anchors). shift: (anchors) in log2, for Pass::kShiftedSums.
template <bool kSplit, int kOuter, int kChunk, bool kResident, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const half_t* __restrict__ packed, const float* __restrict__ shift, float* __restrict__ partial,
                   ForwardSchedule<kInner> schedule, Params p) {
  constexpr int kM = kInner / 32, kColumns = kOuter / 16;  // 16-row and 8-column products per warp
  // See exp2_element. In cycles of a multiprocessor of an A100 (1,024 multiply-adds and 16 exponentials per cycle), a tile
  // of 64 x 128 takes 8 D of products, three times that if split, and 512 of exponentials, or 1,024 for kShiftedSums. So
  // exponentials matter up to 64 dimensions, which have kernels of their own (kChunk), and at low temperatures.
  constexpr bool kManyExponentials = kPass == Pass::kSums ? kResident && kChunk == 64 : kPass == Pass::kShiftedSums;
  [[maybe_unused]] constexpr int kEvery = kManyExponentials && !kSplit ? 4 : 0;
  SCAN_FAST_SHARED(float, inner_part, 2 * kInner);
  SCAN_FAST_SHARED(float, outer_part, 2 * kOuter);
  const Positions at(p);
  const int anchors = schedule.anchors, others = schedule.others, anchor_tiles = schedule.anchor_tiles;
  const int offset = at.positive_offset(), thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const float limit = kOperandScale * kOperandScale * p.scale;
  const int block = static_cast<int>(blockIdx.x), block_end = schedule.block_begin(block + 1);
  int next = schedule.block_begin(block), outer = schedule.outer_of(next);
  for (int tiles = 0; next < block_end; next += tiles, ++outer) {
    const int from = next - schedule.prefix(outer), rest = schedule.length(outer) - from;
    tiles = min(block_end - next, rest);
    const int first_column = outer * kOuter, first_inner = schedule.first_inner(outer);
    float column_sum[kColumns][2], column_shift[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        column_sum[n][c] = nothing<kPass>();
        const int column = first_column + warp_column<kOuter>() + fragment_column(n, c);
        column_shift[n][c] = kPass == Pass::kShiftedSums && column < anchors ? shift[column] : 0.0f;
      }
    }
    for_inner_tiles<kSplit, kOuter, kInner, kChunk, kResident>(
        packed, p, from, from + tiles,
        [&](int r) { return first_column + r < anchors ? at.row_of_anchor(first_column + r) : -1; },
        [&](int tile, int r) {
          const int inner = first_inner + tile;
          if (inner < anchor_tiles) {
            const int i = inner * kInner + r;
            return i < anchors ? at.row_of_anchor(i) : -1;
          }
          const int i = (inner - anchor_tiles) * kInner + r;
          return i < others ? at.row_of_other(i) : -1;
        },
        [&](float (&s)[kM][kColumns][4], int tile) {
          const int inner = first_inner + tile;
          const bool of_anchors = inner < anchor_tiles, diagonal = tile * kInner < kOuter && of_anchors;
          const bool transposed = of_anchors && !diagonal;
          // The others are numbered after the anchors; `end` is behind the last row.
          const int first = of_anchors ? inner * kInner : anchors + (inner - anchor_tiles) * kInner;
          const int end = of_anchors ? anchors : anchors + others;
          const bool positives = first < first_column + kOuter + offset && first_column + offset < first + kInner;
          if (diagonal || positives || first + kInner > end || first_column + kOuter > anchors) {
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const int i = first + warp_row<kInner>() + 16 * m + fragment_row(h);
                const int from = first_column + warp_column<kOuter>() + fragment_column(0, 0);
                const Excluded out(i, at.count, offset, from, i < end ? anchors : 0);
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                  for (int c = 0; c < 2; ++c) {
                    float& value = s[m][n][2 * h + c];
                    value = out.holds(8 * n + c) ? -INFINITY : value;
                  }
                }
              }
            }
          }
          float inner_sum[kM][2];
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float sum = nothing<kPass>(), inner_shift = INFINITY;  // `sum` is not used unless `transposed`
              if constexpr (kPass == Pass::kShiftedSums) {
                const int i = first + warp_row<kInner>() + 16 * m + fragment_row(h);
                if (transposed && i < end) inner_shift = shift[i];
              }
#pragma unroll
              for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                  const float value = s[m][n][2 * h + c];
                  if constexpr (kPass == Pass::kSums) {
                    const float e = exp2_element<kEvery>(value * p.scale - limit, 2 * n + c);
                    column_sum[n][c] += e;
                    sum += e;
                  } else if constexpr (kPass == Pass::kMaxima) {
                    column_sum[n][c] = fmaxf(column_sum[n][c], value * p.scale);
                    sum = fmaxf(sum, value * p.scale);
                  } else {
                    column_sum[n][c] += exp2_element<kEvery>(value * p.scale - column_shift[n][c], 2 * n + c);
                    sum += exp2_element<kEvery>(value * p.scale - inner_shift, 2 * n + c);
                  }
                }
              }
              inner_sum[m][h] = sum;
            }
          }
          if (!transposed) return;
      // Four lanes and two warps (the two halves of the outer tile) share a row.
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& sum = inner_sum[m][h];
              sum = combined<kPass>(sum, __shfl_xor_sync(kFullMask, sum, 1));
              sum = combined<kPass>(sum, __shfl_xor_sync(kFullMask, sum, 2));
              if (lane % 4 == 0) {
                inner_part[thread / 32 % 2 * kInner + warp_row<kInner>() + 16 * m + fragment_row(h)] = sum;
              }
            }
          }
          __syncthreads();
          if (thread < kInner && first + thread < end) {
            const float left = inner_part[thread], right = inner_part[kInner + thread];
            partial[slot_at(schedule.transposed_slot(outer), anchors, first + thread)] = combined<kPass>(left, right);
          }
        });
    // Eight lanes and two warps (the two halves of the inner tile) share a column.
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& sum = column_sum[n][c];
#pragma unroll
        for (int with = 4; with < 32; with *= 2) sum = combined<kPass>(sum, __shfl_xor_sync(kFullMask, sum, with));
        if (lane < 4) outer_part[thread / 64 * kOuter + warp_column<kOuter>() + fragment_column(n, c)] = sum;
      }
    }
    __syncthreads();
    if (thread < kOuter && first_column + thread < anchors) {
      const float upper = outer_part[thread], lower = outer_part[kOuter + thread];
      partial[slot_at(schedule.segment_slot(outer, block), anchors, first_column + thread)] =
          combined<kPass>(upper, lower);
    }
  }
}

}  // namespace
}  // namespace scan_fast
