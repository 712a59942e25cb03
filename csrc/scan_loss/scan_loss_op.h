// Tensor interface of the SCAN loss. The dispatcher operators call the same functions.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace scan_fast {

// anchors, neighbors: (B, C) or (H, B, C). Returns total, consistency and entropy (() or (H)), mean_prob ((H,) C) and
// row_stats ((H,) B, 6), all float32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_loss_forward(const at::Tensor& anchors,
                                                                                        const at::Tensor& neighbors,
                                                                                        double entropy_weight);

// Returns the gradients of anchors and neighbors, contiguous, in their dtype.
std::tuple<at::Tensor, at::Tensor> scan_loss_backward(
    const std::optional<at::Tensor>& grad_total, const std::optional<at::Tensor>& grad_consistency,
    const std::optional<at::Tensor>& grad_entropy, const at::Tensor& anchors, const at::Tensor& neighbors,
    const at::Tensor& mean_prob, const at::Tensor& row_stats, double entropy_weight);

}  // namespace scan_fast
