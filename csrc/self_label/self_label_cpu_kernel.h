// Inner loops of the CPU kernel, compiled once per instruction set.
#pragma once

#include "common/cpu_dispatch.h"
#include "self_label/self_label.h"

// Computes for `rows` rows the label and whether it counts (confident[i] = 1 or 0). For confident rows also the
// cross-entropy (losses[i], 0 in other rows) and the row's statistics, transposed within a block of rows:
// (kSelfLabelRowStats, rows).
SCAN_FAST_DECLARE_PER_ISA(void self_label_rows_forward(::scan_fast::DType dtype, const void* weak, const void* strong,
                                                       int64_t rows, int64_t classes, float threshold, int32_t* target,
                                                       float* confident, float* losses, float* row_stats))

// grad_strong = scale * row_weight * (softmax(strong) - onehot(target)), zero in rows of weight zero.
SCAN_FAST_DECLARE_PER_ISA(void self_label_rows_backward(::scan_fast::DType dtype, const void* strong, int64_t rows,
                                                        int64_t classes, float scale, const int32_t* target,
                                                        const float* row_weight, const float* row_stats,
                                                        void* grad_strong))
