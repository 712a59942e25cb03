#include "convolution/weight_gradient_kernel.h"

#include "common/register_tiles.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

constexpr int kRows = kNarrowRows, kVectors = kNarrowVectors, kColumns = kVectors * kLanes;
constexpr int64_t kTogether = 8;  // positions of gradients, which fill whole cache lines of a panel

}  // namespace

int64_t weight_gradient_rows() { return kRows; }
int64_t weight_gradient_columns() { return kColumns; }

void weight_gradient_pack_pixels(const float* from, int64_t from_step, int64_t count, int64_t channels,
                                 int64_t slice_size, float* to) {
  for (int64_t pixel = 0; pixel < count; ++pixel, from += from_step, to += kColumns) {
    float* out = to;
    int64_t c = 0;
    for (; c + kColumns <= channels; c += kColumns, out += slice_size) {
      for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, load(from + c + v * kLanes));
    }
    if (c == channels) continue;
    for (int64_t i = 0; i < kColumns; ++i) out[i] = c + i < channels ? from[c + i] : 0.0f;
  }
}

void weight_gradient_pack_zeros(int64_t count, int64_t channels, int64_t slice_size, float* to) {
  for (int64_t c = 0; c < channels; c += kColumns, to += slice_size) {
    for (int64_t i = 0; i < count * kVectors; ++i) store(to + i * kLanes, Vec{});
  }
}

// A panel takes few bytes of each position. So a few positions are packed for all panels before the next ones: their
// gradients stay in the L1 cache, and lines of the panels are written whole.
void weight_gradient_pack_gradients(const float* from, int64_t count, int64_t channels, int64_t panel_size, float* to) {
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    const int64_t end = count - begin < kTogether ? count : begin + kTogether;
    float* panel = to;
    for (int64_t o = 0; o < channels; o += kRows, panel += panel_size) {
      const int64_t rows = channels - o < kRows ? channels - o : kRows;
      for (int64_t position = begin; position < end; ++position) {
        const float* const values = from + position * channels + o;
        float* const out = panel + position * kRows;
        if (rows == kRows) {
          std::memcpy(out, values, sizeof(float) * kRows);
        } else {
          for (int64_t r = 0; r < kRows; ++r) out[r] = r < rows ? values[r] : 0.0f;
        }
      }
    }
  }
}

void weight_gradient_tile(const WeightGradientChunk& chunk, const float* panel, const float* slice, const float* before,
                          int64_t rows_left, int64_t columns_left, float* to, int64_t step) {
  if (before != nullptr) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(before + r * kColumns);
  }
  Vec sum[kRows][kVectors] = {};
  for (int64_t image = 0; image < chunk.images; ++image) {
    const float* line = slice + image * chunk.image_step;
    for (int64_t y = 0; y < chunk.height; ++y, line += chunk.row_step, panel += chunk.width * kRows) {
      add_products(sum, chunk.width, panel, 1, kRows, line, kLanes, kColumns);
    }
  }
  if (before != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += load(before + r * kColumns + v * kLanes);
    }
  }
  write_rows<false>(sum, to, step, rows_left, columns_left);
}

}  // namespace scan_fast::SCAN_FAST_ISA
