// Tensor interface of the self-label loss. The dispatcher operators call the same functions.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace scan_fast {

// weak, strong: (B, C). Returns loss (() float32), n_confident (() int64), target (B, int32), row_weight (B, float32)
// and row_stats (B, 2, float32).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> self_label_forward(
    const at::Tensor& weak, const at::Tensor& strong, double threshold, bool balance);

// Returns the gradient of strong, contiguous, in its dtype.
at::Tensor self_label_backward(const at::Tensor& grad_loss, const at::Tensor& strong, const at::Tensor& target,
                               const at::Tensor& row_weight, const at::Tensor& row_stats);

}  // namespace scan_fast
