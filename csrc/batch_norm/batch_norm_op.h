// Tensor interface of batch normalisation. The dispatcher operators call the same functions.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace scan_fast {

// x: (N, C, H, W), channels-last; residual: like x; weight, bias, running_mean, running_var: (C) float32. The running
// statistics are updated in training, where both may be missing.
// Returns y like x, mean and inv_std (C, float32), and mask (int16). The mask is empty unless keep_mask is set; the
// backward pass of a residual with relu needs it.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var, bool training,
    double momentum, double eps, bool relu, bool keep_mask);

// Returns the gradients of x, residual (empty unless with_residual), weight and bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& inv_std, const at::Tensor& mask, bool training, bool relu,
    bool with_residual);

}  // namespace scan_fast
