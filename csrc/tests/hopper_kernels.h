// Small kernels on common/hopper.cuh and common/tile_products.cuh, for test_hopper.cpp.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace scan_fast::hopper_test {

// Deliberate errors of a kernel.
enum class Fault { kNone, kNoDataWait, kNoResultWait, kNoFence, kEarlyRelease, kWrittenInFlight, kNotWaitedFor };

// out (64 x 64) = a (64 x 64) b^T, then out2 (64 x 64) = out2's registers as 16-bit values times b (64 x 64). a and b:
// packed matrices of one tile and one panel.
void chained_products(DType dtype, const void* a, const void* b, float* out, float* out2, Fault fault);

enum class Mode { kNone, kRows, kColumns, kSplitRows, kSplitColumns };
// out (128 * row_tiles x kColumns * column_tiles) = rows columns^T, by the main loop. Column tiles have `width`
// columns.
void tile_products(Mode mode, DType dtype, int width, const void* rows, const void* columns, int panels, int row_tiles,
                   int column_tiles, float* out);

}  // namespace scan_fast::hopper_test
