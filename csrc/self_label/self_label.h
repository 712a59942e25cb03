// Interface of the self-label loss kernels, forward and backward.
//
// Inputs are (B, C) row-major logits of the weak and the strong view. Row i is confident if max softmax(weak_i) >
// threshold, both in float32. Its label t_i is the first largest class. Its weight w_i is 1 / (number of confident
// rows), or with balance 1 / (number of classes that occur * confident rows of its class). Other rows have weight 0,
// and their strong logits do not matter.
//   loss = sum_i w_i (lse(strong_i) - strong_i[t_i]),  zero if no row is confident
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

struct SelfLabelShape {
  int64_t rows, classes;  // classes < 2^31
};

// Saved for the backward pass, per confident row: max and 1 / sum e^(strong - max). Zero in other rows. Each device has
// its own layout.
constexpr int kSelfLabelRowStats = 2;

struct SelfLabelForward {
  const void* weak;      // (B, C) of dtype
  const void* strong;    // (B, C) of dtype
  float* loss;           // ()
  int64_t* n_confident;  // ()
  int32_t* target;       // (B), the first largest class of every row
  float* row_weight;     // (B)
  float* row_stats;      // (B, kSelfLabelRowStats)
  void* workspace;       // self_label_*_workspace(shape) bytes, any content
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

// These run on the current device. They throw std::runtime_error if CUDA refuses a launch.
size_t self_label_cuda_workspace(const SelfLabelShape& shape);
void self_label_forward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelForward& arguments,
                             StreamHandle stream);
void self_label_backward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelBackward& arguments,
                              StreamHandle stream);

}  // namespace scan_fast
