// Inner loops of the SCAN loss, in float vectors over the classes of one row at a time. scan_loss_cpu_narrow.cpp has
// the loops for few classes; the end of this file calls them.
//
// Forward, per row: one pass for the two maxima, one for e^(a - max a), e^(n - max n) and the three sums, and one that
// adds the probabilities to the column sums. <p, q> needs no third exponential: it is the sum of products of the first
// two. If that sum underflows (confident rows that disagree), the row is recomputed with the maximum of a + n.
// Backward: p and q are recomputed the same way, and r = softmax(a + n) is p q / <p, q>:
//   grad n = k (q - r),   grad a = k (p - r) + e p (u - <p, u>),   u = d entropy / d mean_prob.
// A row of up to a few thousand classes stays in the L1 cache between its passes, so each logit is read from memory
// once per direction.
#include "common/simd_rows.h"
#include "scan_loss/scan_loss_cpu_kernel.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

constexpr int64_t kStackClasses = 4096;  // scratch row on the stack; larger rows are recomputed instead

const float kMinusInfinity = -__builtin_inff();

struct RowSums {
  float max_a, max_n, sum_a, sum_n, sum_joint;
  float shift;  // to be added to log sum_joint (0 unless the products underflowed)
};

// Calls body(class, lanes) for each vector of a row; lanes < kLanes only in the last call.
template <typename Body>
inline void for_vectors(int64_t classes, Body body) {
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) body(c, kLanes);
  if (c < classes) body(c, static_cast<int>(classes - c));
}

// Rare case of underflow: finds the largest a + n, and the sum of exponentials relative to it.
template <typename T>
__attribute__((noinline)) void joint_sum(const T* a, const T* n, int64_t classes, RowSums& row) {
  const Vec ma = splat(row.max_a), mn = splat(row.max_n);
  Vec best = splat(kMinusInfinity), sum = {};
  for_vectors(classes, [&](int64_t c, int lanes) {
    best = larger((load_lanes(a + c, lanes, kMinusInfinity) - ma) + (load_lanes(n + c, lanes, 0.0f) - mn), best);
  });
  row.shift = reduce_max(best);
  if (row.shift == kMinusInfinity) return;  // no class is possible for both: sum_joint stays 0, the loss is infinite
  const Vec shift = splat(row.shift);
  for_vectors(classes, [&](int64_t c, int lanes) {
    sum += exp((load_lanes(a + c, lanes, kMinusInfinity) - ma) + (load_lanes(n + c, lanes, 0.0f) - mn) - shift);
  });
  row.sum_joint = reduce_add(sum);
}

// Writes the row's statistics, `stride` floats apart, and returns <p, q> / e^shift.
inline float finish_row(const RowSums& row, float* stats, int64_t stride) {
  const float inverse_a = 1.0f / row.sum_a, inverse_n = 1.0f / row.sum_n;
  stats[0] = row.max_a;
  stats[stride] = inverse_a;
  stats[2 * stride] = row.max_n;
  stats[3 * stride] = inverse_n;
  stats[4 * stride] = row.shift;
  stats[5 * stride] = 1.0f / row.sum_joint;
  return row.sum_joint * inverse_a * inverse_n;
}

template <typename T>
double rows_forward(const ScanLossRows& block, float* column_sums) {
  const T* a = static_cast<const T*>(block.anchors);
  const T* n = static_cast<const T*>(block.neighbors);
  const int64_t classes = block.classes;
  const bool keep = classes <= kStackClasses;
  float scratch[kStackClasses];
  float dots[kLanes];
  double shifts = 0, logs = 0;
  std::memset(column_sums, 0, static_cast<size_t>(classes) * sizeof(float));
  int pending = 0;
  for (int64_t i = 0; i < block.rows; ++i, a += classes, n += classes) {
    RowSums row{};
    Vec best_a = splat(kMinusInfinity), best_n = best_a, sum_a = {}, sum_n = {}, sum_joint = {};
    for_vectors(classes, [&](int64_t c, int lanes) {
      best_a = larger(load_lanes(a + c, lanes, kMinusInfinity), best_a);
      best_n = larger(load_lanes(n + c, lanes, kMinusInfinity), best_n);
    });
    row.max_a = reduce_max(best_a);
    row.max_n = reduce_max(best_n);
    for_vectors(classes, [&](int64_t c, int lanes) {
      const Vec x = exp(load_lanes(a + c, lanes, kMinusInfinity) - row.max_a);
      const Vec y = exp(load_lanes(n + c, lanes, kMinusInfinity) - row.max_n);
      sum_a += x;
      sum_n += y;
      sum_joint += x * y;
      if (keep) store_lanes(scratch + c, x, lanes);
    });
    row.sum_a = reduce_add(sum_a);
    row.sum_n = reduce_add(sum_n);
    row.sum_joint = reduce_add(sum_joint);
    if (row.sum_joint < kScanLossUnderflow) {
      joint_sum(a, n, classes, row);
      shifts += static_cast<double>(row.shift);
    }
    dots[pending++] = finish_row(row, block.row_stats + i, block.rows);
    if (pending == kLanes || i + 1 == block.rows) {
      // One vector logarithm for kLanes rows.
      const Vec each = log(load_lanes(dots, pending, 1.0f));
      for (int k = 0; k < pending; ++k) logs += static_cast<double>(each[k]);
      pending = 0;
    }
    const Vec inverse = splat(block.row_stats[block.rows + i]);
    for_vectors(classes, [&](int64_t c, int lanes) {
      const Vec x =
          keep ? load_lanes(scratch + c, lanes, 0.0f) : exp(load_lanes(a + c, lanes, kMinusInfinity) - row.max_a);
      store_lanes(column_sums + c, load_lanes(column_sums + c, lanes, 0.0f) + x * inverse, lanes);
    });
  }
  return -(logs + shifts);
}

template <typename T>
void rows_backward(const ScanLossRows& block, const float* slope, float consistency_scale, float entropy_scale,
                   void* grad_anchors, void* grad_neighbors) {
  const T* a = static_cast<const T*>(block.anchors);
  const T* n = static_cast<const T*>(block.neighbors);
  T* grad_a = static_cast<T*>(grad_anchors);
  T* grad_n = static_cast<T*>(grad_neighbors);
  const int64_t classes = block.classes;
  const bool keep = classes <= kStackClasses;
  float scratch_p[kStackClasses], scratch_r[kStackClasses];
  const Vec k = splat(consistency_scale);
  for (int64_t i = 0; i < block.rows; ++i, a += classes, n += classes, grad_a += classes, grad_n += classes) {
    auto stat = [&](int index) { return block.row_stats[index * block.rows + i]; };
    const Vec max_a = splat(stat(0)), inverse_a = splat(stat(1));
    const Vec max_n = splat(stat(2)), inverse_n = splat(stat(3));
    const bool healthy = stat(4) == 0;
    const Vec shift = splat(stat(4)), inverse_joint = splat(stat(5));
    auto probabilities = [&](int64_t c, int lanes, Vec& p, Vec& q, Vec& r) {
      const Vec x = load_lanes(a + c, lanes, kMinusInfinity) - max_a;
      const Vec y = load_lanes(n + c, lanes, kMinusInfinity) - max_n;
      const Vec exp_a = exp(x), exp_n = exp(y);
      p = exp_a * inverse_a;
      q = exp_n * inverse_n;
      r = (healthy ? exp_a * exp_n : exp(x + y - shift)) * inverse_joint;
    };
    Vec dots = {};
    for_vectors(classes, [&](int64_t c, int lanes) {
      Vec p, q, r;
      probabilities(c, lanes, p, q, r);
      dots += p * load_lanes(slope + c, lanes, 0.0f);
      store_lanes(grad_n + c, k * (q - r), lanes);
      if (keep) {
        store_lanes(scratch_p + c, p, lanes);
        store_lanes(scratch_r + c, r, lanes);
      }
    });
    const float dot = reduce_add(dots);
    for_vectors(classes, [&](int64_t c, int lanes) {
      Vec p, q, r;
      if (keep) {
        p = load_lanes(scratch_p + c, lanes, 0.0f);
        r = load_lanes(scratch_r + c, lanes, 0.0f);
      } else {
        probabilities(c, lanes, p, q, r);
      }
      store_lanes(grad_a + c, k * (p - r) + entropy_scale * p * (load_lanes(slope + c, lanes, 0.0f) - dot), lanes);
    });
  }
}

}  // namespace

double scan_loss_rows_forward(DType dtype, const ScanLossRows& block, float* column_sums) {
  if (block.classes <= kMaxColumns) return scan_loss_narrow_rows_forward(dtype, block, column_sums);
  switch (dtype) {
    case DType::kBFloat16: return rows_forward<Bf16>(block, column_sums);
    case DType::kFloat16: return rows_forward<Fp16>(block, column_sums);
    default: return rows_forward<float>(block, column_sums);
  }
}

double scan_loss_mean_and_entropy(const float* column_sums, int64_t blocks, int64_t stride, int64_t rows,
                                  int64_t classes, float* mean_prob) {
  double entropy = 0;
  const float floor = kScanLossFloor, count = static_cast<float>(rows);
  for_vectors(classes, [&](int64_t c, int lanes) {
    Vec sum = {};
    for (int64_t block = 0; block < blocks; ++block) sum += load_lanes(column_sums + block * stride + c, lanes, 0.0f);
    const Vec mean = sum / count;
    store_lanes(mean_prob + c, mean, lanes);
    const Vec clamped = mean < floor ? splat(floor) : mean;  // NaN stays NaN
    const Vec term = clamped * log(clamped);
    for (int i = 0; i < lanes; ++i) entropy -= static_cast<double>(term[i]);
  });
  return entropy;
}

void scan_loss_entropy_slope(const float* mean_prob, int64_t classes, float* slope) {
  for_vectors(classes, [&](int64_t c, int lanes) {
    const Vec mean = load_lanes(mean_prob + c, lanes, 1.0f);
    store_lanes(slope + c, mean < kScanLossFloor ? Vec{} : -1.0f - log(mean), lanes);
  });
}

void scan_loss_rows_backward(DType dtype, const ScanLossRows& block, const float* slope, float consistency_scale,
                             float entropy_scale, void* grad_anchors, void* grad_neighbors) {
  if (block.classes <= kMaxColumns) {
    return scan_loss_narrow_rows_backward(dtype, block, slope, consistency_scale, entropy_scale, grad_anchors,
                                          grad_neighbors);
  }
  const auto run = dtype == DType::kBFloat16  ? &rows_backward<Bf16>
                   : dtype == DType::kFloat16 ? &rows_backward<Fp16>
                                              : &rows_backward<float>;
  run(block, slope, consistency_scale, entropy_scale, grad_anchors, grad_neighbors);
}

}  // namespace scan_fast::SCAN_FAST_ISA
