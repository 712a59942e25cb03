// Inner loops of the CPU kernel, compiled once per instruction set. Each call processes a block of whole rows.
#pragma once

#include "batch_norm/batch_norm.h"
#include "common/cpu_dispatch.h"

namespace scan_fast {

// Inputs of the loops per channel.
struct BatchNormChannels {
  const float* mean;
  const float* scale;  // weight * inv_std
  const float* bias;
};

// grad_x per element is scale * dz + slope * (x - mean) + offset. Slope and offset are null in evaluation, where grad_x
// is scale * dz: a zero slope times an infinite x would be NaN.
struct BatchNormSlopes {
  const float* slope;
  const float* offset;
};

}  // namespace scan_fast

// moments[c] = mean of the rows; moments[channels + c] = sum of their squared distances from it; the last third of the
// array is scratch.
SCAN_FAST_DECLARE_PER_ISA(void batch_norm_moments(::scan_fast::DType dtype, const void* x, int64_t rows,
                                                  int64_t channels, float* moments))

// Writes y, and the mask unless `mask` is null.
SCAN_FAST_DECLARE_PER_ISA(void batch_norm_rows(::scan_fast::DType dtype, const void* x, const void* residual,
                                               const ::scan_fast::BatchNormChannels& of, bool relu, int64_t rows,
                                               int64_t channels, void* y, uint16_t* mask))

// sums[c] = sum of dz, sums[channels + c] = sum of dz (x - mean).
SCAN_FAST_DECLARE_PER_ISA(void batch_norm_gradient_sums(::scan_fast::DType dtype, const void* grad_y, const void* x,
                                                        const uint16_t* mask, const ::scan_fast::BatchNormChannels& of,
                                                        bool relu, int64_t rows, int64_t channels, float* sums))

// Writes grad_x, and grad_residual unless it is null.
SCAN_FAST_DECLARE_PER_ISA(void batch_norm_gradient_rows(::scan_fast::DType dtype, const void* grad_y, const void* x,
                                                        const uint16_t* mask, const ::scan_fast::BatchNormChannels& of,
                                                        const ::scan_fast::BatchNormSlopes& slopes, bool relu,
                                                        int64_t rows, int64_t channels, void* grad_x,
                                                        void* grad_residual))
