// Weight gradient of a float32 convolution on the CPU.
//
// dW[o, kh, kw, c] = sum over images and output positions of grad_y[.., o] x[.. + kh, .. + kw, c]: per tap of the kernel
// a product of (O x positions) with (positions x C), whose sums stay in registers (common/register_tiles.h) over a chunk
// of positions. Gradients are packed in panels of a few output channels, images in slices of a few input channels, with
// zeros around them, so that every tap of the kernel reads the same slice at another place. A stride s divides an image
// into s x s phases, and each tap reads one of them.
//
// Chunks have a few hundred positions, so that a slice stays in the L1 cache for all output channels and taps. Chunks
// are packed and then used in groups of some MiB, each by all threads. A task owns some input and output channels and
// adds its chunks up in order. So the bits do not depend on the number of threads.
// Limit: 2 N H' W' k^2 C O flops at the rate of the multiply-add units.
#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/scratch.h"
#include "convolution/convolution.h"
#include "convolution/weight_gradient_kernel.h"

namespace scan_fast {
namespace {

constexpr int64_t kSlicePositions = 352;           // of a chunk with its borders: 22 KiB with 16 channels
constexpr int64_t kGroupBytes = int64_t{4} << 20;  // of the packed chunks of a group

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void convolution_grad_weight_float32(const ConvolutionShape& s, const float* grad_y, const float* x,
                                     float* grad_weight) {
  const auto tile = SCAN_FAST_BEST_ISA(weight_gradient_tile);
  const int64_t panel_rows = SCAN_FAST_BEST_ISA(weight_gradient_rows)();
  const int64_t slice_columns = SCAN_FAST_BEST_ISA(weight_gradient_columns)();
  const int64_t panels = ceil_div(s.out_channels, panel_rows), slices = ceil_div(s.in_channels, slice_columns);
  // Phases that a tap reads, in each direction; and the positions that the first, the largest, has beyond the output's.
  const int64_t phases = std::min(s.stride, s.kernel), border = (s.kernel - 1) / s.stride;
  const int64_t grid_width = s.out_width + border;

  // A chunk: some rows of an image, or some images.
  const int64_t image_positions = (s.out_height + border) * grid_width;
  const int64_t images = std::clamp<int64_t>(kSlicePositions / image_positions, 1, s.batch);
  const int64_t rows =
      images > 1 ? s.out_height : std::clamp<int64_t>(kSlicePositions / grid_width - border, 1, s.out_height);
  const int64_t row_chunks = ceil_div(s.out_height, rows), chunks = ceil_div(s.batch, images) * row_chunks;
  const int64_t grid_image = (rows + border) * grid_width * slice_columns, grid = images * grid_image;
  const int64_t slice_size = grid * phases * phases, panel_size = images * rows * s.out_width * panel_rows;
  const int64_t chunk_size = slices * slice_size + panels * panel_size;
  const int64_t group = std::clamp<int64_t>(kGroupBytes / (chunk_size * 4), 1, chunks);
  const Scratch<float> packed(group * chunk_size);

  const auto chunk_of = [&](int64_t index) {
    struct {
      int64_t first_image, images, first_row, rows;
    } c{index / row_chunks * images, 0, index % row_chunks * rows, 0};
    c.images = std::min(images, s.batch - c.first_image);
    c.rows = std::min(rows, s.out_height - c.first_row);
    return c;
  };

  const auto pack_slice = [&](int64_t index, int64_t slice, float* to) {
    const auto c = chunk_of(index);
    const int64_t channel = slice * slice_columns, columns = std::min(slice_columns, s.in_channels - channel);
    for (int64_t py = 0; py < phases; ++py) {
      for (int64_t px = 0; px < phases; ++px, to += grid) {
        for (int64_t image = 0; image < c.images; ++image) {
          float* at = to + image * grid_image;
          for (int64_t y = 0; y < c.rows + border; ++y) {
            const int64_t in_y = (c.first_row + y) * s.stride + py - s.padding;
            const bool inside = in_y >= 0 && in_y < s.in_height;
            const float* const line =
                x + (((c.first_image + image) * s.in_height + (inside ? in_y : 0)) * s.in_width) * s.in_channels +
                channel;
            for (int64_t position = 0; position < grid_width; ++position, at += slice_columns) {
              const int64_t in_x = position * s.stride + px - s.padding;
              if (inside && in_x >= 0 && in_x < s.in_width) {
                std::memcpy(at, line + in_x * s.in_channels, static_cast<size_t>(columns) * sizeof(float));
                std::fill(at + columns, at + slice_columns, 0.0f);
              } else {
                std::fill_n(at, slice_columns, 0.0f);
              }
            }
          }
        }
      }
    }
  };

  const auto pack_panel = [&](int64_t index, int64_t panel, float* to) {
    const auto c = chunk_of(index);
    const int64_t channel = panel * panel_rows, used = std::min(panel_rows, s.out_channels - channel);
    for (int64_t image = 0; image < c.images; ++image) {
      const float* from =
          grad_y + ((c.first_image + image) * s.out_height + c.first_row) * s.out_width * s.out_channels + channel;
      for (int64_t i = 0; i < c.rows * s.out_width; ++i, from += s.out_channels, to += panel_rows) {
        for (int64_t r = 0; r < used; ++r) to[r] = from[r];
        for (int64_t r = used; r < panel_rows; ++r) to[r] = 0.0f;
      }
    }
  };

  // Tasks of a group: a slice and some panels, several per thread.
  const int64_t parts = std::clamp<int64_t>(ceil_div(6 * max_threads(), slices), 1, panels);
  const int64_t weight_step = s.kernel * s.kernel * s.in_channels;
  std::fill_n(grad_weight, s.out_channels * weight_step, 0.0f);
  for (int64_t begin = 0; begin < chunks; begin += group) {
    const int64_t count = std::min(group, chunks - begin);
    parallel_for(count * (slices + panels), [&](int64_t task, int) {
      const int64_t index = task / (slices + panels), which = task % (slices + panels);
      float* const at = packed.get() + index * chunk_size;
      if (which < slices) {
        pack_slice(begin + index, which, at + which * slice_size);
      } else {
        pack_panel(begin + index, which - slices, at + slices * slice_size + (which - slices) * panel_size);
      }
    });
    parallel_for(slices * parts, [&](int64_t task, int) {
      const int64_t slice = task / parts, part = task % parts, channel = slice * slice_columns;
      for (int64_t index = 0; index < count; ++index) {
        const auto c = chunk_of(begin + index);
        const WeightGradientChunk chunk{c.images, c.rows, s.out_width, grid_image, grid_width * slice_columns};
        const float* const at = packed.get() + index * chunk_size;
        for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
          const int64_t out = panel * panel_rows;
          for (int64_t kh = 0; kh < s.kernel; ++kh) {
            for (int64_t kw = 0; kw < s.kernel; ++kw) {
              const int64_t phase = kh % s.stride * phases + kw % s.stride;
              const int64_t first = kh / s.stride * grid_width + kw / s.stride;
              tile(chunk, at + slices * slice_size + panel * panel_size,
                   at + slice * slice_size + phase * grid + first * slice_columns, s.out_channels - out,
                   s.in_channels - channel,
                   grad_weight + out * weight_step + (kh * s.kernel + kw) * s.in_channels + channel, weight_step);
            }
          }
        }
      }
    });
  }
}

}  // namespace scan_fast
