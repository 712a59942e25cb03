// Weight gradient of a float32 convolution on the CPU.
//
// dW[o, kh, kw, c] = sum over images and output positions of grad_y[.., o] x[.. + kh, .. + kw, c]: per tap of the kernel
// a product of (O x positions) with (positions x C), whose sums stay in registers (common/register_tiles.h) over a chunk
// of positions. Gradients are packed in panels of a few output channels, images in slices of a few input channels, with
// zeros around them, so that every tap of the kernel reads the same slice at another place. Zeros at the end of a row
// serve as those before the next row, too, likewise between images. A stride s divides an image into s x s phases, and
// each tap reads one of them.
//
// Chunks have a few hundred positions, so that a phase of a slice stays in the L1 cache for all output channels and its
// taps. Chunks are packed and then used in groups that stay in the L2 caches, each by all threads. A task owns some input
// and output channels and adds its chunks up in order. So the bits do not depend on the number of threads. The sums of
// a tile are contiguous until the last chunk is added, because the rows of the gradient lie far apart.
// Limit: 2 N H' W' k^2 C O flops at the rate of the multiply-add units.
#include <algorithm>

#include "common/parallel.h"
#include "common/scratch.h"
#include "convolution/convolution.h"
#include "convolution/weight_gradient_kernel.h"

namespace scan_fast {
namespace {

constexpr int64_t kPhaseBytes = 22 << 10;   // of a phase of a chunk's slice: L1 cache, beside a panel
constexpr int64_t kGroupBytes = 384 << 10;  // of the packed chunks of a group, for each thread: L2 cache
constexpr int64_t kPackedAtOnce = 64;       // positions of gradients in a task

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions of the phases along one direction. A tap of phase p reads position i of it for the output i - tap / stride,
// that is pixel i * stride + p - padding.
struct Axis {
  int64_t stride, padding, in, out, border;
  // Zeros at the end of a line that are the zeros before the next one, too. With the same padding on both sides, a phase
  // has at least as many zeros before its first pixel as it reads of the first phase's after the last one.
  int64_t shared = 0;

  Axis(const ConvolutionShape& s, int64_t in, int64_t out)
      : stride(s.stride), padding(s.padding), in(in), out(out), border((s.kernel - 1) / s.stride) {
    while (shared < border && pixel(out + border - 1 - shared, 0) >= in) ++shared;
  }
  int64_t pixel(int64_t position, int64_t phase) const { return position * stride + phase - padding; }
  int64_t line() const { return out + border - shared; }
};

}  // namespace

void convolution_grad_weight_float32(const ConvolutionShape& s, const float* grad_y, const float* x,
                                     float* grad_weight) {
  const int64_t taps = s.kernel * s.kernel, weight_step = taps * s.in_channels;
  if (s.batch * s.out_height * s.out_width == 0) {
    std::fill_n(grad_weight, s.out_channels * weight_step, 0.0f);
    return;
  }
  const int64_t panel_rows = SCAN_FAST_BEST_ISA(weight_gradient_rows)();
  const int64_t slice_columns = SCAN_FAST_BEST_ISA(weight_gradient_columns)();
  const int64_t panels = ceil_div(s.out_channels, panel_rows), slices = ceil_div(s.in_channels, slice_columns);
  const int64_t phases = std::min(s.stride, s.kernel);  // that a tap reads, in each direction
  const Axis across(s, s.in_width, s.out_width), down(s, s.in_height, s.out_height);
  const int64_t width = across.line();

  // A chunk: some rows of an image, or some images.
  const int64_t most = kPhaseBytes / (slice_columns * static_cast<int64_t>(sizeof(float)));
  const int64_t images = std::clamp<int64_t>((most / width - down.shared) / down.line(), 1, s.batch);
  const int64_t rows = images > 1 ? s.out_height : std::clamp<int64_t>(most / width - down.border, 1, s.out_height);
  const int64_t row_chunks = ceil_div(s.out_height, rows), chunks = ceil_div(s.batch, images) * row_chunks;
  const int64_t image_rows = rows + down.border - down.shared, grid_rows = images * image_rows + down.shared;
  const int64_t grid = (grid_rows * width + across.shared) * slice_columns, slice_size = grid * phases * phases;
  const int64_t panel_size = images * rows * s.out_width * panel_rows;
  const int64_t chunk_size = slices * slice_size + ceil_div(panels * panel_size, 16) * 16;
  const int64_t group = std::clamp<int64_t>(kGroupBytes * max_threads() / (chunk_size * 4), 1, chunks);
  const Scratch<float> packed(group * chunk_size);

  const auto chunk_of = [&](int64_t index) {
    struct {
      int64_t first_image, images, first_row, rows;
    } c{index / row_chunks * images, 0, index % row_chunks * rows, 0};
    c.images = std::min(images, s.batch - c.first_image);
    c.rows = std::min(rows, s.out_height - c.first_row);
    return c;
  };

  // Packs a row of positions of all phases and slices.
  const auto pack_pixels = SCAN_FAST_BEST_ISA(weight_gradient_pack_pixels);
  const auto pack_zeros = SCAN_FAST_BEST_ISA(weight_gradient_pack_zeros);
  const auto pack_row = [&](int64_t index, int64_t row, float* to) {
    const auto c = chunk_of(index);
    // Rows below the last image are its own: they may hold pixels if the chunk is a part of an image.
    const int64_t image = std::min(row / image_rows, c.images - 1), y = c.first_row + row - image * image_rows;
    const int64_t count = width + (row == grid_rows - 1 ? across.shared : 0);
    for (int64_t phase = 0; phase < phases * phases; ++phase) {
      float* const at = to + phase * grid + row * width * slice_columns;
      const int64_t in_y = down.pixel(y, phase / phases), px = phase % phases;
      if (in_y < 0 || in_y >= s.in_height) {
        pack_zeros(count, s.in_channels, slice_size, at);
        continue;
      }
      // Positions first to last - 1 are pixels.
      const int64_t first = std::min(count, ceil_div(std::max<int64_t>(s.padding - px, 0), s.stride));
      const int64_t last = std::clamp(ceil_div(s.in_width + s.padding - px, s.stride), first, count);
      pack_zeros(first, s.in_channels, slice_size, at);
      if (first < last) {
        const int64_t pixel = ((c.first_image + image) * s.in_height + in_y) * s.in_width + across.pixel(first, px);
        pack_pixels(x + pixel * s.in_channels, s.stride * s.in_channels, last - first, s.in_channels, slice_size,
                    at + first * slice_columns);
      }
      pack_zeros(count - last, s.in_channels, slice_size, at + last * slice_columns);
    }
  };

  const auto pack_gradients = SCAN_FAST_BEST_ISA(weight_gradient_pack_gradients);
  const auto pack_positions = [&](int64_t index, int64_t begin, float* to) {
    const auto c = chunk_of(index);
    const int64_t count = std::min(kPackedAtOnce, c.images * c.rows * s.out_width - begin);
    const int64_t first = (c.first_image * s.out_height + c.first_row) * s.out_width + begin;
    if (count > 0) {
      pack_gradients(grad_y + first * s.out_channels, count, s.out_channels, panel_size, to + begin * panel_rows);
    }
  };

  const auto tile = SCAN_FAST_BEST_ISA(weight_gradient_tile);
  const int64_t tile_size = panel_rows * slice_columns;
  const Scratch<float> sums(slices * panels * taps * tile_size);
  // Adds a chunk to the sums of a slice and the panels from `begin` to `end` - 1.
  const auto add_chunk = [&](int64_t index, const float* at, int64_t slice, int64_t begin, int64_t end) {
    const auto c = chunk_of(index);
    const WeightGradientChunk chunk{c.images, c.rows, s.out_width, image_rows * width * slice_columns,
                                    width * slice_columns};
    const int64_t channel = slice * slice_columns;
    float* sum = sums.get() + (slice * panels + begin) * taps * tile_size;
    for (int64_t phase = 0; phase < phases * phases; ++phase) {
      const float* const pixels = at + slice * slice_size + phase * grid;
      float* of_panel = sum;
      for (int64_t panel = begin; panel < end; ++panel, of_panel += taps * tile_size) {
        const float* const gradients = at + slices * slice_size + panel * panel_size;
        const int64_t out = panel * panel_rows;
        for (int64_t kh = phase / phases; kh < s.kernel; kh += s.stride) {
          for (int64_t kw = phase % phases; kw < s.kernel; kw += s.stride) {
            const int64_t tap = kh * s.kernel + kw;
            float* const before = index > 0 ? of_panel + tap * tile_size : nullptr;
            const float* const first = pixels + (kh / s.stride * width + kw / s.stride) * slice_columns;
            if (index + 1 < chunks) {
              tile(chunk, gradients, first, before, panel_rows, slice_columns, of_panel + tap * tile_size,
                   slice_columns);
            } else {
              tile(chunk, gradients, first, before, s.out_channels - out, s.in_channels - channel,
                   grad_weight + out * weight_step + tap * s.in_channels + channel, weight_step);
            }
          }
        }
      }
    }
  };

  // Tasks of a group: a slice and some panels, several per thread.
  const int64_t parts = std::clamp<int64_t>(ceil_div(6 * max_threads(), slices), 1, panels);
  const int64_t packing = grid_rows + ceil_div(images * rows * s.out_width, kPackedAtOnce);
  for (int64_t begin = 0; begin < chunks; begin += group) {
    const int64_t count = std::min(group, chunks - begin);
    parallel_for(count * packing, [&](int64_t task, int) {
      const int64_t index = task / packing, piece = task % packing;
      float* const at = packed.get() + index * chunk_size;
      if (piece < grid_rows) {
        pack_row(begin + index, piece, at);
      } else {
        pack_positions(begin + index, (piece - grid_rows) * kPackedAtOnce, at + slices * slice_size);
      }
    });
    parallel_for(slices * parts, [&](int64_t task, int) {
      const int64_t slice = task / parts, part = task % parts;
      for (int64_t index = 0; index < count; ++index) {
        add_chunk(begin + index, packed.get() + index * chunk_size, slice, panels * part / parts,
                  panels * (part + 1) / parts);
      }
    });
  }
}

}  // namespace scan_fast
