// Operands of the sm_90a kernels: panels (common/panels.h) in the order of positions.
//
// The anchors of a call come first: the handled samples' first views, then (if all rows are anchors) their second
// views. The other rows begin at the next multiple of 128. So a tile holds rows of one kind, and all tiles are numbered
// consecutively. Padding positions are zero. In the backward pass all handled rows count as anchors, since all of them
// have a gradient. If one process handles all samples, positions are row numbers.
#pragma once

#include "common/tile_products.cuh"
#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

struct PackedPositions {
  int samples, begin, count;
  bool both;

  __host__ __device__ int anchors() const { return both ? 2 * count : count; }
  __host__ __device__ int others() const { return 2 * samples - anchors(); }
  __host__ __device__ int first_other() const { return ceil_div(anchors(), kPanelRows) * kPanelRows; }
  __host__ __device__ int total() const { return first_other() + ceil_div(others(), kPanelRows) * kPanelRows; }
  __device__ int position(int row) const {
    const bool second = row >= samples;
    const int sample = second ? row - samples : row;
    const bool handled = sample >= begin && sample < begin + count;
    if (handled && (both || !second)) return (second ? count : 0) + sample - begin;
    const int skipped = sample >= begin + count && (both || !second) ? count : 0;
    return first_other() + (second ? samples - count : 0) + sample - skipped;
  }
  // Distance from the anchor of a first view (a position < count) to its positive.
  __device__ int positive_offset() const { return both ? count : first_other() + samples - count + begin; }
};

// Excludes from a tile of products (64 rows of a warpgroup in the layout of wgmma, kColumns columns) the pairs of a row
// with itself and with its positive, and what is behind the ends of rows and columns.
template <int kColumns>
__device__ __forceinline__ void exclude_pairs(float (&s)[kColumns / 2], int first_row, int first_column, int count,
                                              int offset, int row_end, int column_end) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = first_row + tile_row(2 * h);
    const Excluded out(i, count, offset, first_column + accumulator_column(0), i < row_end ? column_end : 0);
#pragma unroll
    for (int t = 0; t < kColumns / 8; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& value = s[4 * t + 2 * h + c];
        value = out.holds(8 * t + c) ? -INFINITY : value;
      }
    }
  }
}

// The same in the backward pass, where all handled rows are the positions [0, 2 count), and padding needs no test.
template <int kColumns>
__device__ __forceinline__ void exclude_handled_pairs(float (&s)[kColumns / 2], int first_row, int first_column,
                                                      int count) {
  constexpr int kNoEnd = 1 << 30;
  const int distance = first_column - first_row;
  const auto meets = [&](int offset) { return distance > offset - kColumns && distance < offset + kPanelRows; };
  if (!meets(0) && !meets(count) && !meets(-count)) return;
  exclude_pairs<kColumns>(s, first_row, first_column, count, count, kNoEnd, kNoEnd);
}

// Stores the row of half h of an accumulator with kColumns columns, of which `columns` exist. pairs: the address of a
// row is a multiple of 8.
template <int kColumns>
__device__ __forceinline__ void store_accumulators(float* __restrict__ row, const float (&d)[kColumns / 2], int h,
                                                   int columns, bool pairs) {
  float* const to = row + accumulator_column(0);
  const int left = columns - accumulator_column(0);
#pragma unroll
  for (int t = 0; t < kColumns / 8; ++t) {
    const float x = d[4 * t + 2 * h], y = d[4 * t + 2 * h + 1];
    if (8 * t < left) {
      if (pairs) {
        st_global(to + 8 * t, make_float2(x, y));
      } else {
        to[8 * t] = x;
        if (8 * t + 1 < left) to[8 * t + 1] = y;
      }
    }
  }
}

template <bool kSplit>
struct Panels {
  half_t* packed;
  int panels;  // panels of hi; the same number of lo follow in each tile
  int width;
  PackedPositions positions;

  Panels(half_t* packed_, int panels_, const PackedPositions& positions_)
      : packed(packed_), panels(panels_), width(panels_ * kPanelDims), positions(positions_) {}
  __device__ __forceinline__ int position(int row) const { return positions.position(row); }
  // Stores hi (and lo) of the elements k .. k + 3 of a unit row; k is a multiple of 4.
  __device__ __forceinline__ void put(int position, int k, const float (&unit)[4]) const {
    const PackedFour values(unit);
    const int64_t at = panel_at(position, k, kSplit ? 2 * panels : panels);
    st_global(packed + at, values.hi);
    if constexpr (kSplit) st_global(packed + at + int64_t{panels} * kPanelElements, values.lo);
  }
  __host__ __device__ int fillers() const { return positions.total() - 2 * positions.samples; }
  __device__ __forceinline__ int filler(int index) const {
    const int between = positions.first_other() - positions.anchors();
    return index < between ? positions.anchors() + index
                           : positions.first_other() + positions.others() + index - between;
  }
};

}  // namespace
}  // namespace scan_fast
