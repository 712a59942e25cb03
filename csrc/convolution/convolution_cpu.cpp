// Convolutions as sums of tile products: the order of tiles and the work of each thread.
//
// A tile holds 32 images at one pixel. So a tap (kh, kw) selects the tiles of another pixel, for any size of the map.
// Nothing is gathered or packed twice, and pixels outside the image are skipped instead of multiplied as zeros (three
// products in ten for 4x4 maps and 3x3 kernels).
//
// Forward: the rows of a product are images, its columns output channels; k runs over taps and over 32 channels at a
// time. The gradient of the input is the same, applied to the gradient of the output; with a stride, each pixel uses
// the taps that reach it. Rows of the map are packed once, when they are needed, into a ring. Gradient of the weights:
// rows are output channels, columns input channels, and k runs over the batch and the pixels; partial sums over the
// batch are added in order. Neither sums nor their order depend on the number of threads, so the bits do not either.
#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "convolution/bf16_tiles.h"
#include "convolution/convolution.h"

namespace scan_fast {
namespace {

using namespace convolution;

constexpr int64_t kAlignment = 64;
constexpr int64_t kImages = 32;  // images per block
constexpr int64_t kPair = 2 * kTileElements;
// Pixels per sweep over the weights, and columns among them whose sums stay in the L1 cache.
constexpr int64_t kSweepPixels = 16, kSweepColumns = 8;
// Approximate number of tile products between loading and storing a block of sums: enough to hide the loads, few enough
// for the L1 cache.
constexpr int64_t kRun = 8;
// Output channels, and bytes of sums, per block of the gradient of the weights. The sums stay in the L2 cache.
constexpr int64_t kBlockRows = 256, kBlockBytes = 640 * 1024;
// Approximate number of tasks of the gradient of the weights, for any number of threads.
constexpr int64_t kTasks = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Allocates aligned arrays from the workspace. With a null workspace it only computes the size.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<size_t>(ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment);
    return result;
  }
  size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

struct Images {
  int64_t height, width, channels;
  int64_t size() const { return height * width * channels; }
  // Returns pixel (y, x) of 32 images from image `first` on.
  Pixel pixel(const uint16_t* images, int64_t batch, int64_t first, int64_t y, int64_t x, int64_t channel = 0) const {
    return {images + first * size() + (y * width + x) * channels + channel, size(), std::min(kImages, batch - first)};
  }
};

// Taps of one coordinate of a result: tap, tap + tap_step, ... read pixels source, source + source_step, ...
struct Line {
  int64_t tap, source, count;
};

// ---- products whose rows are images --------------------------------------------------------------------------------

struct ImageProduct {
  int64_t batch;
  Images from, to;
  int64_t kernel, stride, padding;
  bool transposed;  // true for the gradient of the input

  int64_t tap_step() const { return transposed ? stride : 1; }
  int64_t source_step() const { return transposed ? -1 : 1; }

  Line line(int64_t coordinate, int64_t limit) const {
    if (!transposed) {
      const int64_t origin = coordinate * stride - padding, tap = std::max<int64_t>(0, -origin);
      return {tap, origin + tap, std::max<int64_t>(0, std::min(kernel, limit - origin) - tap)};
    }
    // Output i reaches input i stride - padding + tap.
    int64_t tap = (coordinate + padding) % stride, source = (coordinate + padding) / stride;
    if (source >= limit) {
      tap += (source - limit + 1) * stride;
      source = limit - 1;
    }
    return {tap, source, tap >= kernel ? 0 : std::min((kernel - 1 - tap) / stride, source) + 1};
  }

  // Returns whether any result reads this coordinate. A kernel smaller than its stride skips some.
  bool reads(int64_t coordinate) const { return transposed || (coordinate + padding) % stride < kernel; }

  int64_t steps() const { return from.channels / kStep; }
  // Returns the number of steps that are summed at once; several for pixels with few taps.
  int64_t steps_at_once() const {
    const int64_t reach = transposed ? stride * stride : 1;
    return std::clamp<int64_t>(kRun * reach / taps(), 1, std::min(kRun, steps()));
  }
  int64_t column_blocks() const { return to.channels / kStep; }
  int64_t taps() const { return kernel * kernel; }
  int64_t rows_of_sweep() const { return std::clamp<int64_t>(kSweepPixels / to.width, 1, to.height); }

  // Sizes in elements. A row of the ring: [step][pixel][image half][16][32]; weights: [column
  // block][step][tap][2][...].
  int64_t row_size() const { return steps() * from.width * kPair; }
  int64_t ring_rows() const {
    return std::min(from.height, (rows_of_sweep() - 1) * (transposed ? 1 : stride) + kernel);
  }
  int64_t weights_size() const { return column_blocks() * steps() * taps() * kPair; }
  int64_t sums_size() const { return rows_of_sweep() * std::min(kSweepColumns, to.width) * kBlock; }

  size_t workspace() const {
    Arena arena(nullptr);
    take(arena);
    return arena.used();
  }
  struct Memory {
    uint16_t *weights, *rings;
    float* sums;
  };
  Memory take(Arena& arena) const {
    const int64_t threads = max_threads();
    uint16_t* weights = arena.take<uint16_t>(weights_size());
    uint16_t* rings = arena.take<uint16_t>(threads * ring_rows() * row_size());
    return {weights, rings, arena.take<float>(threads * sums_size())};
  }
};

ImageProduct forward_product(const ConvolutionShape& s) {
  return {s.batch,
          {s.in_height, s.in_width, s.in_channels},
          {s.out_height, s.out_width, s.out_channels},
          s.kernel,
          s.stride,
          s.padding,
          false};
}

ImageProduct grad_input_product(const ConvolutionShape& s) {
  return {s.batch,
          {s.out_height, s.out_width, s.out_channels},
          {s.in_height, s.in_width, s.in_channels},
          s.kernel,
          s.stride,
          s.padding,
          true};
}

void pack_weights(const ImageProduct& product, const float* weight, uint16_t* packed) {
  const int64_t steps = product.steps(), taps = product.taps();
  const int64_t in_channels = product.transposed ? product.to.channels : product.from.channels;
  const int64_t row_stride = taps * in_channels;
  parallel_for(product.column_blocks(), [&](int64_t block, int) {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        uint16_t* tiles = packed + ((block * steps + step) * taps + tap) * kPair;
        if (product.transposed) {
          pack_weight_pairs(weight + step * kStep * row_stride + tap * in_channels + block * kStep, row_stride, tiles);
        } else {
          pack_weight_rows(weight + block * kStep * row_stride + tap * in_channels + step * kStep, row_stride, tiles);
        }
      }
    }
  });
}

// Computes the results of 32 images in some rows of the map.
class ImageTask {
 public:
  ImageTask(const ImageProduct& product, const uint16_t* source, const uint16_t* weights, const uint16_t* addend,
            uint16_t* target, int64_t first_image, uint16_t* ring, float* sums)
      : product_(product),
        source_(source),
        weights_(weights),
        addend_(addend),
        target_(target),
        first_(first_image),
        ring_(ring),
        sums_(sums),
        slots_(product.ring_rows()),
        around_caches_(stores_around_caches(product.batch * product.to.size() * 2, target)) {}

  void rows(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += product_.rows_of_sweep()) {
      sweep(row, std::min(end, row + product_.rows_of_sweep()));
    }
    if (around_caches_) complete_stores();
  }

 private:
  // Packs rows up to `last` that are not packed yet. They are requested in ascending order, and no more are in use than
  // the ring holds.
  void pack_up_to(int64_t last) {
    for (int64_t y = std::max(packed_, last + 1 - slots_); y <= last; ++y) {
      if (!product_.reads(y)) continue;
      uint16_t* row = ring_ + y % slots_ * product_.row_size();
      for (int64_t x = 0; x < product_.from.width; ++x) {
        if (!product_.reads(x)) continue;
        pack_left(product_.from.pixel(source_, product_.batch, first_, y, x), product_.steps(), row + x * kPair,
                  product_.from.width * kPair);
      }
    }
    packed_ = std::max(packed_, last + 1);
  }

  void sweep(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Line line = product_.line(row, product_.from.height);
      if (line.count > 0) pack_up_to(std::max(line.source, line.source + (line.count - 1) * product_.source_step()));
    }
    const int64_t width = product_.to.width;
    for (int64_t left = 0; left < width; left += kSweepColumns) {
      const int64_t right = std::min(width, left + kSweepColumns);
      for (int64_t block = 0; block < product_.column_blocks(); ++block) {
        for (int64_t step = 0; step < product_.steps(); step += product_.steps_at_once()) {
          float* sums = sums_;
          for (int64_t row = begin; row < end; ++row) {
            for (int64_t column = left; column < right; ++column, sums += kBlock) add(row, column, block, step, sums);
          }
        }
        const float* sums = sums_;
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t column = left; column < right; ++column, sums += kBlock) {
            const Pixel out = product_.to.pixel(target_, product_.batch, first_, row, column, block * kStep);
            store_block(sums, addend_ == nullptr ? nullptr : addend_ + (out.base - target_),
                        target_ + (out.base - target_), out.stride, out.count, around_caches_);
          }
        }
      }
    }
  }

  // Adds all taps of a pixel over some steps of 32 channels.
  void add(int64_t row, int64_t column, int64_t block, int64_t first, float* sums) const {
    const Line down = product_.line(row, product_.from.height), across = product_.line(column, product_.from.width);
    Run runs[kRun * kConvolutionKernel];
    int64_t count = 0;
    const int64_t end = std::min(product_.steps(), first + product_.steps_at_once());
    for (int64_t step = first; step < end && across.count > 0; ++step) {
      const uint16_t* weights = weights_ + (block * product_.steps() + step) * product_.taps() * kPair;
      for (int64_t i = 0; i < down.count; ++i) {
        const int64_t y = down.source + i * product_.source_step(), tap = down.tap + i * product_.tap_step();
        runs[count++] = {
            ring_ + y % slots_ * product_.row_size() + (step * product_.from.width + across.source) * kPair,
            weights + (tap * product_.kernel + across.tap) * kPair, across.count};
      }
    }
    multiply(runs, count, product_.source_step() * kPair, product_.tap_step() * kPair, first > 0, sums);
  }

  const ImageProduct& product_;
  const uint16_t *source_, *weights_, *addend_;
  uint16_t* target_;
  int64_t first_;
  uint16_t* ring_;
  float* sums_;
  int64_t slots_, packed_ = 0;
  bool around_caches_;
};

void run(const ImageProduct& product, const uint16_t* source, const float* weight, const uint16_t* addend,
         uint16_t* target, void* workspace) {
  Arena arena(workspace);
  const ImageProduct::Memory memory = product.take(arena);
  pack_weights(product, weight, memory.weights);
  const int64_t blocks = ceil_div(product.batch, kImages);
  // Rows at the border of a band are packed twice, so there are only as many bands as threads require.
  const int64_t sweeps = ceil_div(product.to.height, product.rows_of_sweep());
  const int64_t bands = std::min(ceil_div(2 * max_threads(), blocks), sweeps);
  const int64_t band_rows = ceil_div(sweeps, bands) * product.rows_of_sweep();
  parallel_for(blocks * bands, [&](int64_t task, int thread) {
    const TileSession session;
    const int64_t begin = task % bands * band_rows;
    ImageTask(product, source, memory.weights, addend, target, task / bands * kImages,
              memory.rings + thread * product.ring_rows() * product.row_size(),
              memory.sums + thread * product.sums_size())
        .rows(begin, std::min(begin + band_rows, product.to.height));
  });
}

// ---- the gradient of the weights -----------------------------------------------------------------------------------

// Divided by output and input channels into blocks, whose sums stay in the cache, and by images into parts.
struct WeightGradient {
  ImageProduct product;  // the forward product
  int64_t rows_per_block, columns_per_block;
  int64_t row_blocks, column_blocks;
  int64_t images_per_part, parts;

  explicit WeightGradient(const ConvolutionShape& s) : product(forward_product(s)) {
    rows_per_block = std::min(kBlockRows, product.to.channels);
    row_blocks = ceil_div(product.to.channels, rows_per_block);
    const int64_t fit = kBlockBytes / static_cast<int64_t>(sizeof(float)) / (rows_per_block * product.taps());
    columns_per_block = std::clamp<int64_t>(fit / kStep * kStep, kStep, product.from.channels);
    column_blocks = ceil_div(product.from.channels, columns_per_block);
    const int64_t image_blocks = ceil_div(s.batch, kImages);
    parts = std::clamp<int64_t>(kTasks / blocks(), 1, image_blocks);
    images_per_part = ceil_div(image_blocks, parts) * kImages;
    parts = ceil_div(s.batch, images_per_part);
  }

  int64_t blocks() const { return row_blocks * column_blocks; }
  int64_t rows_of_sweep() const { return product.rows_of_sweep(); }
  int64_t ring_rows() const { return product.ring_rows(); }
  // Sizes in elements: gradients of a sweep, [row][pixel][channels / 16][tile], and a row of the ring, [pixel][channels
  // / 16][tile].
  int64_t gradients_size() const { return rows_of_sweep() * product.to.width * rows_per_block * kStep; }
  int64_t row_size() const { return product.from.width * columns_per_block * kStep; }
  // Size of the sums of a task: [output channels / 32][input channels / 32][tap] blocks.
  int64_t sums_size() const { return rows_per_block * columns_per_block * product.taps(); }

  struct Memory {
    uint16_t *gradients, *rings;
    float* sums;
  };
  Memory take(Arena& arena) const {
    const int64_t threads = max_threads();
    uint16_t* gradients = arena.take<uint16_t>(threads * gradients_size());
    uint16_t* rings = arena.take<uint16_t>(threads * ring_rows() * row_size());
    return {gradients, rings, arena.take<float>(blocks() * parts * sums_size())};
  }
};

class WeightTask {
 public:
  WeightTask(const WeightGradient& gradient, const uint16_t* grad_y, const uint16_t* x, int64_t block,
             uint16_t* gradients, uint16_t* ring, float* sums)
      : g_(gradient),
        product_(gradient.product),
        grad_y_(grad_y),
        x_(x),
        gradients_(gradients),
        ring_(ring),
        sums_(sums),
        first_row_(block / gradient.column_blocks * gradient.rows_per_block),
        first_column_(block % gradient.column_blocks * gradient.columns_per_block),
        rows_(std::min(gradient.rows_per_block, product_.to.channels - first_row_)),
        columns_(std::min(gradient.columns_per_block, product_.from.channels - first_column_)) {}

  void images(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kImages) {
      packed_ = 0;
      for (int64_t row = 0; row < product_.to.height; row += g_.rows_of_sweep()) {
        sweep(first, row, std::min(product_.to.height, row + g_.rows_of_sweep()));
      }
    }
  }

 private:
  int64_t gradient_pixel() const { return rows_ * kStep; }
  int64_t source_pixel() const { return columns_ * kStep; }

  void pack(int64_t first, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < product_.to.width; ++column) {
        pack_left_transposed(product_.to.pixel(grad_y_, product_.batch, first, row, column, first_row_), rows_,
                             gradients_ + ((row - begin) * product_.to.width + column) * gradient_pixel());
      }
    }
    const Line line = product_.line(end - 1, product_.from.height);
    const int64_t last = line.source + line.count - 1;
    for (int64_t y = std::max(packed_, last + 1 - g_.ring_rows()); y <= last; ++y) {
      if (!product_.reads(y)) continue;
      for (int64_t column = 0; column < product_.from.width; ++column) {
        if (!product_.reads(column)) continue;
        pack_right(product_.from.pixel(x_, product_.batch, first, y, column, first_column_), columns_,
                   ring_ + y % g_.ring_rows() * g_.row_size() + column * source_pixel());
      }
    }
    packed_ = std::max(packed_, last + 1);
  }

  void sweep(int64_t first, int64_t begin, int64_t end) {
    pack(first, begin, end);
    for (int64_t left = 0; left < product_.to.width; left += kRun) {
      const int64_t right = std::min(product_.to.width, left + kRun);
      for (int64_t kh = 0; kh < product_.kernel; ++kh) {
        for (int64_t row = 0; row < rows_ / kStep; ++row) {
          for (int64_t column = 0; column < columns_ / kStep; ++column) {
            float* sums =
                sums_ + ((row * (columns_ / kStep) + column) * product_.taps() + kh * product_.kernel) * kBlock;
            for (int64_t kw = 0; kw < product_.kernel; ++kw, sums += kBlock) {
              add(begin, end, left, right, kh, kw, row, column, sums);
            }
          }
        }
      }
    }
  }

  // Adds the pixels of a sweep between two columns, for one tap.
  void add(int64_t begin, int64_t end, int64_t left, int64_t right, int64_t kh, int64_t kw, int64_t row, int64_t column,
           float* sums) {
    // x = column stride - padding + kw must be within the image.
    const int64_t stride = product_.stride, origin = kw - product_.padding;
    const int64_t low = std::max(left, origin < 0 ? ceil_div(-origin, stride) : 0);
    const int64_t high =
        std::min(right, product_.from.width > origin ? (product_.from.width - 1 - origin) / stride + 1 : 0);
    if (low >= high) return;
    Run runs[kSweepPixels];
    int64_t count = 0;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t y = at * stride - product_.padding + kh;
      if (y < 0 || y >= product_.from.height) continue;
      runs[count++] = {
          gradients_ + ((at - begin) * product_.to.width + low) * gradient_pixel() + row * kPair,
          ring_ + y % g_.ring_rows() * g_.row_size() + (low * stride + origin) * source_pixel() + column * kPair,
          high - low};
    }
    if (count > 0) multiply(runs, count, gradient_pixel(), stride * source_pixel(), true, sums);
  }

  const WeightGradient& g_;
  const ImageProduct& product_;
  const uint16_t *grad_y_, *x_;
  uint16_t *gradients_, *ring_;
  float* sums_;
  int64_t first_row_, first_column_, rows_, columns_, packed_ = 0;
};

bool reaches(int64_t out, int64_t in, int64_t kernel, int64_t stride, int64_t padding) {
  return out >= 1 && (in + 2 * padding - kernel) / stride + 1 == out;
}

}  // namespace

bool convolution_is_usable(const ConvolutionShape& s) {
  auto channels = [](int64_t c) { return c > 0 && c % kStep == 0; };
  return bf16_tiles_are_usable() && channels(s.in_channels) && channels(s.out_channels) && s.kernel >= 1 &&
         s.kernel <= kConvolutionKernel && s.stride >= 1 && s.padding >= 0 && s.padding < s.kernel && s.batch >= 1 &&
         s.in_height >= 1 && s.in_width >= 1 && reaches(s.out_height, s.in_height, s.kernel, s.stride, s.padding) &&
         reaches(s.out_width, s.in_width, s.kernel, s.stride, s.padding);
}

size_t convolution_workspace(const ConvolutionShape& shape, ConvolutionPass pass) {
  if (pass == ConvolutionPass::kForward) return forward_product(shape).workspace();
  if (pass == ConvolutionPass::kGradInput) return grad_input_product(shape).workspace();
  Arena arena(nullptr);
  WeightGradient(shape).take(arena);
  return arena.used();
}

void convolution_forward(const ConvolutionShape& shape, const uint16_t* x, const float* weight, uint16_t* y,
                         void* workspace) {
  run(forward_product(shape), x, weight, nullptr, y, workspace);
}

void convolution_grad_input(const ConvolutionShape& shape, const uint16_t* grad_y, const float* weight,
                            const uint16_t* addend, uint16_t* grad_x, void* workspace) {
  run(grad_input_product(shape), grad_y, weight, addend, grad_x, workspace);
}

void convolution_grad_weight(const ConvolutionShape& shape, const uint16_t* grad_y, const uint16_t* x,
                             float* grad_weight, void* workspace) {
  const WeightGradient g(shape);
  Arena arena(workspace);
  const WeightGradient::Memory memory = g.take(arena);
  parallel_for(g.blocks() * g.parts, [&](int64_t task, int thread) {
    const TileSession session;
    float* sums = memory.sums + task * g.sums_size();
    std::fill(sums, sums + g.sums_size(), 0.0f);
    const int64_t begin = task % g.parts * g.images_per_part;
    WeightTask(g, grad_y, x, task / g.parts, memory.gradients + thread * g.gradients_size(),
               memory.rings + thread * g.ring_rows() * g.row_size(), sums)
        .images(begin, std::min(begin + g.images_per_part, shape.batch));
  });
  const int64_t in_channels = g.product.from.channels, taps = g.product.taps();
  parallel_for(g.product.to.channels / kStep, [&](int64_t row, int) {
    const int64_t row_block = row * kStep / g.rows_per_block, in_block = row - row_block * (g.rows_per_block / kStep);
    for (int64_t column = 0; column < in_channels / kStep; ++column) {
      const int64_t column_block = column * kStep / g.columns_per_block;
      const int64_t first = column_block * g.columns_per_block;
      const int64_t columns = std::min(g.columns_per_block, in_channels - first) / kStep;
      const float* sums = memory.sums + (row_block * g.column_blocks + column_block) * g.parts * g.sums_size() +
                          (in_block * columns + column - first / kStep) * taps * kBlock;
      for (int64_t tap = 0; tap < taps; ++tap, sums += kBlock) {
        sum_blocks(sums, g.parts, g.sums_size(),
                   grad_weight + (row * kStep * taps + tap) * in_channels + column * kStep, taps * in_channels);
      }
    }
  });
}

}  // namespace scan_fast
