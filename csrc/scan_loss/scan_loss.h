// Interface of the SCAN loss kernels, forward and backward, for H heads.
//
// With logits a (anchors) and n (neighbours) of one head, (B, C) row-major, p = softmax(a), q = softmax(n):
//   consistency = mean_i -log <p_i, q_i>           computed as lse(a) + lse(n) - lse(a + n)
//   m = mean_i p_i;  entropy = -sum_c max(m_c, 1e-8) log max(m_c, 1e-8)
//   total = consistency - entropy_weight * entropy
// Heads are contiguous, (H, B, C). All sums are float32, in an order that depends only on the shape.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

constexpr float kScanLossFloor = 1e-8f;  // lower bound of the mean prediction in the entropy

// Saved for the backward pass, per row: max a, 1 / sum e^(a - max a), max n, 1 / sum e^(n - max n), and the joint shift
// M and 1 / sum e^(a - max a + n - max n - M). M is 0 unless the sum would then be below kScanLossUnderflow; in such
// rows it is the largest exponent of a summand. Each device has its own layout.
constexpr int kScanLossRowStats = 6;
constexpr float kScanLossUnderflow = 1e-25f;

struct ScanLossShape {
  int64_t heads, rows, classes;
};

struct ScanLossForward {
  const void* anchors;    // (H, B, C) of dtype
  const void* neighbors;  // (H, B, C) of dtype
  float* total;           // (H)
  float* consistency;     // (H)
  float* entropy;         // (H)
  float* mean_prob;       // (H, C)
  float* row_stats;       // (H, B, kScanLossRowStats)
  void* workspace;        // scan_loss_*_workspace(shape) bytes, any content
  float entropy_weight;
};

struct ScanLossBackward {
  const float* grad_total;  // (H), or null for zero; the same holds for the next two
  const float* grad_consistency;
  const float* grad_entropy;
  const void* anchors;
  const void* neighbors;
  const float* mean_prob;
  const float* row_stats;
  void* grad_anchors;    // (H, B, C) of dtype
  void* grad_neighbors;  // (H, B, C) of dtype
  float entropy_weight;
};

size_t scan_loss_cpu_workspace(const ScanLossShape& shape);
void scan_loss_forward_cpu(DType dtype, const ScanLossShape& shape, const ScanLossForward& arguments);
void scan_loss_backward_cpu(DType dtype, const ScanLossShape& shape, const ScanLossBackward& arguments);

// These run on the current device. They throw std::runtime_error if CUDA refuses a launch.
size_t scan_loss_cuda_workspace(const ScanLossShape& shape);
void scan_loss_forward_cuda(DType dtype, const ScanLossShape& shape, const ScanLossForward& arguments,
                            StreamHandle stream);
void scan_loss_backward_cuda(DType dtype, const ScanLossShape& shape, const ScanLossBackward& arguments,
                             StreamHandle stream);

}  // namespace scan_fast
