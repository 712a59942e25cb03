// The self-label loss, forward and backward: the contract of its kernels.
//
// With (B, C) row-major logits of weak and strong views: row i is confident where max softmax(weak_i) > threshold, both
// in float32; its label t_i is the first largest class. Its weight w_i is 1 / (number of confident rows), or, balanced,
// 1 / (classes that occur * confident rows of its class); other rows have weight 0, and their strong logits are
// not read.
//   loss = sum_i w_i (lse(strong_i) - strong_i[t_i]),  zero where nothing is confident
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

struct SelfLabelShape {
  int64_t rows, classes;  // classes < 2^31
};

// Kept for the backward pass, per confident row: max and 1 / sum e^(strong - max). Zero in other rows. How
// they are laid out is each device's own affair.
constexpr int kSelfLabelRowStats = 2;

struct SelfLabelForward {
  const void* weak;    // (B, C) of dtype
  const void* strong;  // (B, C) of dtype
  float* loss;         // ()
  int64_t* n_confident;  // ()
  int32_t* target;     // (B), the first largest class of every row
  float* row_weight;   // (B)
  float* row_stats;    // (B, kSelfLabelRowStats)
  void* workspace;     // self_label_*_workspace(shape) bytes, any content
  float threshold;
  bool balance;
};

struct SelfLabelBackward {
  const float* grad_loss;  // ()
  const void* strong;
  const int32_t* target;
  const float* row_weight;
  const float* row_stats;
  void* grad_strong;  // (B, C) of dtype
};

size_t self_label_cpu_workspace(const SelfLabelShape& shape);
void self_label_forward_cpu(DType dtype, const SelfLabelShape& shape, const SelfLabelForward& arguments);
void self_label_backward_cpu(DType dtype, const SelfLabelShape& shape, const SelfLabelBackward& arguments);

// On the current device; they throw std::runtime_error where CUDA refuses a launch.
size_t self_label_cuda_workspace(const SelfLabelShape& shape);
void self_label_forward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelForward& arguments,
                             StreamHandle stream);
void self_label_backward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelBackward& arguments,
                              StreamHandle stream);

}  // namespace scan_fast
