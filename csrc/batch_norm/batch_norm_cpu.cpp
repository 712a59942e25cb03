// CPU driver of batch normalisation. Each pass distributes blocks of rows over threads twice: for sums per channel,
// then for the elements.
//
// The limit is memory. In 16 bits, the forward pass moves 2 + 4 bytes per element (2 more for a residual) and the
// backward pass 4 + 6 (2 more). Separate operators for normalisation, addition and ReLU move 18 and 22. Blocks do not
// depend on the number of threads, and their sums are added in order, so results do not depend on it either.
#include <algorithm>
#include <cmath>

#include "batch_norm/batch_norm_cpu_kernel.h"
#include "common/parallel.h"

namespace scan_fast {
namespace {

constexpr int64_t kElementsPerBlock = 64 * 1024;

struct Blocks {
  int64_t rows, channels, each, count;
  explicit Blocks(const BatchNormShape& shape)
      : rows(shape.rows),
        channels(shape.channels),
        each(std::max<int64_t>(1, kElementsPerBlock / shape.channels)),
        count((shape.rows + each - 1) / each) {}
  int64_t size(int64_t block) const { return std::min(each, rows - block * each); }
  double rows_of(int64_t block) const { return static_cast<double>(size(block)); }
};

// Returns the address of element `offset` of an array of dtype; null stays null.
template <typename Pointer>
Pointer at(Pointer base, int64_t offset, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return base == nullptr ? nullptr : static_cast<Byte*>(base) + offset * (dtype == DType::kFloat32 ? 4 : 2);
}

// Layout of the workspace: three values per channel for the loops, then three sums per channel and block.
float* channel_values(void* workspace, const BatchNormShape& shape, int64_t index) {
  return static_cast<float*>(workspace) + index * shape.channels;
}
float* block_sums(void* workspace, const BatchNormShape& shape, int64_t block) {
  return channel_values(workspace, shape, 3 + 3 * block);
}

// Computes mean and inv_std of the batch from the moments of the blocks, and updates the running statistics.
void finish_moments(const BatchNormShape& shape, const Blocks& blocks, const BatchNormForward& arguments) {
  const double rows = static_cast<double>(shape.rows);
  for (int64_t c = 0; c < shape.channels; ++c) {
    auto moment = [&](int64_t block, int64_t index) {
      return static_cast<double>(block_sums(arguments.workspace, shape, block)[index * shape.channels + c]);
    };
    double mean = 0, squares = 0;
    for (int64_t block = 0; block < blocks.count; ++block) mean += moment(block, 0) * blocks.rows_of(block) / rows;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const double off = moment(block, 0) - mean;
      squares += moment(block, 1) + off * off * blocks.rows_of(block);
    }
    // Rounding must not make it negative; NaN stays NaN.
    const double var = squares < 0 ? 0.0 : squares / rows;
    arguments.mean[c] = static_cast<float>(mean);
    arguments.inv_std[c] = static_cast<float>(1.0 / std::sqrt(var + static_cast<double>(arguments.eps)));
    if (arguments.running_mean == nullptr) continue;
    auto move = [&](float& old, double value) { old += static_cast<float>(arguments.momentum * (value - old)); };
    move(arguments.running_mean[c], mean);
    move(arguments.running_var[c], var * rows / (rows - 1));
  }
}

}  // namespace

size_t batch_norm_cpu_workspace(const BatchNormShape& shape) {
  return static_cast<size_t>((3 + 3 * Blocks(shape).count) * shape.channels) * sizeof(float);
}

void batch_norm_forward_cpu(DType dtype, const BatchNormShape& shape, const BatchNormForward& arguments) {
  const Blocks blocks(shape);
  if (arguments.training) {
    const auto moments = SCAN_FAST_BEST_ISA(batch_norm_moments);
    parallel_for(blocks.count, [&](int64_t block, int) {
      moments(dtype, at(arguments.x, block * blocks.each * shape.channels, dtype), blocks.size(block), shape.channels,
              block_sums(arguments.workspace, shape, block));
    });
    finish_moments(shape, blocks, arguments);
  } else {
    for (int64_t c = 0; c < shape.channels; ++c) {
      arguments.mean[c] = arguments.running_mean[c];
      arguments.inv_std[c] = 1.0f / std::sqrt(arguments.running_var[c] + arguments.eps);
    }
  }
  float* scale = channel_values(arguments.workspace, shape, 0);
  for (int64_t c = 0; c < shape.channels; ++c) scale[c] = arguments.weight[c] * arguments.inv_std[c];
  const BatchNormChannels of{arguments.mean, scale, arguments.bias};
  const auto normalise = SCAN_FAST_BEST_ISA(batch_norm_rows);
  const int64_t words = blocks.each * ((shape.channels + 15) / 16);
  parallel_for(blocks.count, [&](int64_t block, int) {
    const int64_t offset = block * blocks.each * shape.channels;
    normalise(dtype, at(arguments.x, offset, dtype), at(arguments.residual, offset, dtype), of, arguments.relu,
              blocks.size(block), shape.channels, at(arguments.y, offset, dtype),
              arguments.mask == nullptr ? nullptr : arguments.mask + block * words);
  });
}

void batch_norm_backward_cpu(DType dtype, const BatchNormShape& shape, const BatchNormBackward& arguments) {
  const Blocks blocks(shape);
  const int64_t words = blocks.each * ((shape.channels + 15) / 16);
  float* scale = channel_values(arguments.workspace, shape, 0);
  float* slope = channel_values(arguments.workspace, shape, 1);
  float* offset = channel_values(arguments.workspace, shape, 2);
  for (int64_t c = 0; c < shape.channels; ++c) scale[c] = arguments.weight[c] * arguments.inv_std[c];
  const BatchNormChannels of{arguments.mean, scale, arguments.bias};
  auto mask_of = [&](int64_t block) { return arguments.mask == nullptr ? nullptr : arguments.mask + block * words; };

  const auto sums = SCAN_FAST_BEST_ISA(batch_norm_gradient_sums);
  parallel_for(blocks.count, [&](int64_t block, int) {
    const int64_t first = block * blocks.each * shape.channels;
    sums(dtype, at(arguments.grad_y, first, dtype), at(arguments.x, first, dtype), mask_of(block), of, arguments.relu,
         blocks.size(block), shape.channels, block_sums(arguments.workspace, shape, block));
  });
  const double rows = static_cast<double>(shape.rows);
  for (int64_t c = 0; c < shape.channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const float* part = block_sums(arguments.workspace, shape, block);
      sum += static_cast<double>(part[c]);
      product += static_cast<double>(part[shape.channels + c]);
    }
    const double inv_std = arguments.inv_std[c];
    arguments.grad_bias[c] = static_cast<float>(sum);
    arguments.grad_weight[c] = static_cast<float>(product * inv_std);
    slope[c] = static_cast<float>(-scale[c] * inv_std * inv_std * product / rows);
    offset[c] = static_cast<float>(-scale[c] * sum / rows);
  }

  const BatchNormSlopes slopes = arguments.training ? BatchNormSlopes{slope, offset} : BatchNormSlopes{};
  const auto gradients = SCAN_FAST_BEST_ISA(batch_norm_gradient_rows);
  parallel_for(blocks.count, [&](int64_t block, int) {
    const int64_t first = block * blocks.each * shape.channels;
    gradients(dtype, at(arguments.grad_y, first, dtype), at(arguments.x, first, dtype), mask_of(block), of, slopes,
              arguments.relu, blocks.size(block), shape.channels, at(arguments.grad_x, first, dtype),
              at(arguments.grad_residual, first, dtype));
  });
}

}  // namespace scan_fast
