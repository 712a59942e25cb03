// Interface of the batch normalisation kernels, forward and backward, fused with the residual addition and the ReLU
// that follow it in a residual network.
//
// x holds `rows` rows of `channels` (a channels-last image batch has N * H * W rows). Per channel c, in float32:
//   training:    mean, var = those of the batch; running_* += momentum * (batch's - running_*), with var over rows - 1
//   evaluation:  mean, var = running_mean, running_var
//   inv_std = 1 / sqrt(var + eps)
//   v = (x - mean) * (weight * inv_std) + bias [+ residual],   y = max(v, 0) with relu, else v
//   dz = dy if v > 0 or without relu, else 0;  d residual = dz;  d bias = sum dz;
//   d weight = inv_std * sum dz (x - mean)
//   dx = weight inv_std (dz - d bias / rows - (x - mean) inv_std d weight / rows)    (evaluation: weight inv_std dz)
// The backward pass recomputes the sign of v from x. With a residual, which is not saved, the forward pass stores the
// sign as one bit per element (the mask).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

struct BatchNormShape {
  int64_t rows, channels;  // both positive; training needs at least two rows
};

// The mask has one 16-bit word per row and 16 channels. Each device maps bits to channels in its own way, but by dtype
// and shape alone: the forward and the backward pass see tensors at different addresses.
constexpr int64_t batch_norm_mask_words(const BatchNormShape& shape) {
  return shape.rows * ((shape.channels + 15) / 16);
}

struct BatchNormForward {
  const void* x;         // (rows, channels) of dtype
  const void* residual;  // the same, or null
  const float* weight;   // (channels)
  const float* bias;     // (channels)
  float* running_mean;   // (channels), or null in training; updated in training
  float* running_var;    // (channels), or null in training
  void* y;               // (rows, channels) of dtype
  float* mean;           // (channels), kept for the backward pass
  float* inv_std;        // (channels), kept for the backward pass
  uint16_t* mask;        // batch_norm_mask_words(shape) words, or null if no mask is needed
  void* workspace;       // batch_norm_*_workspace(shape) bytes, any content
  float momentum, eps;
  bool training, relu;
};

struct BatchNormBackward {
  const void* grad_y;  // (rows, channels) of dtype
  const void* x;
  const float* weight;
  const float* bias;
  const float* mean;
  const float* inv_std;
  const uint16_t* mask;  // written by the forward pass, or null
  void* grad_x;          // (rows, channels) of dtype
  void* grad_residual;   // the same, or null
  float* grad_weight;    // (channels)
  float* grad_bias;      // (channels)
  void* workspace;
  bool training, relu;
};

size_t batch_norm_cpu_workspace(const BatchNormShape& shape);
void batch_norm_forward_cpu(DType dtype, const BatchNormShape& shape, const BatchNormForward& arguments);
void batch_norm_backward_cpu(DType dtype, const BatchNormShape& shape, const BatchNormBackward& arguments);

// These run on the current device. They throw std::runtime_error if CUDA refuses a launch.
size_t batch_norm_cuda_workspace(const BatchNormShape& shape);
void batch_norm_forward_cuda(DType dtype, const BatchNormShape& shape, const BatchNormForward& arguments,
                             StreamHandle stream);
void batch_norm_backward_cuda(DType dtype, const BatchNormShape& shape, const BatchNormBackward& arguments,
                              StreamHandle stream);

}  // namespace scan_fast
