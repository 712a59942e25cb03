// Dispatcher operators of the SCAN loss.
//
//   scan_loss           called by the public function: differentiable, made of the two below
//   scan_loss_forward   values, and tensors for the backward pass
//   scan_loss_backward  gradients
//
// Autograd is implemented here and not in Python: at the usual sizes (1024 x 10), the Python autograd layer costs more
// than both kernels. torch.compile traces through the node, so both kernels appear in the graph.
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <tuple>

#include "common/large_buffers.h"
#include "common/op_utils.h"
#include "common/scratch.h"
#include "scan_loss/scan_loss.h"

namespace scan_fast {
namespace {

// anchors, neighbors (B, C) or (H, B, C). Returns total, consistency, entropy (() or (H)), mean_prob ((H,) C) and
// row_stats ((H,) B, 6), all float32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_loss_forward(const at::Tensor& anchors,
                                                                                         const at::Tensor& neighbors,
                                                                                         double entropy_weight);

// Returns the gradients of anchors and neighbors, contiguous, in their dtype.
std::tuple<at::Tensor, at::Tensor> scan_loss_backward(const std::optional<at::Tensor>& grad_total,
                                                      const std::optional<at::Tensor>& grad_consistency,
                                                      const std::optional<at::Tensor>& grad_entropy,
                                                      const at::Tensor& anchors, const at::Tensor& neighbors,
                                                      const at::Tensor& mean_prob, const at::Tensor& row_stats,
                                                      double entropy_weight);

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ScanLossShape shape_of(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2 || logits.dim() == 3, "anchors must be (B, C) or (H, B, C), got shape ",
                    logits.sizes());
  const ScanLossShape shape{logits.dim() == 3 ? logits.size(0) : 1, logits.size(-2), logits.size(-1)};
  TORCH_CHECK_VALUE(shape.heads <= kMaxCount && shape.classes <= kMaxCount, "anchors may have at most ", kMaxCount,
                    " heads and classes, got shape ", logits.sizes());
  return shape;
}

auto forward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("scan_fast::scan_loss_forward", "")
                             .typed<decltype(scan_loss_forward)>();
  return op;
}

auto backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("scan_fast::scan_loss_backward", "")
                             .typed<decltype(scan_loss_backward)>();
  return op;
}

struct ScanLossNode : torch::autograd::Function<ScanLossNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const at::Tensor& anchors, const at::Tensor& neighbors,
                               double entropy_weight) {
    auto [total, consistency, entropy, mean_prob, row_stats] =
        forward_operator().call(anchors, neighbors, entropy_weight);
    context->save_for_backward({anchors, neighbors, mean_prob, row_stats});
    context->saved_data["entropy_weight"] = entropy_weight;
    context->set_materialize_grads(false);
    return {total, consistency, entropy};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    auto optional = [](const at::Tensor& t) { return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt; };
    auto [grad_anchors, grad_neighbors] =
        backward_operator().call(optional(gradients[0]), optional(gradients[1]), optional(gradients[2]), saved[0],
                                 saved[1], saved[2], saved[3], context->saved_data["entropy_weight"].toDouble());
    if (!context->needs_input_grad(0)) grad_anchors = at::Tensor();
    if (!context->needs_input_grad(1)) grad_neighbors = at::Tensor();
    variable_list result = once_differentiable({grad_anchors, grad_neighbors}, "scan_loss");
    result.emplace_back();
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> scan_loss(const at::Tensor& anchors, const at::Tensor& neighbors,
                                                         double entropy_weight) {
  if (at::GradMode::is_enabled() && (anchors.requires_grad() || neighbors.requires_grad())) {
    const variable_list result = ScanLossNode::apply(anchors, neighbors, entropy_weight);
    return {result[0], result[1], result[2]};
  }
  auto [total, consistency, entropy, mean_prob, row_stats] =
      forward_operator().call(anchors, neighbors, entropy_weight);
  return {total, consistency, entropy};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_loss_forward(const at::Tensor& anchors,
                                                                                         const at::Tensor& neighbors,
                                                                                         double entropy_weight) {
  check_pair(anchors, neighbors, "anchors", "neighbors");
  const ScanLossShape shape = shape_of(anchors);
  const DType dtype = dtype_of(anchors, "anchors");
  check_finite(entropy_weight, "entropy_weight");
  const auto a = dense(anchors, "anchors"), n = dense(neighbors, "neighbors");
  const auto options = anchors.options().dtype(at::kFloat);
  const bool batched = anchors.dim() == 3;
  auto with = [&](std::initializer_list<int64_t> sizes) {
    at::DimVector all;
    if (batched) all.push_back(shape.heads);
    all.append(sizes);
    return at::empty(all, options);
  };
  at::Tensor total = with({}), consistency = with({}), entropy = with({});
  at::Tensor mean_prob = with({shape.classes}), row_stats = with({shape.rows, kScanLossRowStats});
  ScanLossForward arguments{a->const_data_ptr(),
                            n->const_data_ptr(),
                            total.data_ptr<float>(),
                            consistency.data_ptr<float>(),
                            entropy.data_ptr<float>(),
                            mean_prob.data_ptr<float>(),
                            row_stats.data_ptr<float>(),
                            nullptr,
                            static_cast<float>(entropy_weight)};
#ifdef SCAN_FAST_WITH_CUDA
  if (anchors.is_cuda()) {
    const c10::cuda::CUDAGuard guard(anchors.device());
    const at::Tensor workspace =
        at::empty({static_cast<int64_t>(scan_loss_cuda_workspace(shape))}, anchors.options().dtype(at::kByte));
    arguments.workspace = workspace.data_ptr();
    scan_loss_forward_cuda(dtype, shape, arguments, current_stream());
    return {total, consistency, entropy, mean_prob, row_stats};
  }
#endif
  const Scratch<char> workspace(static_cast<int64_t>(scan_loss_cpu_workspace(shape)));
  arguments.workspace = workspace.get();
  scan_loss_forward_cpu(dtype, shape, arguments);
  return {total, consistency, entropy, mean_prob, row_stats};
}

std::tuple<at::Tensor, at::Tensor> scan_loss_backward(const std::optional<at::Tensor>& grad_total,
                                                      const std::optional<at::Tensor>& grad_consistency,
                                                      const std::optional<at::Tensor>& grad_entropy,
                                                      const at::Tensor& anchors, const at::Tensor& neighbors,
                                                      const at::Tensor& mean_prob, const at::Tensor& row_stats,
                                                      double entropy_weight) {
  check_pair(anchors, neighbors, "anchors", "neighbors");
  const ScanLossShape shape = shape_of(anchors);
  const DType dtype = dtype_of(anchors, "anchors");
  check_finite(entropy_weight, "entropy_weight");
  // As scan_loss_forward returned them for these logits.
  const int64_t of_classes[] = {shape.heads, shape.classes}, of_rows[] = {shape.heads, shape.rows, kScanLossRowStats};
  const size_t skipped = anchors.dim() == 3 ? 0 : 1;
  const at::Device device = anchors.device();
  const auto means =
      checked_values(mean_prob, "mean_prob", at::IntArrayRef(of_classes).slice(skipped), at::kFloat, device);
  const auto stats =
      checked_values(row_stats, "row_stats", at::IntArrayRef(of_rows).slice(skipped), at::kFloat, device);
  const auto a = dense(anchors, "anchors"), n = dense(neighbors, "neighbors");
  at::Tensor grad_anchors = empty_large(anchors.sizes(), anchors.options());
  at::Tensor grad_neighbors = empty_large(anchors.sizes(), anchors.options());
  at::Tensor holders[3];
  const ScanLossBackward arguments{
      gradient_pointer(grad_total, "grad_total", shape.heads, device, holders[0]),
      gradient_pointer(grad_consistency, "grad_consistency", shape.heads, device, holders[1]),
      gradient_pointer(grad_entropy, "grad_entropy", shape.heads, device, holders[2]),
      a->const_data_ptr(),
      n->const_data_ptr(),
      means->const_data_ptr<float>(),
      stats->const_data_ptr<float>(),
      grad_anchors.data_ptr(),
      grad_neighbors.data_ptr(),
      static_cast<float>(entropy_weight)};
#ifdef SCAN_FAST_WITH_CUDA
  if (anchors.is_cuda()) {
    const c10::cuda::CUDAGuard guard(anchors.device());
    scan_loss_backward_cuda(dtype, shape, arguments, current_stream());
    return {grad_anchors, grad_neighbors};
  }
#endif
  scan_loss_backward_cpu(dtype, shape, arguments);
  return {grad_anchors, grad_neighbors};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(scan_fast, m) {
  m.def(
      "scan_loss(Tensor anchors, Tensor neighbors, float entropy_weight) -> "
      "(Tensor total, Tensor consistency, Tensor entropy)",
      &scan_loss);
  m.def(
      "scan_loss_forward(Tensor anchors, Tensor neighbors, float entropy_weight) -> "
      "(Tensor total, Tensor consistency, Tensor entropy, Tensor mean_prob, Tensor row_stats)");
  m.def(
      "scan_loss_backward(Tensor? grad_total, Tensor? grad_consistency, Tensor? grad_entropy, Tensor anchors, "
      "Tensor neighbors, Tensor mean_prob, Tensor row_stats, float entropy_weight) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, m) {
  m.impl("scan_loss_forward", &scan_loss_forward);
  m.impl("scan_loss_backward", &scan_loss_backward);
}

#ifdef SCAN_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(scan_fast, CUDA, m) {
  m.impl("scan_loss_forward", &scan_loss_forward);
  m.impl("scan_loss_backward", &scan_loss_backward);
}
#endif

}  // namespace scan_fast
