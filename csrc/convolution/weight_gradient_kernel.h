// Inner loops of the float32 weight gradient, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"

namespace scan_fast {

// Output positions of some images, as weight_gradient.cpp packs them: gradients in panels of `rows` output channels,
// images in slices of `columns` input channels.
struct WeightGradientChunk {
  int64_t images, height, width;  // output positions
  int64_t image_step, row_step;   // floats of a slice between images, and between rows of positions
};

}  // namespace scan_fast

// Output channels of a panel and input channels of a slice.
SCAN_FAST_DECLARE_PER_ISA(int64_t weight_gradient_rows())
SCAN_FAST_DECLARE_PER_ISA(int64_t weight_gradient_columns())

// Packs `count` pixels of `channels` values, from_step floats apart, at to[slice * slice_size + pixel * columns]. The
// last slice is filled up with zeros.
SCAN_FAST_DECLARE_PER_ISA(void weight_gradient_pack_pixels(const float* from, int64_t from_step, int64_t count,
                                                           int64_t channels, int64_t slice_size, float* to))
// The same with zeros for pixels.
SCAN_FAST_DECLARE_PER_ISA(void weight_gradient_pack_zeros(int64_t count, int64_t channels, int64_t slice_size,
                                                          float* to))
// Packs the gradients of `count` positions at to[panel * panel_size + position * rows].
SCAN_FAST_DECLARE_PER_ISA(void weight_gradient_pack_gradients(const float* from, int64_t count, int64_t channels,
                                                              int64_t panel_size, float* to))

// to[r * step + c] = before[r * columns + c] + sum over the chunk's positions of panel[position][r] slice[position][c],
// for r < rows_left, c < columns_left. The slice begins at the first position that the kernel's tap reads. Without
// `before` there is only the sum. `to` may be `before`.
SCAN_FAST_DECLARE_PER_ISA(void weight_gradient_tile(const ::scan_fast::WeightGradientChunk& chunk, const float* panel,
                                                    const float* slice, const float* before, int64_t rows_left,
                                                    int64_t columns_left, float* to, int64_t step))
