// Interface of the NT-Xent kernels (SimCLR, arXiv 2002.05709, equation 1). Raw pointers, no torch header.
//
//   u_i = x_i / max(|x_i|, 1e-12)      the M = 2N rows of z0, then of z1
//   s_ij = u_i . u_j / tau             p(i) = (i + N) mod M is the other view of row i
//   loss_i = log sum_{j != i} exp(s_ij) - s_{i,p(i)}
//
// The anchors are all M rows or the N rows of z0; the columns are always all M rows. A call handles the samples
// [sample_begin, sample_begin + sample_count) of both views. So a rank of a distributed run computes its own rows
// against the columns of all ranks with the same kernels.
//
// Saved for the backward pass: the unit rows, 1 / max(|x|, 1e-12), and per anchor the loss and
//   shifted_lse_i = log sum_{j != i} exp(s_ij) - 1/tau,
// which is at most log(M). Computing one of the two from the other would cancel if the loss is small or large. With g_i
// the upstream gradient of loss_i (zero if i is not an anchor):
//   du_i = 1/tau * [ sum_{j != i, p(i)} W_ij u_j + c_i u_p(i) ]
//   W_ij = exp(s_ij - lse_i) g_i + exp(s_ij - lse_j) g_j        (symmetric)
//   c_i = expm1(-loss_i) g_i + expm1(-loss_p(i)) g_p(i)         (positive pair, kept apart: its terms nearly cancel)
//   dx_i = (du_i - u_i (u_i . du_i)) / |x_i|, or du_i / 1e-12 if |x_i| < 1e-12
// The gradient of a row needs only the lse and g of all anchors, so no gradient is communicated between ranks.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace scan_fast {

struct NTXentProblem {
  int64_t samples;       // N >= 1
  int64_t dim;           // D >= 1
  double temperature;    // > 0
  bool both_anchors;     // true: anchors are all 2N rows; false: the first N
  int64_t sample_begin;  // first sample of this call
  int64_t sample_count;

  int64_t rows() const { return 2 * samples; }
  int64_t anchors() const { return both_anchors ? 2 * samples : samples; }
  int64_t local_anchors() const { return both_anchors ? 2 * sample_count : sample_count; }
};

// unit: (2N, D), inv_norm: (2N,). z0 and z1: (N, D) contiguous float32.
void nt_xent_normalize_cpu(const NTXentProblem& problem, const float* z0, const float* z1, float* unit,
                           float* inv_norm);

// losses and shifted_lse: local_anchors() values, first of the handled samples' first views, then with both_anchors of
// their second views. `reduced` rounds the operands of the products to bfloat16 if cpu_gemm_has_bf16() or
// cpu_multiplies_bf16_vectors(); otherwise it is ignored.
void nt_xent_forward_cpu(const NTXentProblem& problem, const float* unit, bool reduced, float* losses,
                         float* shifted_lse);

// grad_losses, losses and shifted_lse: anchors() values, of all samples. grad_z0 and grad_z1: (sample_count, D)
// float32.
void nt_xent_backward_cpu(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                          const float* shifted_lse, const float* grad_losses, bool reduced, float* grad_z0,
                          float* grad_z1);

// Upstream gradient: the gradient of anchor i's loss is gradient[i * stride]. The backward pass of a mean has one value
// for all anchors, with stride 0.
struct NTXentUpstream {
  const float* gradient;
  int64_t stride;
};

// The same on the GPU, on the given stream. z0 and z1 are (N, D), contiguous, of the given dtype; grad_z0 and grad_z1
// are (sample_count, D) of the given dtype. `reduced` uses one 16-bit product per similarity; otherwise three of them,
// for float32 accuracy. The functions below return the size of the workspace in bytes; it must be aligned to 256.
int64_t nt_xent_forward_cuda_workspace(const NTXentProblem& problem, bool reduced);
int64_t nt_xent_backward_cuda_workspace(const NTXentProblem& problem, bool reduced);
void nt_xent_forward_cuda(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream);
void nt_xent_backward_cuda(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const NTXentUpstream& grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream);

// The same on a GPU of compute capability 9.0 (nt_xent_sm90.cu), for problems that nt_xent_sm90_covers accepts:
//   temperature >= 0.03 and D <= 1024.
// N, sample_begin, sample_count and both_anchors do not matter. Kernels launched, by name:
//              sm_90a                                     portable
//   forward    forward_sm90_kernel<Products<...>>         forward_kernel<...>, twice for temperatures below 0.03
//   backward   backward_sm90_kernel<BackwardTiles<...>>   backward_kernel<...>
//              D > 256, or D > 128 without `reduced`:     D > 128: weights_kernel, gather_kernel
//              transpose_kernel, store_weights_sm90_kernel, gather_sm90_kernel
//   both       prepare_forward_kernel, collect_kernel, prepare_backward_kernel, largest_gradient_kernel (not always),
//              finish_backward_kernel
bool nt_xent_sm90_covers(const NTXentProblem& problem, bool reduced);
int64_t nt_xent_forward_sm90_workspace(const NTXentProblem& problem, bool reduced);
int64_t nt_xent_backward_sm90_workspace(const NTXentProblem& problem, bool reduced);
void nt_xent_forward_sm90(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream);
void nt_xent_backward_sm90(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const NTXentUpstream& grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream);

// One set of GPU kernels.
struct NTXentGpuKernels {
  decltype(&nt_xent_forward_cuda_workspace) forward_workspace;
  decltype(&nt_xent_backward_cuda_workspace) backward_workspace;
  decltype(&nt_xent_forward_cuda) forward;
  decltype(&nt_xent_backward_cuda) backward;
};
inline constexpr NTXentGpuKernels kNTXentPortable{nt_xent_forward_cuda_workspace, nt_xent_backward_cuda_workspace,
                                                  nt_xent_forward_cuda, nt_xent_backward_cuda};
inline constexpr NTXentGpuKernels kNTXentSM90{nt_xent_forward_sm90_workspace, nt_xent_backward_sm90_workspace,
                                              nt_xent_forward_sm90, nt_xent_backward_sm90};

}  // namespace scan_fast
