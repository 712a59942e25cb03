// Dispatcher operators of the self-label loss. self_label is differentiable and is what the public function calls; it
// is made of self_label_forward and self_label_backward. scan_loss_op.cpp explains why autograd is implemented here.
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <tuple>

#include "common/large_buffers.h"
#include "common/op_utils.h"
#include "common/scratch.h"
#include "self_label/self_label.h"

namespace scan_fast {
namespace {

// weak, strong (B, C). Returns loss (() float32), n_confident (() int64), target (B int32), row_weight (B float32) and
// row_stats (B, 2 float32).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> self_label_forward(const at::Tensor& weak,
                                                                                          const at::Tensor& strong,
                                                                                          double threshold,
                                                                                          bool balance);

// Returns the gradient of strong, contiguous, in its dtype.
at::Tensor self_label_backward(const at::Tensor& grad_loss, const at::Tensor& strong, const at::Tensor& target,
                               const at::Tensor& row_weight, const at::Tensor& row_stats);

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

SelfLabelShape shape_of(const at::Tensor& logits, const char* name) {
  TORCH_CHECK_VALUE(logits.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.numel() > 0, name, " must be (B, C) and not empty, got shape ",
                    logits.sizes());
  TORCH_CHECK_VALUE(logits.size(1) <= kMaxCount, name, " may have at most ", kMaxCount, " classes, got shape ",
                    logits.sizes());
  return {logits.size(0), logits.size(1)};
}

// The backward pass on a CPU writes to these places. That on a GPU compares them with the number of each class, so a
// wrong one changes a result and no memory.
void check_targets(const at::Tensor& target, int64_t classes) {
  const int32_t* values = target.const_data_ptr<int32_t>();
  int32_t least = 0, most = 0;
  for (int64_t i = 0; i < target.numel(); ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
  }
  TORCH_CHECK_VALUE(least >= 0 && most < classes, "target must be from 0 to ", classes - 1, ", got ",
                    least < 0 ? least : most);
}

auto forward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("scan_fast::self_label_forward", "")
                             .typed<decltype(self_label_forward)>();
  return op;
}

auto backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("scan_fast::self_label_backward", "")
                             .typed<decltype(self_label_backward)>();
  return op;
}

struct SelfLabelNode : torch::autograd::Function<SelfLabelNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const at::Tensor& weak, const at::Tensor& strong,
                               double threshold, bool balance) {
    auto [loss, n_confident, target, row_weight, row_stats] = forward_operator().call(weak, strong, threshold, balance);
    context->save_for_backward({strong, target, row_weight, row_stats});
    context->mark_non_differentiable({n_confident});
    context->set_materialize_grads(false);
    return {loss, n_confident};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    if (!gradients[0].defined()) return {{}, {}, {}, {}};
    const variable_list saved = context->get_saved_variables();
    const at::Tensor gradient = backward_operator().call(gradients[0], saved[0], saved[1], saved[2], saved[3]);
    return {{}, once_differentiable({gradient}, "self_label_loss")[0], {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> self_label(const at::Tensor& weak, const at::Tensor& strong, double threshold,
                                              bool balance) {
  if (at::GradMode::is_enabled() && strong.requires_grad()) {
    const variable_list result = SelfLabelNode::apply(weak.detach(), strong, threshold, balance);
    return {result[0], result[1]};
  }
  auto [loss, n_confident, target, row_weight, row_stats] =
      forward_operator().call(weak.detach(), strong, threshold, balance);
  return {loss, n_confident};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> self_label_forward(const at::Tensor& weak,
                                                                                          const at::Tensor& strong,
                                                                                          double threshold,
                                                                                          bool balance) {
  check_pair(weak, strong, "weak", "strong");
  const SelfLabelShape shape = shape_of(weak, "weak");
  const DType dtype = dtype_of(weak, "weak");
  TORCH_CHECK_VALUE(threshold >= 0 && threshold <= 1, "threshold must be in [0, 1], got ", threshold);
  const auto w = dense(weak, "weak"), s = dense(strong, "strong");
  const auto options = weak.options();
  at::Tensor loss = at::empty({}, options.dtype(at::kFloat)), n_confident = at::empty({}, options.dtype(at::kLong));
  at::Tensor target = at::empty({shape.rows}, options.dtype(at::kInt));
  at::Tensor row_weight = at::empty({shape.rows}, options.dtype(at::kFloat));
  at::Tensor row_stats = at::empty({shape.rows, kSelfLabelRowStats}, options.dtype(at::kFloat));
  SelfLabelForward arguments{w->const_data_ptr(),           s->const_data_ptr(),
                             loss.data_ptr<float>(),        n_confident.data_ptr<int64_t>(),
                             target.data_ptr<int32_t>(),    row_weight.data_ptr<float>(),
                             row_stats.data_ptr<float>(),   nullptr,
                             static_cast<float>(threshold), balance};
#ifdef SCAN_FAST_WITH_CUDA
  if (weak.is_cuda()) {
    const c10::cuda::CUDAGuard guard(weak.device());
    const at::Tensor workspace =
        at::empty({static_cast<int64_t>(self_label_cuda_workspace(shape))}, options.dtype(at::kByte));
    arguments.workspace = workspace.data_ptr();
    self_label_forward_cuda(dtype, shape, arguments, current_stream());
    return {loss, n_confident, target, row_weight, row_stats};
  }
#endif
  const Scratch<char> workspace(static_cast<int64_t>(self_label_cpu_workspace(shape)));
  arguments.workspace = workspace.get();
  self_label_forward_cpu(dtype, shape, arguments);
  return {loss, n_confident, target, row_weight, row_stats};
}

at::Tensor self_label_backward(const at::Tensor& grad_loss, const at::Tensor& strong, const at::Tensor& target,
                               const at::Tensor& row_weight, const at::Tensor& row_stats) {
  const SelfLabelShape shape = shape_of(strong, "strong");
  const DType dtype = dtype_of(strong, "strong");
  const at::Device device = strong.device();
  const at::Tensor gradient = checked_gradient(grad_loss, "grad_loss", 1, device);
  // As self_label_forward returned them for these logits.
  const auto labels = checked_values(target, "target", shape.rows, at::kInt, device);
  const auto weights = checked_values(row_weight, "row_weight", shape.rows, at::kFloat, device);
  const auto stats = checked_values(row_stats, "row_stats", {shape.rows, kSelfLabelRowStats}, at::kFloat, device);
  if (device.is_cpu()) check_targets(*labels, shape.classes);
  const auto s = dense(strong, "strong");
  at::Tensor grad_strong = empty_large(strong.sizes(), strong.options());
  const SelfLabelBackward arguments{gradient.const_data_ptr<float>(),  s->const_data_ptr(),
                                    labels->const_data_ptr<int32_t>(), weights->const_data_ptr<float>(),
                                    stats->const_data_ptr<float>(),    grad_strong.data_ptr()};
#ifdef SCAN_FAST_WITH_CUDA
  if (strong.is_cuda()) {
    const c10::cuda::CUDAGuard guard(strong.device());
    self_label_backward_cuda(dtype, shape, arguments, current_stream());
    return grad_strong;
  }
#endif
  self_label_backward_cpu(dtype, shape, arguments);
  return grad_strong;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(scan_fast, m) {
  m.def("self_label(Tensor weak, Tensor strong, float threshold, bool balance) -> (Tensor loss, Tensor n_confident)",
        &self_label);
  m.def(
      "self_label_forward(Tensor weak, Tensor strong, float threshold, bool balance) -> "
      "(Tensor loss, Tensor n_confident, Tensor target, Tensor row_weight, Tensor row_stats)");
  m.def(
      "self_label_backward(Tensor grad_loss, Tensor strong, Tensor target, Tensor row_weight, Tensor row_stats) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, m) {
  m.impl("self_label_forward", &self_label_forward);
  m.impl("self_label_backward", &self_label_backward);
}

#ifdef SCAN_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(scan_fast, CUDA, m) {
  m.impl("self_label_forward", &self_label_forward);
  m.impl("self_label_backward", &self_label_backward);
}
#endif

}  // namespace scan_fast
