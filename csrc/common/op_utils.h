// Helpers that the torch-facing layers (_op.cpp) of the kernel families share.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#ifdef SCAN_FAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <memory>
#include <string>
#include <utility>

#include "common/op_checks.h"
#include "common/types.h"

namespace scan_fast {

inline DType dtype_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " must be a tensor, got None");
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: TORCH_CHECK_VALUE(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// Checks that two logit tensors agree in shape, dtype and device, and are not empty.
inline void check_pair(const at::Tensor& first, const at::Tensor& second, const char* first_name,
                       const char* second_name) {
  TORCH_CHECK_VALUE(first.defined() && second.defined(), first.defined() ? second_name : first_name,
                    " must be a tensor, got None");
  TORCH_CHECK_VALUE(first.sizes() == second.sizes(), second_name, " must have the shape of ", first_name, ", ",
                    first.sizes(), ", got ", second.sizes());
  TORCH_CHECK_VALUE(first.scalar_type() == second.scalar_type(), second_name, " must have the dtype of ", first_name,
                    ", ", first.scalar_type(), ", got ", second.scalar_type());
  TORCH_CHECK_VALUE(first.device() == second.device(), second_name, " must be on the device of ", first_name, ", ",
                    first.device(), ", got ", second.device());
  TORCH_CHECK_VALUE(first.numel() > 0, first_name, " must not be empty, got shape ", first.sizes());
}

// Returns a pointer to an upstream gradient of `count` values as float32, or null if the output was not used. `holder`
// owns the memory.
inline const float* gradient_pointer(const std::optional<at::Tensor>& gradient, const char* name, int64_t count,
                                     const at::Device& device, at::Tensor& holder) {
  if (!gradient.has_value() || !gradient->defined()) return nullptr;
  holder = checked_gradient(*gradient, name, count, device);
  return holder.const_data_ptr<float>();
}

// Makes the gradients raise an error if they are differentiated, as once_differentiable in Python does. This matters in
// a backward pass that is recorded (create_graph=True).
inline torch::autograd::variable_list once_differentiable(torch::autograd::variable_list gradients, const char* name) {
  if (!at::GradMode::is_enabled()) return gradients;
  auto error = std::make_shared<torch::autograd::DelayedError>(
      std::string(name) + " cannot be differentiated twice; use impl=\"reference\" for second derivatives",
      static_cast<int64_t>(gradients.size()));
  for (at::Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = gradient.detach().set_requires_grad(true);
  }
  return (*error)(std::move(gradients));
}

#ifdef SCAN_FAST_WITH_CUDA
inline StreamHandle current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
#endif

}  // namespace scan_fast
