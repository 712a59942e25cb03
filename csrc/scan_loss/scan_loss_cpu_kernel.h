// Inner loops of the CPU kernel, compiled once per instruction set.
#pragma once

#include "common/cpu_dispatch.h"
#include "scan_loss/scan_loss.h"

namespace scan_fast {

// `rows` rows of one head.
struct ScanLossRows {
  const void* anchors;
  const void* neighbors;
  float* row_stats;  // (kScanLossRowStats, rows): the CPU layout is transposed within a block of rows
  int64_t rows, classes;
};

}  // namespace scan_fast

// Writes the sums of the anchor probabilities to column_sums (C). Returns the sum of the consistencies.
SCAN_FAST_DECLARE_PER_ISA(double scan_loss_rows_forward(::scan_fast::DType dtype,
                                                        const ::scan_fast::ScanLossRows& block, float* column_sums))

// Adds `blocks` arrays of column sums, `stride` floats apart, in order; writes their mean over `rows`; returns the
// entropy.
SCAN_FAST_DECLARE_PER_ISA(double scan_loss_mean_and_entropy(const float* column_sums, int64_t blocks, int64_t stride,
                                                            int64_t rows, int64_t classes, float* mean_prob))

// slope[c] = d entropy / d mean_prob[c]: -(log m + 1), and 0 below the floor.
SCAN_FAST_DECLARE_PER_ISA(void scan_loss_entropy_slope(const float* mean_prob, int64_t classes, float* slope))

// Writes the gradients of the rows, with the upstream gradients of consistency and entropy already divided by B.
SCAN_FAST_DECLARE_PER_ISA(void scan_loss_rows_backward(::scan_fast::DType dtype, const ::scan_fast::ScanLossRows& block,
                                                       const float* slope, float consistency_scale, float entropy_scale,
                                                       void* grad_anchors, void* grad_neighbors))

// The same two functions for at most kMaxColumns classes (simd_rows.h), with one row per lane.
SCAN_FAST_DECLARE_PER_ISA(double scan_loss_narrow_rows_forward(::scan_fast::DType dtype,
                                                               const ::scan_fast::ScanLossRows& block,
                                                               float* column_sums))
SCAN_FAST_DECLARE_PER_ISA(void scan_loss_narrow_rows_backward(
    ::scan_fast::DType dtype, const ::scan_fast::ScanLossRows& block, const float* slope, float consistency_scale,
    float entropy_scale, void* grad_anchors, void* grad_neighbors))
