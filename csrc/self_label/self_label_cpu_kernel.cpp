// Inner loops of the self-label loss, in float vectors over the classes of one row at a time. For few classes
// (kMaxColumns), kLanes rows are transposed in registers, one row per lane, so that nothing is reduced across lanes.
//
// The largest probability of a row is 1 / sum e^(x - max), so the confidence test needs no division per class. The
// label is the first class that equals the maximum. A row that is not confident costs one read of its weak logits; in
// the narrow form this holds if none of the kLanes rows is confident.
#include "common/simd_rows.h"
#include "self_label/self_label_cpu_kernel.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

const float kMinusInfinity = -__builtin_inff();

template <typename T>
inline float row_max(const T* x, int64_t classes) {
  Vec best = splat(kMinusInfinity);
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) best = larger(load(x + c), best);
  if (c < classes) best = larger(load_partial(x + c, static_cast<int>(classes - c), kMinusInfinity), best);
  return reduce_max(best);
}

template <typename T>
inline float row_sum(const T* x, int64_t classes, float max) {
  Vec sum = {};
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) sum += exp(load(x + c) - max);
  if (c < classes) sum += exp(load_partial(x + c, static_cast<int>(classes - c), kMinusInfinity) - max);
  return reduce_add(sum);
}

template <typename T>
inline int32_t first_equal(const T* x, int64_t classes, float value) {
  for (int64_t c = 0; c < classes; ++c) {
    if (widen(x[c]) == value) return static_cast<int32_t>(c);
  }
  return 0;  // row of NaN, never confident
}

// Computes the maximum and the sum of exponentials of each lane.
inline void max_and_sum(const Vec* columns, int64_t classes, Vec& max, Vec& sum) {
  max = splat(kMinusInfinity);
  for (int64_t c = 0; c < classes; ++c) max = larger(columns[c], max);
  sum = Vec{};
  for (int64_t c = 0; c < classes; ++c) sum += exp(columns[c] - max);
}

template <typename T>
void narrow_rows_forward(const T* weak, const T* strong, int64_t rows, int64_t classes, float threshold,
                         int32_t* target, float* confident, float* losses, float* row_stats) {
  Vec x[kMaxColumns];
  const Vec ones = splat(1.0f);
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t left = (rows - i) * classes;
    const int lanes = rows - i < kLanes ? static_cast<int>(rows - i) : kLanes;
    Vec max, sum, stats[kSelfLabelRowStats] = {}, loss = {};
    load_columns(weak + i * classes, classes, left, x);
    max_and_sum(x, classes, max, sum);
    IntVec label = {};
    for (int64_t c = classes - 1; c >= 0; --c) label = x[c] == max ? IntVec{} + static_cast<int32_t>(c) : label;
    const IntVec counts = (1.0f / sum > threshold) & first_lanes(lanes);
    if (any(counts)) {
      load_columns(strong + i * classes, classes, left, x);
      max_and_sum(x, classes, max, sum);
      Vec at_label = {};
      for (int64_t c = 0; c < classes; ++c) at_label = label == static_cast<int32_t>(c) ? x[c] : at_label;
      stats[0] = counts ? max : Vec{};
      stats[1] = counts ? 1.0f / sum : Vec{};
      loss = counts ? log(sum) - (at_label - max) : Vec{};
    }
    std::memcpy(target + i, &label, static_cast<size_t>(lanes) * sizeof(int32_t));
    store_lanes(confident + i, counts ? ones : Vec{}, lanes);
    store_lanes(losses + i, loss, lanes);
    for (int k = 0; k < kSelfLabelRowStats; ++k) store_lanes(row_stats + k * rows + i, stats[k], lanes);
  }
}

template <typename T>
void narrow_rows_backward(const T* strong, int64_t rows, int64_t classes, float scale, const int32_t* target,
                          const float* row_weight, const float* row_stats, T* grad) {
  Vec x[kMaxColumns] = {};  // zeroed, because the transposition also moves columns past the last class
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t first = i * classes, left = (rows - i) * classes;
    const int lanes = rows - i < kLanes ? static_cast<int>(rows - i) : kLanes;
    const Vec weight = load_lanes(row_weight + i, lanes, 0.0f);
    const IntVec counts = weight != Vec{};
    if (!any(counts)) {
      std::memset(static_cast<void*>(grad + first), 0, static_cast<size_t>(lanes * classes) * sizeof(T));
      continue;
    }
    IntVec label = {};
    std::memcpy(&label, target + i, static_cast<size_t>(lanes) * sizeof(int32_t));
    load_columns(strong + first, classes, left, x);
    const Vec max = load_lanes(row_stats + i, lanes, 0.0f), k = scale * weight;
    const Vec factor = k * load_lanes(row_stats + rows + i, lanes, 0.0f);
    for (int64_t c = 0; c < classes; ++c) {
      const Vec at_label = label == static_cast<int32_t>(c) ? k : Vec{};
      x[c] = counts ? factor * exp(x[c] - max) - at_label : Vec{};
    }
    store_columns(grad + first, classes, left, x);
  }
}

template <typename T>
void rows_forward(const T* weak, const T* strong, int64_t rows, int64_t classes, float threshold, int32_t* target,
                  float* confident, float* losses, float* row_stats) {
  if (classes <= kMaxColumns) {
    return narrow_rows_forward(weak, strong, rows, classes, threshold, target, confident, losses, row_stats);
  }
  for (int64_t i = 0; i < rows; ++i, weak += classes, strong += classes) {
    const float best = row_max(weak, classes);
    const bool counts = 1.0f / row_sum(weak, classes, best) > threshold;
    target[i] = first_equal(weak, classes, best);
    confident[i] = counts ? 1.0f : 0.0f;
    losses[i] = row_stats[i] = row_stats[rows + i] = 0.0f;
    if (!counts) continue;
    const float max = row_max(strong, classes), sum = row_sum(strong, classes, max);
    row_stats[i] = max;
    row_stats[rows + i] = 1.0f / sum;
    losses[i] = log(splat(sum))[0] - (widen(strong[target[i]]) - max);
  }
}

template <typename T>
void rows_backward(const T* strong, int64_t rows, int64_t classes, float scale, const int32_t* target,
                   const float* row_weight, const float* row_stats, T* grad) {
  if (classes <= kMaxColumns) {
    return narrow_rows_backward(strong, rows, classes, scale, target, row_weight, row_stats, grad);
  }
  for (int64_t i = 0; i < rows; ++i, strong += classes, grad += classes) {
    if (row_weight[i] == 0.0f) {
      std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(classes) * sizeof(T));
      continue;
    }
    const float max = row_stats[i], k = scale * row_weight[i];
    const float factor = k * row_stats[rows + i];
    int64_t c = 0;
    for (; c + kLanes <= classes; c += kLanes) store(grad + c, factor * exp(load(strong + c) - max));
    if (c < classes) {
      const int lanes = static_cast<int>(classes - c);
      store_partial(grad + c, factor * exp(load_partial(strong + c, lanes, kMinusInfinity) - max), lanes);
    }
    const Vec at_target = factor * exp(splat(widen(strong[target[i]])) - max) - k;
    grad[target[i]] = narrow<T>(at_target[0]);
  }
}

}  // namespace

void self_label_rows_forward(DType dtype, const void* weak, const void* strong, int64_t rows, int64_t classes,
                             float threshold, int32_t* target, float* confident, float* losses, float* row_stats) {
  auto run = [&](auto element) {
    using T = decltype(element);
    rows_forward(static_cast<const T*>(weak), static_cast<const T*>(strong), rows, classes, threshold, target,
                 confident, losses, row_stats);
  };
  switch (dtype) {
    case DType::kBFloat16: return run(Bf16{});
    case DType::kFloat16: return run(Fp16{});
    default: return run(0.0f);
  }
}

void self_label_rows_backward(DType dtype, const void* strong, int64_t rows, int64_t classes, float scale,
                              const int32_t* target, const float* row_weight, const float* row_stats,
                              void* grad_strong) {
  auto run = [&](auto element) {
    using T = decltype(element);
    rows_backward(static_cast<const T*>(strong), rows, classes, scale, target, row_weight, row_stats,
                  static_cast<T*>(grad_strong));
  };
  switch (dtype) {
    case DType::kBFloat16: return run(Bf16{});
    case DType::kFloat16: return run(Fp16{});
    default: return run(0.0f);
  }
}

}  // namespace scan_fast::SCAN_FAST_ISA
