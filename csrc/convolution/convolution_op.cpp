// Dispatcher operators of the convolutions: differentiable, made of conv2d_forward, conv2d_grad_input and
// conv2d_grad_weight.
//
//   conv2d        returns y
//   conv2d_grad_weight_float32    not differentiable: the weight gradient of a convolution of PyTorch
//   conv2d_fork   returns y, and x itself for a shortcut around the convolution. The gradient of the shortcut is added
//                 when that of the convolution is stored; autograd would write, read and add whole images
#include "convolution/convolution.h"

#include <torch/csrc/autograd/custom_function.h>

#include "common/op_utils.h"

namespace scan_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kMostSide = 4096;              // of kernel, stride and padding
constexpr int64_t kMostSize = int64_t{1} << 40;  // of any dimension; with kMostSide, sums of both cannot overflow

ConvolutionShape shape_of(at::IntArrayRef x, at::IntArrayRef weight, int64_t stride, int64_t padding) {
  for (const at::IntArrayRef sizes : {x, weight}) {
    for (const int64_t size : sizes) {
      TORCH_CHECK_VALUE(size >= 0 && size <= kMostSize, "sizes must be from 0 to ", kMostSize, ", got shape ", sizes);
    }
  }
  TORCH_CHECK_VALUE(x.size() == 4 && weight.size() == 4 && x[1] == weight[1] && weight[2] == weight[3],
                    "x must be (N, C, H, W) and weight (O, C, k, k), got shapes ", x, " and ", weight);
  TORCH_CHECK_VALUE(weight[2] <= kMostSide, "kernel must be at most ", kMostSide, ", got ", weight[2]);
  TORCH_CHECK_VALUE(stride >= 1 && padding >= 0 && stride <= kMostSide && padding <= kMostSide,
                    "stride must be at least 1 and padding 0, and both at most ", kMostSide, ", got ", stride, " and ",
                    padding);
  auto out = [&](int64_t in) { return (in + 2 * padding - weight[2]) / stride + 1; };
  return {x[0], x[2], x[3], x[1], out(x[2]), out(x[3]), weight[0], weight[2], stride, padding};
}

// Returns whether the kernel fits into the padded image.
bool fits(const ConvolutionShape& shape) {
  return shape.in_height + 2 * shape.padding >= shape.kernel && shape.in_width + 2 * shape.padding >= shape.kernel;
}

void check_tensors(std::initializer_list<std::pair<const at::Tensor*, const char*>> tensors) {
  for (const auto& [tensor, name] : tensors) check_readable(*tensor, name);
}

ConvolutionShape checked(at::IntArrayRef x, at::IntArrayRef weight, int64_t stride, int64_t padding) {
  const ConvolutionShape shape = shape_of(x, weight, stride, padding);
  TORCH_CHECK_VALUE(fits(shape), "the kernel must not be larger than the padded image, got shapes ", x, " and ", weight,
                    " with padding ", padding);
  TORCH_CHECK_VALUE(convolution_is_usable(shape), "there is no kernel for shapes ", x, " and ", weight,
                    " on this CPU: it needs AMX or AVX-512-BF16, and channels that are multiples of 32");
  return shape;
}

// Bfloat16 images as the kernels read them.
c10::MaybeOwned<at::Tensor> images(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kBFloat16 && tensor.is_contiguous(at::MemoryFormat::ChannelsLast), name,
                    " must be bfloat16 in channels-last layout, got ", tensor.scalar_type(), " with strides ",
                    tensor.strides());
  return aligned(tensor, name);
}

const uint16_t* words(const c10::MaybeOwned<at::Tensor>& tensor) {
  return static_cast<const uint16_t*>(tensor->const_data_ptr());
}

c10::MaybeOwned<at::Tensor> float_values(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(at::MemoryFormat::ChannelsLast), name,
                    " must be float32 in channels-last layout, got ", tensor.scalar_type(), " with strides ",
                    tensor.strides());
  return aligned(tensor, name);
}

at::Tensor like(const at::Tensor& tensor, at::IntArrayRef sizes) {
  return at::empty(sizes, tensor.options(), at::MemoryFormat::ChannelsLast);
}

// Workspace aligned to a cache line.
class Workspace {
 public:
  Workspace(const ConvolutionShape& shape, ConvolutionPass pass)
      : memory_(at::empty({static_cast<int64_t>(convolution_workspace(shape, pass)) + 64}, at::kByte)) {}
  void* get() const {
    auto* start = static_cast<char*>(memory_.data_ptr());
    return start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64;
  }

 private:
  at::Tensor memory_;
};

at::Tensor conv2d_forward(const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t padding) {
  check_tensors({{&x, "x"}, {&weight, "weight"}});
  const ConvolutionShape shape = checked(x.sizes(), weight.sizes(), stride, padding);
  const auto of_x = images(x, "x"), of_weight = float_values(weight, "weight");
  at::Tensor y = like(x, {shape.batch, shape.out_channels, shape.out_height, shape.out_width});
  const Workspace workspace(shape, ConvolutionPass::kForward);
  convolution_forward(shape, words(of_x), of_weight->const_data_ptr<float>(), static_cast<uint16_t*>(y.data_ptr()),
                      workspace.get());
  return y;
}

void check_gradient(const at::Tensor& grad_y, const ConvolutionShape& shape) {
  const int64_t sizes[] = {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
  TORCH_CHECK_VALUE(grad_y.sizes() == at::IntArrayRef(sizes), "grad_y must have shape ", at::IntArrayRef(sizes),
                    ", got ", grad_y.sizes());
}

at::Tensor conv2d_grad_input(const at::Tensor& grad_y, const at::Tensor& weight,
                             const std::optional<at::Tensor>& addend, at::IntArrayRef sizes, int64_t stride,
                             int64_t padding) {
  check_tensors({{&grad_y, "grad_y"}, {&weight, "weight"}});
  const ConvolutionShape shape = checked(sizes, weight.sizes(), stride, padding);
  check_gradient(grad_y, shape);
  const bool adds = addend.has_value() && addend->defined();
  if (adds) check_readable(*addend, "addend");
  TORCH_CHECK_VALUE(!adds || addend->sizes() == sizes, "addend must have shape ", sizes, ", got ", addend->sizes());
  const auto of_y = images(grad_y, "grad_y"), of_weight = float_values(weight, "weight");
  const auto added = adds ? images(*addend, "addend") : c10::MaybeOwned<at::Tensor>();
  at::Tensor grad_x = like(grad_y, sizes);
  const Workspace workspace(shape, ConvolutionPass::kGradInput);
  convolution_grad_input(shape, words(of_y), of_weight->const_data_ptr<float>(), adds ? words(added) : nullptr,
                         static_cast<uint16_t*>(grad_x.data_ptr()), workspace.get());
  return grad_x;
}

at::Tensor conv2d_grad_weight(const at::Tensor& grad_y, const at::Tensor& x, int64_t kernel, int64_t stride,
                              int64_t padding) {
  check_tensors({{&grad_y, "grad_y"}, {&x, "x"}});
  TORCH_CHECK_VALUE(grad_y.dim() == 4 && x.dim() == 4, "grad_y and x must be images, got shapes ", grad_y.sizes(),
                    " and ", x.sizes());
  const int64_t sizes[] = {grad_y.size(1), x.size(1), kernel, kernel};
  const ConvolutionShape shape = checked(x.sizes(), sizes, stride, padding);
  check_gradient(grad_y, shape);
  const auto of_y = images(grad_y, "grad_y"), of_x = images(x, "x");
  at::Tensor grad_weight = at::empty(sizes, x.options().dtype(at::kFloat), at::MemoryFormat::ChannelsLast);
  const Workspace workspace(shape, ConvolutionPass::kGradWeight);
  convolution_grad_weight(shape, words(of_y), words(of_x), grad_weight.data_ptr<float>(), workspace.get());
  return grad_weight;
}

// The weight gradient of a float32 convolution, on any CPU.
at::Tensor conv2d_grad_weight_float32(const at::Tensor& grad_y, const at::Tensor& x, int64_t kernel, int64_t stride,
                                      int64_t padding) {
  check_tensors({{&grad_y, "grad_y"}, {&x, "x"}});
  TORCH_CHECK_VALUE(grad_y.dim() == 4 && x.dim() == 4, "grad_y and x must be images, got shapes ", grad_y.sizes(),
                    " and ", x.sizes());
  TORCH_CHECK_VALUE(kernel >= 1, "kernel must be at least 1, got ", kernel);
  const int64_t sizes[] = {grad_y.size(1), x.size(1), kernel, kernel};
  const ConvolutionShape shape = shape_of(x.sizes(), sizes, stride, padding);
  TORCH_CHECK_VALUE(x.numel() > 0 && shape.out_channels > 0 && fits(shape),
                    "x must not be empty, nor smaller than the kernel, got shape ", x.sizes(), " for a kernel of ",
                    kernel, " with padding ", padding);
  check_gradient(grad_y, shape);
  const auto of_y = float_values(grad_y, "grad_y"), of_x = float_values(x, "x");
  at::Tensor grad_weight = at::empty(sizes, x.options(), at::MemoryFormat::ChannelsLast);
  convolution_grad_weight_float32(shape, of_y->const_data_ptr<float>(), of_x->const_data_ptr<float>(),
                                  grad_weight.data_ptr<float>());
  return grad_weight;
}

template <typename Function>
auto operator_of(const char* name, Function*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

at::Tensor as_images(const at::Tensor& gradient) {
  return gradient.to(at::kBFloat16).contiguous(at::MemoryFormat::ChannelsLast);
}

struct ConvolutionNode : torch::autograd::Function<ConvolutionNode> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight, int64_t stride,
                               int64_t padding, bool fork) {
    static const auto op = operator_of("scan_fast::conv2d_forward", &conv2d_forward);
    context->save_for_backward({x, weight});
    context->saved_data["stride"] = stride;
    context->saved_data["padding"] = padding;
    context->set_materialize_grads(false);
    const at::Tensor y = op.call(x, weight, stride, padding);
    // Another tensor on the same memory, whose gradient arrives at this node.
    if (fork) return {y, x.variable_data()};
    return {y};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static const auto grad_input = operator_of("scan_fast::conv2d_grad_input", &conv2d_grad_input);
    static const auto grad_weight = operator_of("scan_fast::conv2d_grad_weight", &conv2d_grad_weight);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const int64_t stride = context->saved_data["stride"].toInt(), padding = context->saved_data["padding"].toInt();
    std::optional<at::Tensor> around;
    if (gradients.size() > 1 && gradients[1].defined()) around = as_images(gradients[1]);
    variable_list result(2);
    if (!gradients[0].defined()) {
      if (around.has_value() && context->needs_input_grad(0)) result[0] = *around;
    } else {
      const at::Tensor grad_y = as_images(gradients[0]);
      if (context->needs_input_grad(0)) result[0] = grad_input.call(grad_y, weight, around, x.sizes(), stride, padding);
      if (context->needs_input_grad(1)) result[1] = grad_weight.call(grad_y, x, weight.size(2), stride, padding);
    }
    result = once_differentiable(std::move(result), "conv2d");
    result.resize(5);
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> convolve(const at::Tensor& x, const at::Tensor& weight, int64_t stride,
                                            int64_t padding, bool fork) {
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad())) {
    const variable_list result = ConvolutionNode::apply(x, weight, stride, padding, fork && x.requires_grad());
    return {result[0], result.size() > 1 ? result[1] : x};
  }
  static const auto op = operator_of("scan_fast::conv2d_forward", &conv2d_forward);
  return {op.call(x, weight, stride, padding), x};
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t padding) {
  return std::get<0>(convolve(x, weight, stride, padding, false));
}

std::tuple<at::Tensor, at::Tensor> conv2d_fork(const at::Tensor& x, const at::Tensor& weight, int64_t stride,
                                               int64_t padding) {
  return convolve(x, weight, stride, padding, true);
}

// Returns whether the operators support these shapes on this CPU.
bool conv2d_is_usable(at::IntArrayRef x, at::IntArrayRef weight, int64_t stride, int64_t padding) {
  const ConvolutionShape shape = shape_of(x, weight, stride, padding);
  return fits(shape) && convolution_is_usable(shape);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(scan_fast, m) {
  m.def("conv2d(Tensor x, Tensor weight, int stride, int padding) -> Tensor", &conv2d);
  m.def("conv2d_fork(Tensor(a) x, Tensor weight, int stride, int padding) -> (Tensor y, Tensor(a) x)", &conv2d_fork);
  m.def("conv2d_is_usable(int[] x, int[] weight, int stride, int padding) -> bool", &conv2d_is_usable);
  m.def("conv2d_forward(Tensor x, Tensor weight, int stride, int padding) -> Tensor");
  m.def(
      "conv2d_grad_input(Tensor grad_y, Tensor weight, Tensor? addend, int[] sizes, int stride, int padding) -> "
      "Tensor");
  m.def("conv2d_grad_weight(Tensor grad_y, Tensor x, int kernel, int stride, int padding) -> Tensor");
  m.def("conv2d_grad_weight_float32(Tensor grad_y, Tensor x, int kernel, int stride, int padding) -> Tensor");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, m) {
  m.impl("conv2d_forward", &conv2d_forward);
  m.impl("conv2d_grad_input", &conv2d_grad_input);
  m.impl("conv2d_grad_weight", &conv2d_grad_weight);
  m.impl("conv2d_grad_weight_float32", &conv2d_grad_weight_float32);
}

}  // namespace scan_fast
