// CPU driver of the SCAN loss: assigns rows to tasks and combines partial sums.
//
// A task is a block of rows of one head, whose size depends only on the shape. Its column sums and its loss go to its
// own slot, and slots are added in order. So the bits do not depend on the number of threads.
#include <algorithm>
#include <functional>
#include <vector>

#include "common/parallel.h"
#include "scan_loss/scan_loss_cpu_kernel.h"

namespace scan_fast {
namespace {

// Large enough that the column sums of a block cost little beside its logits, small enough to occupy all threads.
constexpr int64_t kElementsPerBlock = 32 * 1024;

struct Blocks {
  int64_t rows_each, per_head;
};

Blocks blocks_of(const ScanLossShape& shape) {
  const int64_t rows_each =
      std::min(shape.rows, std::max<int64_t>(32, (kElementsPerBlock + shape.classes - 1) / shape.classes));
  return {rows_each, (shape.rows + rows_each - 1) / rows_each};
}

// Waking the threads costs as much as one block of work, so less than that runs on the calling thread.
void for_blocks(const ScanLossShape& shape, int64_t blocks, const std::function<void(int64_t, int)>& body) {
  if (shape.heads * shape.rows * shape.classes > kElementsPerBlock) return parallel_for(blocks, body);
  for (int64_t block = 0; block < blocks; ++block) body(block, 0);
}

size_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <typename Pointer>
Pointer advanced(Pointer base, int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(base) + elements * static_cast<int64_t>(element_bytes(dtype));
}

}  // namespace

size_t scan_loss_cpu_workspace(const ScanLossShape& shape) {
  const int64_t blocks = shape.heads * blocks_of(shape).per_head;
  return static_cast<size_t>(blocks) * (sizeof(double) + static_cast<size_t>(shape.classes) * sizeof(float));
}

void scan_loss_forward_cpu(DType dtype, const ScanLossShape& shape, const ScanLossForward& arguments) {
  const Blocks blocks = blocks_of(shape);
  const auto rows_forward = SCAN_FAST_BEST_ISA(scan_loss_rows_forward);
  const auto mean_and_entropy = SCAN_FAST_BEST_ISA(scan_loss_mean_and_entropy);
  double* losses = static_cast<double*>(arguments.workspace);
  float* column_sums = reinterpret_cast<float*>(losses + shape.heads * blocks.per_head);
  for_blocks(shape, shape.heads * blocks.per_head, [&](int64_t task, int) {
    const int64_t head = task / blocks.per_head, start = task % blocks.per_head * blocks.rows_each;
    const int64_t first = head * shape.rows + start;
    const ScanLossRows rows{advanced(arguments.anchors, first * shape.classes, dtype),
                            advanced(arguments.neighbors, first * shape.classes, dtype),
                            arguments.row_stats + first * kScanLossRowStats,
                            std::min(blocks.rows_each, shape.rows - start), shape.classes};
    losses[task] = rows_forward(dtype, rows, column_sums + task * shape.classes);
  });
  for (int64_t head = 0; head < shape.heads; ++head) {
    double sum = 0;
    for (int64_t block = 0; block < blocks.per_head; ++block) sum += losses[head * blocks.per_head + block];
    const double consistency = sum / static_cast<double>(shape.rows);
    const double entropy =
        mean_and_entropy(column_sums + head * blocks.per_head * shape.classes, blocks.per_head, shape.classes,
                         shape.rows, shape.classes, arguments.mean_prob + head * shape.classes);
    arguments.consistency[head] = static_cast<float>(consistency);
    arguments.entropy[head] = static_cast<float>(entropy);
    arguments.total[head] = static_cast<float>(consistency - static_cast<double>(arguments.entropy_weight) * entropy);
  }
}

void scan_loss_backward_cpu(DType dtype, const ScanLossShape& shape, const ScanLossBackward& arguments) {
  const Blocks blocks = blocks_of(shape);
  const auto rows_backward = SCAN_FAST_BEST_ISA(scan_loss_rows_backward);
  std::vector<float> slopes(static_cast<size_t>(shape.heads * shape.classes));
  SCAN_FAST_BEST_ISA(scan_loss_entropy_slope)(arguments.mean_prob, shape.heads * shape.classes, slopes.data());
  for_blocks(shape, shape.heads * blocks.per_head, [&](int64_t task, int) {
    const int64_t head = task / blocks.per_head, start = task % blocks.per_head * blocks.rows_each;
    const int64_t first = head * shape.rows + start;
    auto upstream = [head](const float* gradient) { return gradient == nullptr ? 0.0f : gradient[head]; };
    const float total = upstream(arguments.grad_total), count = static_cast<float>(shape.rows);
    const ScanLossRows rows{advanced(arguments.anchors, first * shape.classes, dtype),
                            advanced(arguments.neighbors, first * shape.classes, dtype),
                            const_cast<float*>(arguments.row_stats) + first * kScanLossRowStats,
                            std::min(blocks.rows_each, shape.rows - start), shape.classes};
    rows_backward(dtype, rows, slopes.data() + head * shape.classes,
                  (total + upstream(arguments.grad_consistency)) / count,
                  (upstream(arguments.grad_entropy) - arguments.entropy_weight * total) / count,
                  advanced(arguments.grad_anchors, first * shape.classes, dtype),
                  advanced(arguments.grad_neighbors, first * shape.classes, dtype));
  });
}

}  // namespace scan_fast
