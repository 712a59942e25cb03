// torch.ops.scan_fast.nt_xent_forward and nt_xent_backward: tensors in, tensors out.
#include <ATen/Context.h>
#include <torch/library.h>
#include <torch/types.h>

#include <tuple>

#include "nt_xent/nt_xent.h"

namespace scan_fast {
namespace {

using torch::Tensor;

// torch.set_float32_matmul_precision("medium") allows bfloat16 products, here as in torch.matmul.
bool reduced_precision() { return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM; }

NTXentProblem make_problem(int64_t samples, int64_t dim, double temperature, bool both_anchors, int64_t sample_begin,
                           int64_t sample_count) {
  TORCH_CHECK_VALUE(samples >= 1 && dim >= 1, "z0 and z1 must hold at least one row and one column");
  TORCH_CHECK_VALUE(temperature > 0, "temperature must be positive, got ", temperature);
  TORCH_CHECK_VALUE(sample_begin >= 0 && sample_count >= 1 && sample_begin + sample_count <= samples,
                    "samples [", sample_begin, ", ", sample_begin + sample_count, ") are not within [0, ", samples, ")");
  return {samples, dim, temperature, both_anchors, sample_begin, sample_count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& z0, const Tensor& z1, double temperature,
                                                       bool both_anchors, int64_t sample_begin, int64_t sample_count) {
  TORCH_CHECK_VALUE(z0.dim() == 2 && z0.sizes() == z1.sizes(), "z0 and z1 must have one shape (N, D), got ", z0.sizes(),
                    " and ", z1.sizes());
  const NTXentProblem problem =
      make_problem(z0.size(0), z0.size(1), temperature, both_anchors, sample_begin, sample_count);
  const Tensor x0 = z0.to(torch::kFloat).contiguous(), x1 = z1.to(torch::kFloat).contiguous();
  const auto options = x0.options().requires_grad(false);
  Tensor unit = torch::empty({problem.rows(), problem.dim}, options), inv_norm = torch::empty({problem.rows()}, options);
  Tensor losses = torch::empty({problem.local_anchors()}, options), lse = torch::empty_like(losses);
  nt_xent_normalize_cpu(problem, x0.const_data_ptr<float>(), x1.const_data_ptr<float>(), unit.data_ptr<float>(),
                        inv_norm.data_ptr<float>());
  nt_xent_forward_cpu(problem, unit.const_data_ptr<float>(), reduced_precision(), losses.data_ptr<float>(),
                      lse.data_ptr<float>());
  return {losses, lse, unit, inv_norm};
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_losses, const Tensor& losses, const Tensor& lse,
                                        const Tensor& unit, const Tensor& inv_norm, double temperature,
                                        bool both_anchors, int64_t sample_begin, int64_t sample_count,
                                        torch::ScalarType dtype) {
  const NTXentProblem problem =
      make_problem(unit.size(0) / 2, unit.size(1), temperature, both_anchors, sample_begin, sample_count);
  for (const Tensor& values : {grad_losses, losses, lse}) {
    TORCH_CHECK_VALUE(values.numel() == problem.anchors(), "grad_losses, losses and lse must hold the ",
                      problem.anchors(), " anchors, got ", values.sizes());
  }
  const Tensor g = grad_losses.to(torch::kFloat).contiguous(), loss = losses.contiguous(), l = lse.contiguous();
  const Tensor u = unit.contiguous(), inv = inv_norm.contiguous();
  Tensor grad_z0 = torch::empty({sample_count, problem.dim}, u.options()), grad_z1 = torch::empty_like(grad_z0);
  nt_xent_backward_cpu(problem, u.const_data_ptr<float>(), inv.const_data_ptr<float>(), loss.const_data_ptr<float>(),
                       l.const_data_ptr<float>(), g.const_data_ptr<float>(), reduced_precision(),
                       grad_z0.data_ptr<float>(), grad_z1.data_ptr<float>());
  return {grad_z0.to(dtype), grad_z1.to(dtype)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(scan_fast, library) {
  library.def(
      "nt_xent_forward(Tensor z0, Tensor z1, float temperature, bool both_anchors, int sample_begin, int sample_count)"
      " -> (Tensor losses, Tensor lse, Tensor unit, Tensor inv_norm)");
  library.def(
      "nt_xent_backward(Tensor grad_losses, Tensor losses, Tensor lse, Tensor unit, Tensor inv_norm,"
      " float temperature, bool both_anchors, int sample_begin, int sample_count, ScalarType dtype) -> (Tensor grad_z0, Tensor grad_z1)");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, library) {
  library.impl("nt_xent_forward", &forward_cpu);
  library.impl("nt_xent_backward", &backward_cpu);
}

}  // namespace scan_fast
