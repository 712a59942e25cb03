// Operands of the sm_90a kernels: panels (common/panels.h) in the order of positions.
//
// The anchors of a call come first: the handled samples' first views, then (if all rows are anchors) their second
// views. The other rows begin at the next multiple of 128. So a tile holds rows of one kind, and all tiles are numbered
// consecutively. Padding positions are zero. In the backward pass all handled rows count as anchors, since all of them
// have a gradient. If one process handles all samples, positions are row numbers.
#pragma once

#include "common/panels.h"
#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

struct PackedPositions {
  int64_t samples, begin, count;
  bool both;

  __host__ __device__ int64_t anchors() const { return both ? 2 * count : count; }
  __host__ __device__ int64_t others() const { return 2 * samples - anchors(); }
  __host__ __device__ int64_t first_other() const { return row_tiles(anchors()) * kPanelRows; }
  __host__ __device__ int64_t total() const { return first_other() + row_tiles(others()) * kPanelRows; }
  __device__ bool exists(int64_t position) const {
    return position < anchors() || (position >= first_other() && position < first_other() + others());
  }
  __device__ int64_t position(int64_t row) const {
    const bool second = row >= samples;
    const int64_t sample = second ? row - samples : row;
    const bool handled = sample >= begin && sample < begin + count;
    if (handled && (both || !second)) return (second ? count : 0) + sample - begin;
    const int64_t skipped = sample >= begin + count && (both || !second) ? count : 0;
    return first_other() + (second ? samples - count : 0) + sample - skipped;
  }
  // Distance from the anchor of a first view (a position < count) to its positive.
  __device__ int64_t positive_offset() const { return both ? count : first_other() + samples - count + begin; }
};

// Columns of a tile that are masked for a row: the row itself, its positive, and all from `end` on. Stored as offsets
// from one column, so that the test of element r compares with constants.
struct Excluded {
  int self, positive, end;

  __device__ __forceinline__ Excluded(int row, int count, int offset, int from, int end_)
      : self(row - from),
        positive((row < count            ? row + offset
                  : row - offset < count ? row - offset
                                         : -1) -
                 from),
        end(end_ - from) {}
  __device__ __forceinline__ bool holds(int column) const {
    return (column == self) | (column == positive) | (column >= end);  // no branches
  }
};

template <bool kSplit>
struct Panels {
  half_t* packed;
  int panels;  // panels of hi; the same number of lo follow in each tile
  int64_t width;
  PackedPositions positions;

  Panels(half_t* packed_, int panels_, const PackedPositions& positions_)
      : packed(packed_), panels(panels_), width(int64_t{panels_} * kPanelDims), positions(positions_) {}
  __device__ __forceinline__ int64_t position(int64_t row) const { return positions.position(row); }
  __device__ __forceinline__ int64_t row_at(int64_t position) const { return position; }
  __device__ __forceinline__ void put(int64_t position, int64_t k, float unit) const {
    const float value = unit * kOperandScale;
    const half_t hi = from_float<half_t>(value);
    const int64_t stored = kSplit ? 2 * panels : panels;
    packed[panel_at(position, k, stored)] = hi;
    if constexpr (kSplit) packed[panel_at(position, width + k, stored)] = from_float<half_t>(value - to_float(hi));
  }
  __host__ __device__ int64_t fillers() const { return positions.total() - 2 * positions.samples; }
  __device__ __forceinline__ int64_t filler(int64_t index) const {
    const int64_t between = positions.first_other() - positions.anchors();
    return index < between ? positions.anchors() + index
                           : positions.first_other() + positions.others() + index - between;
  }
};

}  // namespace
}  // namespace scan_fast
