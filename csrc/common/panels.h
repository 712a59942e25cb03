// Memory layout of the 16-bit operands of the sm_90a kernels: index arithmetic only, for host and device.
//
// A matrix is stored as tiles of 128 rows, a tile as `panels` panels of 64 dimensions, a panel as 128 rows of 64
// values. The 16-byte vectors of a row (8 values) are permuted, vector ^ (row % 8): the 128-byte swizzle. Padding rows
// and dimensions are zeros. hopper.cuh gives the reason.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SCAN_FAST_INDEX_MATH __host__ __device__ __forceinline__
#else
#define SCAN_FAST_INDEX_MATH inline
#endif

namespace scan_fast {

constexpr int kPanelRows = 128;
constexpr int kPanelDims = 64;
constexpr int kPanelElements = kPanelRows * kPanelDims;
constexpr int kPanelBytes = kPanelElements * 2;

SCAN_FAST_INDEX_MATH int64_t panels_of(int64_t dim) { return (dim + kPanelDims - 1) / kPanelDims; }
SCAN_FAST_INDEX_MATH int64_t row_tiles(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }
SCAN_FAST_INDEX_MATH int64_t packed_size(int64_t rows, int64_t panels) {
  return row_tiles(rows) * panels * kPanelElements;
}

// Returns the index of an element; dim < 64 * panels.
SCAN_FAST_INDEX_MATH int64_t panel_at(int64_t row, int64_t dim, int64_t panels) {
  const int64_t panel = row / kPanelRows * panels + dim / kPanelDims;
  const int in_tile = static_cast<int>(row % kPanelRows), vector = static_cast<int>(dim % kPanelDims) / 8;
  return panel * kPanelElements + in_tile * kPanelDims + (vector ^ (in_tile % 8)) * 8 + static_cast<int>(dim % 8);
}

}  // namespace scan_fast
