// CPU driver of the self-label loss: processes rows in parallel, then computes the weights and the weighted sum in row
// order. So the bits do not depend on the number of threads.
#include <algorithm>

#include "common/parallel.h"
#include "self_label/self_label_cpu_kernel.h"

namespace scan_fast {
namespace {

constexpr int64_t kElementsPerBlock = 32 * 1024;

int64_t rows_per_block(const SelfLabelShape& shape) { return std::max<int64_t>(1, kElementsPerBlock / shape.classes); }

template <typename Pointer>
Pointer advanced(Pointer base, int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(base) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

}  // namespace

size_t self_label_cpu_workspace(const SelfLabelShape& shape) {
  return static_cast<size_t>(shape.rows) * sizeof(float) +
         static_cast<size_t>(shape.classes) * (sizeof(double) + sizeof(int32_t));
}

void self_label_forward_cpu(DType dtype, const SelfLabelShape& shape, const SelfLabelForward& arguments) {
  const int64_t each = rows_per_block(shape);
  const auto rows_forward = SCAN_FAST_BEST_ISA(self_label_rows_forward);
  double* class_weight = static_cast<double*>(arguments.workspace);
  float* losses = reinterpret_cast<float*>(class_weight + shape.classes);
  int32_t* per_class = reinterpret_cast<int32_t*>(losses + shape.rows);
  parallel_for((shape.rows + each - 1) / each, [&](int64_t task, int) {
    const int64_t first = task * each, rows = std::min(each, shape.rows - first);
    rows_forward(dtype, advanced(arguments.weak, first * shape.classes, dtype),
                 advanced(arguments.strong, first * shape.classes, dtype), rows, shape.classes, arguments.threshold,
                 arguments.target + first, arguments.row_weight + first, losses + first,
                 arguments.row_stats + first * kSelfLabelRowStats);
  });
  // The two loops over rows have no branch, because confident rows are unpredictable.
  std::fill(per_class, per_class + shape.classes, 0);
  for (int64_t i = 0; i < shape.rows; ++i) per_class[arguments.target[i]] += arguments.row_weight[i] != 0.0f;
  int64_t confident = 0, present = 0;
  for (int64_t c = 0; c < shape.classes; ++c) {
    confident += per_class[c];
    present += per_class[c] != 0;
  }
  for (int64_t c = 0; c < shape.classes; ++c) {
    const double count =
        arguments.balance ? static_cast<double>(present) * per_class[c] : static_cast<double>(confident);
    class_weight[c] = per_class[c] == 0 ? 0.0 : 1.0 / count;
  }
  double loss = 0;
  for (int64_t i = 0; i < shape.rows; ++i) {
    const double weight = class_weight[arguments.target[i]] * static_cast<double>(arguments.row_weight[i]);
    arguments.row_weight[i] = static_cast<float>(weight);
    loss += weight * static_cast<double>(losses[i]);
  }
  *arguments.loss = static_cast<float>(loss);
  *arguments.n_confident = confident;
}

void self_label_backward_cpu(DType dtype, const SelfLabelShape& shape, const SelfLabelBackward& arguments) {
  const int64_t each = rows_per_block(shape);
  const auto rows_backward = SCAN_FAST_BEST_ISA(self_label_rows_backward);
  parallel_for((shape.rows + each - 1) / each, [&](int64_t task, int) {
    const int64_t first = task * each, rows = std::min(each, shape.rows - first);
    rows_backward(dtype, advanced(arguments.strong, first * shape.classes, dtype), rows, shape.classes,
                  *arguments.grad_loss, arguments.target + first, arguments.row_weight + first,
                  arguments.row_stats + first * kSelfLabelRowStats,
                  advanced(arguments.grad_strong, first * shape.classes, dtype));
  });
}

}  // namespace scan_fast
