#include "convolution/weight_gradient_kernel.h"

#include "common/register_tiles.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

constexpr int kRows = kNarrowRows, kVectors = kNarrowVectors, kColumns = kVectors * kLanes;

}  // namespace

int64_t weight_gradient_rows() { return kRows; }
int64_t weight_gradient_columns() { return kColumns; }

void weight_gradient_tile(const WeightGradientChunk& chunk, const float* panel, const float* slice, int64_t rows,
                          int64_t columns, float* to, int64_t step) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t image = 0; image < chunk.images; ++image) {
    const float* line = slice + image * chunk.image_step;
    for (int64_t y = 0; y < chunk.height; ++y, line += chunk.row_step, panel += chunk.width * kRows) {
      add_products(sum, chunk.width, panel, 1, kRows, line, kLanes, kColumns);
    }
  }
  add_to_rows(sum, to, step, rows, columns);
}

}  // namespace scan_fast::SCAN_FAST_ISA
