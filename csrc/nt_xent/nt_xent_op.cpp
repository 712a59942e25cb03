// Tensor layer of NT-Xent: torch.ops.scan_fast.nt_xent_forward and nt_xent_backward.
#include <ATen/Context.h>
#include <torch/library.h>
#include <torch/types.h>

#include <cmath>
#include <tuple>

#if defined(SCAN_FAST_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "common/large_buffers.h"
#include "common/op_checks.h"
#include "common/sm90_switch.h"
#include "nt_xent/nt_xent.h"

namespace scan_fast {
namespace {

using torch::Tensor;

at::Float32Precision matmul_precision(at::Float32Backend backend) {
  return at::globalContext().float32Precision(backend, at::Float32Op::MATMUL);
}

// Returns whether float32 products may be rounded to 16 bits, as in torch.matmul.
// set_float32_matmul_precision("medium") and torch.backends.mkldnn.matmul.fp32_precision = "bf16" allow it.
// Context::float32MatmulPrecision() knows only the first. It throws if a setting of the fp32_precision API is in use,
// such as cuda.matmul.fp32_precision = "tf32".
bool reduced_on_cpu() { return matmul_precision(at::Float32Backend::MKLDNN) == at::Float32Precision::BF16; }

constexpr double kLeastTemperature = 1e-8;  // as in Python: 1 / temperature must be far from the end of float32

NTXentProblem make_problem(int64_t samples, int64_t dim, double temperature, bool both_anchors, int64_t sample_begin,
                           int64_t sample_count) {
  TORCH_CHECK_VALUE(samples >= 1 && dim >= 1, "z0 and z1 must hold at least one row and one column, got (", samples,
                    ", ", dim, ")");
  TORCH_CHECK_VALUE(samples <= kMaxCount / 2 && dim <= kMaxCount, "z0 and z1 may hold at most ", kMaxCount / 2,
                    " rows and ", kMaxCount, " columns, got (", samples, ", ", dim, ")");
  TORCH_CHECK_VALUE(temperature >= kLeastTemperature && std::isfinite(temperature),
                    "temperature must be finite and at least 1e-8, got ", temperature);
  // A sum of two hostile integers could overflow, their difference cannot.
  TORCH_CHECK_VALUE(
      sample_begin >= 0 && sample_count >= 1 && sample_begin < samples && sample_count <= samples - sample_begin,
      "sample_begin and sample_count must be a part of the ", samples, " samples, got ", sample_begin, " and ",
      sample_count);
  return {samples, dim, temperature, both_anchors, sample_begin, sample_count};
}

void check_dtype(torch::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == torch::kFloat || dtype == torch::kBFloat16 || dtype == torch::kHalf,
                    "there is no kernel for ", dtype, "; use float32, bfloat16 or float16");
}

NTXentProblem forward_problem(const Tensor& z0, const Tensor& z1, double temperature, bool both_anchors,
                              int64_t sample_begin, int64_t sample_count) {
  check_readable(z0, "z0");
  check_readable(z1, "z1");
  TORCH_CHECK_VALUE(z0.dim() == 2 && z0.sizes() == z1.sizes(), "z0 and z1 must have one shape (N, D), got ", z0.sizes(),
                    " and ", z1.sizes());
  TORCH_CHECK_VALUE(z0.device() == z1.device() && z0.scalar_type() == z1.scalar_type(),
                    "z0 and z1 must share one device and dtype, got ", z0.device(), " ", z0.scalar_type(), " and ",
                    z1.device(), " ", z1.scalar_type());
  check_dtype(z0.scalar_type());
  return make_problem(z0.size(0), z0.size(1), temperature, both_anchors, sample_begin, sample_count);
}

// Inputs of the backward pass, checked and in the layout of the kernels.
struct BackwardInputs {
  NTXentProblem problem;
  Tensor grad_losses;  // strides as given
  Tensor losses, lse, unit, inv_norm;
};

// A single gradient expanded to all anchors, as in the backward pass of a mean, is not copied.
bool is_single(const Tensor& gradient) { return gradient.dim() == 1 && gradient.stride(0) == 0; }

Tensor upstream_of(const Tensor& grad_losses, int64_t anchors, const at::Device& device) {
  if (grad_losses.defined() && is_single(grad_losses) && grad_losses.size(0) == anchors &&
      grad_losses.scalar_type() == torch::kFloat && grad_losses.device() == device) {
    check_readable(grad_losses, "grad_losses");
    if (has_aligned_elements(grad_losses)) return grad_losses;
  }
  return checked_gradient(grad_losses, "grad_losses", anchors, device);
}

BackwardInputs backward_inputs(const Tensor& grad_losses, const Tensor& losses, const Tensor& lse, const Tensor& unit,
                               const Tensor& inv_norm, double temperature, bool both_anchors, int64_t sample_begin,
                               int64_t sample_count, torch::ScalarType dtype) {
  check_dtype(dtype);
  TORCH_CHECK_VALUE(unit.defined() && unit.dim() == 2 && unit.size(0) % 2 == 0 && unit.scalar_type() == torch::kFloat,
                    "unit must be the (2 N, D) float32 that nt_xent_forward returned, got ",
                    unit.defined() ? unit.sizes() : at::IntArrayRef(), " ", unit.scalar_type());
  const NTXentProblem problem =
      make_problem(unit.size(0) / 2, unit.size(1), temperature, both_anchors, sample_begin, sample_count);
  const int64_t anchors = problem.anchors();
  const auto device = unit.device();
  return {problem,
          upstream_of(grad_losses, anchors, device),
          *checked_values(losses, "losses", anchors, torch::kFloat, device),
          *checked_values(lse, "lse", anchors, torch::kFloat, device),
          *dense(unit, "unit"),
          *checked_values(inv_norm, "inv_norm", problem.rows(), torch::kFloat, device)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& z0, const Tensor& z1, double temperature,
                                                       bool both_anchors, int64_t sample_begin, int64_t sample_count) {
  const NTXentProblem problem = forward_problem(z0, z1, temperature, both_anchors, sample_begin, sample_count);
  const Tensor x0 = *dense(z0.to(torch::kFloat), "z0"), x1 = *dense(z1.to(torch::kFloat), "z1");
  const auto options = x0.options().requires_grad(false);
  Tensor unit = empty_large({problem.rows(), problem.dim}, options), inv_norm = torch::empty({problem.rows()}, options);
  Tensor losses = torch::empty({problem.local_anchors()}, options), lse = torch::empty_like(losses);
  nt_xent_normalize_cpu(problem, x0.const_data_ptr<float>(), x1.const_data_ptr<float>(), unit.data_ptr<float>(),
                        inv_norm.data_ptr<float>());
  nt_xent_forward_cpu(problem, unit.const_data_ptr<float>(), reduced_on_cpu(), losses.data_ptr<float>(),
                      lse.data_ptr<float>());
  return {losses, lse, unit, inv_norm};
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_losses, const Tensor& losses, const Tensor& lse,
                                        const Tensor& unit, const Tensor& inv_norm, double temperature,
                                        bool both_anchors, int64_t sample_begin, int64_t sample_count,
                                        torch::ScalarType dtype) {
  const BackwardInputs in = backward_inputs(grad_losses, losses, lse, unit, inv_norm, temperature, both_anchors,
                                            sample_begin, sample_count, dtype);
  const Tensor upstream = in.grad_losses.contiguous();
  Tensor grad_z0 = empty_large({sample_count, in.problem.dim}, in.unit.options());
  Tensor grad_z1 = empty_large(grad_z0.sizes(), in.unit.options());
  nt_xent_backward_cpu(in.problem, in.unit.const_data_ptr<float>(), in.inv_norm.const_data_ptr<float>(),
                       in.losses.const_data_ptr<float>(), in.lse.const_data_ptr<float>(),
                       upstream.const_data_ptr<float>(), reduced_on_cpu(), grad_z0.data_ptr<float>(),
                       grad_z1.data_ptr<float>());
  return {grad_z0.to(dtype), grad_z1.to(dtype)};
}

#if defined(SCAN_FAST_WITH_CUDA)

DType kernel_dtype(torch::ScalarType dtype) {
  switch (dtype) {
    case torch::kFloat: return DType::kFloat32;
    case torch::kBFloat16: return DType::kBFloat16;
    case torch::kHalf: return DType::kFloat16;
    default: TORCH_CHECK_VALUE(false, "there is no kernel for ", dtype, "; use float32, bfloat16 or float16");
  }
}

// For CUDA, PyTorch accepts only "ieee" and "tf32", so "medium" is recognised by the values that it sets for both
// backends. For 16-bit embeddings a single 16-bit product loses nothing.
bool reduced_on_gpu(torch::ScalarType dtype) {
  if (dtype != torch::kFloat) return true;
  return reduced_on_cpu() && matmul_precision(at::Float32Backend::CUDA) == at::Float32Precision::TF32;
}

#if defined(SCAN_FAST_WITH_SM90)
Sm90Switch sm90_switch("nt_xent");
#endif

NTXentGpuKernels gpu_kernels(const NTXentProblem& problem, bool reduced) {
#if defined(SCAN_FAST_WITH_SM90)
  if (sm90_switch.on() && nt_xent_sm90_covers(problem, reduced)) return kNTXentSM90;
#else
  static_cast<void>(problem);
  static_cast<void>(reduced);
#endif
  return kNTXentPortable;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& z0, const Tensor& z1, double temperature,
                                                        bool both_anchors, int64_t sample_begin, int64_t sample_count) {
  const NTXentProblem problem = forward_problem(z0, z1, temperature, both_anchors, sample_begin, sample_count);
  const c10::cuda::CUDAGuard guard(z0.device());
  const Tensor x0 = *dense(z0, "z0"), x1 = *dense(z1, "z1");
  const DType dtype = kernel_dtype(z0.scalar_type());
  const bool reduced = reduced_on_gpu(z0.scalar_type());
  const auto options = x0.options().dtype(torch::kFloat).requires_grad(false);
  Tensor unit = torch::empty({problem.rows(), problem.dim}, options),
         inv_norm = torch::empty({problem.rows()}, options);
  Tensor losses = torch::empty({problem.local_anchors()}, options), lse = torch::empty_like(losses);
  const NTXentGpuKernels kernels = gpu_kernels(problem, reduced);
  Tensor workspace = torch::empty({kernels.forward_workspace(problem, reduced)}, options.dtype(torch::kByte));
  kernels.forward(problem, x0.const_data_ptr(), x1.const_data_ptr(), dtype, reduced, losses.data_ptr<float>(),
                  lse.data_ptr<float>(), unit.data_ptr<float>(), inv_norm.data_ptr<float>(), workspace.data_ptr(),
                  c10::cuda::getCurrentCUDAStream().stream());
  return {losses, lse, unit, inv_norm};
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_losses, const Tensor& losses, const Tensor& lse,
                                         const Tensor& unit, const Tensor& inv_norm, double temperature,
                                         bool both_anchors, int64_t sample_begin, int64_t sample_count,
                                         torch::ScalarType dtype) {
  const BackwardInputs in = backward_inputs(grad_losses, losses, lse, unit, inv_norm, temperature, both_anchors,
                                            sample_begin, sample_count, dtype);
  const c10::cuda::CUDAGuard guard(in.unit.device());
  const DType out = kernel_dtype(dtype);
  const bool reduced = reduced_on_gpu(dtype);
  const bool single = is_single(in.grad_losses);
  const Tensor gradient = single ? in.grad_losses : in.grad_losses.contiguous();
  const NTXentUpstream upstream{gradient.const_data_ptr<float>(), single ? 0 : 1};
  Tensor grad_z0 = torch::empty({sample_count, in.problem.dim}, in.unit.options().dtype(dtype));
  Tensor grad_z1 = torch::empty_like(grad_z0);
  const NTXentGpuKernels kernels = gpu_kernels(in.problem, reduced);
  Tensor workspace =
      torch::empty({kernels.backward_workspace(in.problem, reduced)}, in.unit.options().dtype(torch::kByte));
  kernels.backward(in.problem, in.unit.const_data_ptr<float>(), in.inv_norm.const_data_ptr<float>(),
                   in.losses.const_data_ptr<float>(), in.lse.const_data_ptr<float>(), upstream, out, reduced,
                   grad_z0.data_ptr(), grad_z1.data_ptr(), workspace.data_ptr(),
                   c10::cuda::getCurrentCUDAStream().stream());
  return {grad_z0, grad_z1};
}

#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(scan_fast, library) {
  library.def(
      "nt_xent_forward(Tensor z0, Tensor z1, float temperature, bool both_anchors, int sample_begin, int sample_count)"
      " -> (Tensor losses, Tensor lse, Tensor unit, Tensor inv_norm)");
  library.def(
      "nt_xent_backward(Tensor grad_losses, Tensor losses, Tensor lse, Tensor unit, Tensor inv_norm,"
      " float temperature, bool both_anchors, int sample_begin, int sample_count, ScalarType dtype)"
      " -> (Tensor grad_z0, Tensor grad_z1)");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, library) {
  library.impl("nt_xent_forward", &forward_cpu);
  library.impl("nt_xent_backward", &backward_cpu);
}

#if defined(SCAN_FAST_WITH_CUDA)
TORCH_LIBRARY_IMPL(scan_fast, CUDA, library) {
  library.impl("nt_xent_forward", &forward_cuda);
  library.impl("nt_xent_backward", &backward_cuda);
}
#endif

}  // namespace scan_fast
