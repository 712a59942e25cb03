// Dispatcher operators of batch normalisation. batch_norm is differentiable and is what the module calls; it is made of
// batch_norm_forward and batch_norm_backward. scan_loss_op.cpp explains why autograd is implemented here.
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <tuple>

#include "batch_norm/batch_norm.h"
#include "common/op_utils.h"

namespace scan_fast {
namespace {

// x (N, C, H, W), channels-last, and residual like it; weight, bias, running_mean, running_var (C) float32. The running
// ones are updated in training, where both may be missing. Returns y like x, mean and inv_std (C float32), and mask (int16;
// empty unless keep_mask, which a residual with relu needs for its backward pass).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var, bool training,
    double momentum, double eps, bool relu, bool keep_mask);

// Returns the gradients of x, residual (empty without with_residual), weight and bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& inv_std, const at::Tensor& mask, bool training, bool relu,
    bool with_residual);

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

BatchNormShape shape_of(const at::Tensor& x) {
  check_readable(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "x must be (N, C, H, W) in channels-last layout, got shape ", x.sizes(), " with strides ",
                    x.strides());
  TORCH_CHECK_VALUE(x.numel() > 0, "x must not be empty, got shape ", x.sizes());
  return {x.numel() / x.size(1), x.size(1)};
}

c10::MaybeOwned<at::Tensor> checked_like(const at::Tensor& tensor, const at::Tensor& x, const char* name) {
  check_readable(tensor, name);
  TORCH_CHECK_VALUE(tensor.sizes() == x.sizes() && tensor.scalar_type() == x.scalar_type() &&
                        tensor.device() == x.device() && tensor.is_contiguous(at::MemoryFormat::ChannelsLast),
                    name, " must have the shape, dtype, device and channels-last layout of x, ", x.sizes(), " ",
                    x.scalar_type(), " on ", x.device(), ", got ", tensor.sizes(), " ", tensor.scalar_type(), " on ",
                    tensor.device(), " with strides ", tensor.strides());
  return aligned(tensor, name);
}

// One float32 value per channel.
c10::MaybeOwned<at::Tensor> per_channel(const at::Tensor& tensor, const at::Tensor& x, const char* name) {
  return checked_values(tensor, name, x.sizes().slice(1, 1), at::kFloat, x.device());
}

// Returns running statistics, which are updated in place: a copy will not do, and they must be apart from each other and
// from all that the kernel reads.
float* running(const at::Tensor& tensor, const at::Tensor& x, const char* name,
               std::initializer_list<const at::Tensor*> others) {
  const c10::MaybeOwned<at::Tensor> checked = per_channel(tensor, x, name);
  TORCH_CHECK_VALUE(checked->const_data_ptr() == tensor.const_data_ptr(), name,
                    " must be contiguous, with aligned elements, because it is updated in place; got strides ",
                    tensor.strides());
  const auto begin = [](const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  for (const at::Tensor* other : others) {
    if (other == nullptr) continue;
    TORCH_CHECK_VALUE(
        begin(tensor) + tensor.nbytes() <= begin(*other) || begin(*other) + other->nbytes() <= begin(tensor), name,
        " is updated in place and must not share memory with another argument");
  }
  return tensor.mutable_data_ptr<float>();
}

at::Tensor workspace_of(const at::Tensor& x, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
}

auto forward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("scan_fast::batch_norm_forward", "")
                             .typed<decltype(batch_norm_forward)>();
  return op;
}

auto backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("scan_fast::batch_norm_backward", "")
                             .typed<decltype(batch_norm_backward)>();
  return op;
}

struct BatchNormNode : torch::autograd::Function<BatchNormNode> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const OptionalTensor& residual,
                            const at::Tensor& weight, const at::Tensor& bias, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, bool training, double momentum, double eps, bool relu) {
    const bool with_residual = given(residual);
    auto [y, mean, inv_std, mask] = forward_operator().call(x, residual, weight, bias, running_mean, running_var,
                                                            training, momentum, eps, relu, with_residual && relu);
    context->save_for_backward({x, weight, bias, mean, inv_std, mask});
    context->saved_data["training"] = training;
    context->saved_data["relu"] = relu;
    context->saved_data["with_residual"] = with_residual;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& x = saved[0];
    const at::Tensor grad_y = gradients[0].to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
    auto [grad_x, grad_residual, grad_weight, grad_bias] = backward_operator().call(
        grad_y, x, saved[1], saved[2], saved[3], saved[4], saved[5], context->saved_data["training"].toBool(),
        context->saved_data["relu"].toBool(), context->saved_data["with_residual"].toBool());
    if (!context->saved_data["with_residual"].toBool()) grad_residual = at::Tensor();
    variable_list result = once_differentiable({grad_x, grad_residual, grad_weight, grad_bias}, "batch_norm");
    result.resize(10);
    return result;
  }
};

at::Tensor batch_norm(const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& weight,
                      const at::Tensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      bool training, double momentum, double eps, bool relu) {
  TORCH_CHECK_VALUE(eps > 0 || (eps == 0 && !training), "eps must be positive, or 0 in evaluation, got ", eps);
  const bool wanted = x.requires_grad() || weight.requires_grad() || bias.requires_grad() ||
                      (given(residual) && residual->requires_grad());
  if (at::GradMode::is_enabled() && wanted) {
    return BatchNormNode::apply(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, relu);
  }
  return std::get<0>(forward_operator().call(x, residual, weight, bias, running_mean, running_var, training, momentum,
                                             eps, relu, false));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_forward(
    const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& weight, const at::Tensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum, double eps,
    bool relu, bool keep_mask) {
  const BatchNormShape shape = shape_of(x);
  const DType dtype = dtype_of(x, "x");
  const auto pixels = aligned(x, "x"), scale = per_channel(weight, x, "weight"), offset = per_channel(bias, x, "bias");
  const auto added = given(residual) ? checked_like(*residual, x, "residual") : c10::MaybeOwned<at::Tensor>();
  const bool has_running = given(running_mean) && given(running_var);
  TORCH_CHECK_VALUE(has_running || (training && !given(running_mean) && !given(running_var)),
                    "running_mean and running_var must both be given, or, in training, neither");
  TORCH_CHECK_VALUE(!training || shape.rows > 1, "training needs more than one value per channel, got shape ",
                    x.sizes());
  // Without eps, the statistics are those of the batch itself, as layers over several processes need them.
  TORCH_CHECK_VALUE(eps >= 0, "eps must not be negative, got ", eps);
  check_finite(eps, "eps");
  check_finite(momentum, "momentum");
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor y = at::empty_like(x), mean = at::empty({shape.channels}, options), inv_std = at::empty_like(mean);
  at::Tensor mask = at::empty({keep_mask ? batch_norm_mask_words(shape) : 0}, x.options().dtype(at::kShort));
  const auto updated = [&](const OptionalTensor& tensor, const OptionalTensor& other, const char* name) {
    if (!has_running) return static_cast<float*>(nullptr);
    return running(*tensor, x, name, {&*other, &x, given(residual) ? &*residual : nullptr, &weight, &bias});
  };
  BatchNormForward arguments{pixels->const_data_ptr(),
                             given(residual) ? added->const_data_ptr() : nullptr,
                             scale->const_data_ptr<float>(),
                             offset->const_data_ptr<float>(),
                             updated(running_mean, running_var, "running_mean"),
                             updated(running_var, running_mean, "running_var"),
                             y.data_ptr(),
                             mean.data_ptr<float>(),
                             inv_std.data_ptr<float>(),
                             keep_mask ? static_cast<uint16_t*>(mask.data_ptr()) : nullptr,
                             nullptr,
                             static_cast<float>(momentum),
                             static_cast<float>(eps),
                             training,
                             relu};
#ifdef SCAN_FAST_WITH_CUDA
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor workspace = workspace_of(x, batch_norm_cuda_workspace(shape));
    arguments.workspace = workspace.data_ptr();
    batch_norm_forward_cuda(dtype, shape, arguments, current_stream());
    return {y, mean, inv_std, mask};
  }
#endif
  const at::Tensor workspace = workspace_of(x, batch_norm_cpu_workspace(shape));
  arguments.workspace = workspace.data_ptr();
  batch_norm_forward_cpu(dtype, shape, arguments);
  return {y, mean, inv_std, mask};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& inv_std, const at::Tensor& mask, bool training, bool relu,
    bool with_residual) {
  const BatchNormShape shape = shape_of(x);
  const DType dtype = dtype_of(x, "x");
  TORCH_CHECK_VALUE(!training || shape.rows > 1, "training needs more than one value per channel, got shape ",
                    x.sizes());
  const auto pixels = aligned(x, "x"), gradients = checked_like(grad_y, x, "grad_y");
  const auto scale = per_channel(weight, x, "weight"), offset = per_channel(bias, x, "bias");
  const auto centre = per_channel(mean, x, "mean"), slope = per_channel(inv_std, x, "inv_std");
  // The mask that batch_norm_forward returned with keep_mask=True for this input.
  const int64_t words = batch_norm_mask_words(shape);
  const auto signs = relu && with_residual ? checked_values(mask, "mask", words, at::kShort, x.device())
                                           : c10::MaybeOwned<at::Tensor>();
  at::Tensor grad_x = at::empty_like(x);
  at::Tensor grad_residual = with_residual ? at::empty_like(x) : at::empty({0}, x.options());
  at::Tensor grad_weight = at::empty({shape.channels}, x.options().dtype(at::kFloat));
  at::Tensor grad_bias = at::empty_like(grad_weight);
  BatchNormBackward arguments{gradients->const_data_ptr(),
                              pixels->const_data_ptr(),
                              scale->const_data_ptr<float>(),
                              offset->const_data_ptr<float>(),
                              centre->const_data_ptr<float>(),
                              slope->const_data_ptr<float>(),
                              relu && with_residual ? static_cast<const uint16_t*>(signs->const_data_ptr()) : nullptr,
                              grad_x.data_ptr(),
                              with_residual ? grad_residual.data_ptr() : nullptr,
                              grad_weight.data_ptr<float>(),
                              grad_bias.data_ptr<float>(),
                              nullptr,
                              training,
                              relu};
#ifdef SCAN_FAST_WITH_CUDA
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor workspace = workspace_of(x, batch_norm_cuda_workspace(shape));
    arguments.workspace = workspace.data_ptr();
    batch_norm_backward_cuda(dtype, shape, arguments, current_stream());
    return {grad_x, grad_residual, grad_weight, grad_bias};
  }
#endif
  const at::Tensor workspace = workspace_of(x, batch_norm_cpu_workspace(shape));
  arguments.workspace = workspace.data_ptr();
  batch_norm_backward_cpu(dtype, shape, arguments);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(scan_fast, m) {
  m.def(
      "batch_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, bool training, float momentum, float eps, bool relu) -> Tensor",
      &batch_norm);
  m.def(
      "batch_norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, bool training, float momentum, float eps, bool relu, bool keep_mask) -> "
      "(Tensor y, Tensor mean, Tensor inv_std, Tensor mask)");
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor inv_std, "
      "Tensor mask, bool training, bool relu, bool with_residual) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, m) {
  m.impl("batch_norm_forward", &batch_norm_forward);
  m.impl("batch_norm_backward", &batch_norm_backward);
}

#ifdef SCAN_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(scan_fast, CUDA, m) {
  m.impl("batch_norm_forward", &batch_norm_forward);
  m.impl("batch_norm_backward", &batch_norm_backward);
}
#endif

}  // namespace scan_fast
