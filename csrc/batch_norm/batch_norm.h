// Batch normalisation with what follows it in a residual network, forward and backward: the contract of its kernels.
//
// x holds `rows` rows of `channels` (a channels-last image batch, N * H * W rows). Per channel c, in float32:
//   training:    mean, var = the batch's; running_* += momentum * (batch's - running_*), var there with rows - 1
//   evaluation:  mean, var = running_mean, running_var
//   inv_std = 1 / sqrt(var + eps)
//   v = (x - mean) * (weight * inv_std) + bias [+ residual],   y = max(v, 0) with relu, else v
//   dz = dy where v > 0 (without relu everywhere);  d residual = dz;  d bias = sum dz;
//   d weight = inv_std * sum dz (x - mean)
//   dx = weight inv_std (dz - d bias / rows - (x - mean) inv_std d weight / rows)    (evaluation: weight inv_std dz)
// Where y was positive is computed again from x in the backward pass; with a residual, which is not kept, it is noted
// as a bit per element.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

struct BatchNormShape {
  int64_t rows, channels;  // both positive; in training at least two rows
};

// The bits: of each row a 16-bit word per 16 channels. Which bit is whose is each device's own affair, but dtype and shape
// alone decide it: the forward and the backward pass see tensors at different addresses.
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
  float* inv_std;        // (channels), likewise
  uint16_t* mask;        // batch_norm_mask_words, or null where nothing is to be noted
  void* workspace;       // batch_norm_*_workspace(shape) bytes, any content
  float momentum, eps;
  bool training, relu;
};

struct BatchNormBackward {
  const void* grad_y;   // (rows, channels) of dtype
  const void* x;
  const float* weight;
  const float* bias;
  const float* mean;
  const float* inv_std;
  const uint16_t* mask;  // what the forward pass noted, or null
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

// On the current device; they throw std::runtime_error where CUDA refuses a launch.
size_t batch_norm_cuda_workspace(const BatchNormShape& shape);
void batch_norm_forward_cuda(DType dtype, const BatchNormShape& shape, const BatchNormForward& arguments,
                             StreamHandle stream);
void batch_norm_backward_cuda(DType dtype, const BatchNormShape& shape, const BatchNormBackward& arguments,
                              StreamHandle stream);

}  // namespace scan_fast
