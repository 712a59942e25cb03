// Inner loops of the SCAN loss for few classes, with one row per lane.
//
// The formulas are those of scan_loss_cpu_kernel.cpp. With 10 classes, a vector over classes is mostly padding, and
// every sum is a reduction across lanes. So kLanes rows are transposed in registers (load_columns). Maxima,
// exponentials, sums and logarithms then use full vectors, class after class. Column sums stay in lanes until the block
// ends.
#include "common/simd_rows.h"
#include "scan_loss/scan_loss_cpu_kernel.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

const float kMinusInfinity = -__builtin_inff();

inline Vec largest(const Vec* columns, int64_t classes) {
  Vec best = splat(kMinusInfinity);
  for (int64_t c = 0; c < classes; ++c) best = larger(columns[c], best);
  return best;
}

// Rare case of rows whose <p, q> underflows: sets `shift` to their largest a + n, and `sum_joint` relative to it. If no
// class is possible for both views, the shift is minus infinity, the sum stays 0, and the loss is infinite.
template <typename T>
__attribute__((noinline)) void joint_sums(const T* a, const T* n, int64_t classes, int64_t left, const Vec& max_a,
                                          const Vec& max_n, IntVec lost, Vec& sum_joint, Vec& shift) {
  Vec x[kMaxColumns], y[kMaxColumns];
  load_columns(a, classes, left, x);
  load_columns(n, classes, left, y);
  for (int64_t c = 0; c < classes; ++c) x[c] = (x[c] - max_a) + (y[c] - max_n);
  const Vec best = largest(x, classes);
  Vec sum = {};
  for (int64_t c = 0; c < classes; ++c) sum += exp(x[c] - best);
  shift = lost ? best : shift;
  sum_joint = (lost & (best > kMinusInfinity)) ? sum : sum_joint;
}

template <typename T>
double rows_forward(const ScanLossRows& block, float* column_sums) {
  const int64_t classes = block.classes;
  Vec x[kMaxColumns], y[kMaxColumns], column_sum[kMaxColumns] = {};
  DoubleSum logs;
  for (int64_t i = 0; i < block.rows; i += kLanes) {
    const T* a = static_cast<const T*>(block.anchors) + i * classes;
    const T* n = static_cast<const T*>(block.neighbors) + i * classes;
    const int64_t left = (block.rows - i) * classes;
    const int rows = block.rows - i < kLanes ? static_cast<int>(block.rows - i) : kLanes;
    const IntVec used = first_lanes(rows);
    load_columns(a, classes, left, x);
    load_columns(n, classes, left, y);
    const Vec max_a = largest(x, classes), max_n = largest(y, classes);
    Vec sum_a = {}, sum_n = {}, sum_joint = {}, shift = {};
    for (int64_t c = 0; c < classes; ++c) {
      x[c] = exp(x[c] - max_a);
      const Vec exp_n = exp(y[c] - max_n);
      sum_a += x[c];
      sum_n += exp_n;
      sum_joint += x[c] * exp_n;
    }
    const IntVec lost = (sum_joint < kScanLossUnderflow) & used;
    if (any(lost)) {
      joint_sums(a, n, classes, left, max_a, max_n, lost, sum_joint, shift);
      logs.add(shift);
    }
    const Vec inverse_a = 1.0f / sum_a, inverse_n = 1.0f / sum_n;
    const Vec stats[kScanLossRowStats] = {max_a, inverse_a, max_n, inverse_n, shift, 1.0f / sum_joint};
    for (int k = 0; k < kScanLossRowStats; ++k) store_lanes(block.row_stats + k * block.rows + i, stats[k], rows);
    const Vec dots = sum_joint * inverse_a * inverse_n, ones = splat(1.0f);
    logs.add(log(used ? dots : ones));
    const Vec weight = used ? inverse_a : Vec{};
    for (int64_t c = 0; c < classes; ++c) column_sum[c] += x[c] * weight;
  }
  for (int64_t c = 0; c < classes; ++c) column_sums[c] = reduce_add(column_sum[c]);
  return -logs.total();
}

template <typename T>
void rows_backward(const ScanLossRows& block, const float* slope, float consistency_scale, float entropy_scale,
                   void* grad_anchors, void* grad_neighbors) {
  const int64_t classes = block.classes;
  const Vec k = splat(consistency_scale), e = splat(entropy_scale);
  // Zeroed, because the transposition also moves columns past the last class.
  Vec x[kMaxColumns] = {}, y[kMaxColumns] = {}, z[kMaxColumns];
  for (int64_t i = 0; i < block.rows; i += kLanes) {
    const int64_t first = i * classes, left = (block.rows - i) * classes;
    const int rows = block.rows - i < kLanes ? static_cast<int>(block.rows - i) : kLanes;
    load_columns(static_cast<const T*>(block.anchors) + first, classes, left, x);
    load_columns(static_cast<const T*>(block.neighbors) + first, classes, left, y);
    auto stat = [&](int index) { return load_lanes(block.row_stats + index * block.rows + i, rows, 0.0f); };
    const Vec max_a = stat(0), inverse_a = stat(1), max_n = stat(2), inverse_n = stat(3);
    const Vec shift = stat(4), inverse_joint = stat(5);
    const IntVec shifted = shift != Vec{};
    const bool any_shifted = any(shifted);
    Vec dot = {};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec from_a = x[c] - max_a, from_n = y[c] - max_n;
      const Vec exp_a = exp(from_a), exp_n = exp(from_n);
      Vec joint = exp_a * exp_n;
      if (any_shifted) joint = shifted ? exp(from_a + from_n - shift) : joint;
      const Vec p = exp_a * inverse_a, r = joint * inverse_joint;
      dot += p * slope[c];
      x[c] = p;
      y[c] = k * (exp_n * inverse_n - r);
      z[c] = k * (p - r);
    }
    for (int64_t c = 0; c < classes; ++c) x[c] = z[c] + e * x[c] * (slope[c] - dot);
    store_columns(static_cast<T*>(grad_anchors) + first, classes, left, x);
    store_columns(static_cast<T*>(grad_neighbors) + first, classes, left, y);
  }
}

}  // namespace

double scan_loss_narrow_rows_forward(DType dtype, const ScanLossRows& block, float* column_sums) {
  switch (dtype) {
    case DType::kBFloat16: return rows_forward<Bf16>(block, column_sums);
    case DType::kFloat16: return rows_forward<Fp16>(block, column_sums);
    default: return rows_forward<float>(block, column_sums);
  }
}

void scan_loss_narrow_rows_backward(DType dtype, const ScanLossRows& block, const float* slope, float consistency_scale,
                                    float entropy_scale, void* grad_anchors, void* grad_neighbors) {
  const auto run = dtype == DType::kBFloat16  ? &rows_backward<Bf16>
                   : dtype == DType::kFloat16 ? &rows_backward<Fp16>
                                              : &rows_backward<float>;
  run(block, slope, consistency_scale, entropy_scale, grad_anchors, grad_neighbors);
}

}  // namespace scan_fast::SCAN_FAST_ISA
