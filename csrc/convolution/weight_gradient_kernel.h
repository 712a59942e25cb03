// Inner loop of the float32 weight gradient, compiled once per instruction set.
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

// to[r * step + c] += sum over the chunk's positions of panel[position][r] slice[position][c], for r < rows, c < columns.
// The slice begins at the first position that the kernel's tap reads.
SCAN_FAST_DECLARE_PER_ISA(void weight_gradient_tile(const ::scan_fast::WeightGradientChunk& chunk, const float* panel,
                                                    const float* slice, int64_t rows, int64_t columns, float* to,
                                                    int64_t step))
