#include "nt_xent/nt_xent_cpu_kernel.h"

#include "common/simd.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

// 2^x for x <= 127: relative error below 2e-7, exactly zero below -126, NaN for NaN. Adding 1.5 * 2^23 + 127 rounds x to
// an integer n, with n + 127 in the low bits. A shift makes them the exponent of 2^n.
inline Vec exp2(Vec x) {
  const Vec magic = splat(12583039.0f);
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  Vec p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  // A product, because adding to the exponent would turn some NaN into numbers.
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<UnsignedVec>(shifted) << 23);
  return x < splat(-126.0f) ? Vec{} : p * power;
}

// Clamps the logarithm of a probability. At tiny temperatures the rounding of s alone could lift it far above zero.
inline Vec at_most_zero(Vec x) { return x > Vec{} ? Vec{} : x; }

// Sums in a fixed order, so that every run gives the same bits.
inline float sum_lanes(Vec value) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

template <int kRows, bool kColumnSums>
void exp_sums(const float* tile, int64_t columns, int64_t ld, float scale, float* row_sum, float* column_sum) {
  Vec sums[kRows] = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec column = {};
    for (int i = 0; i < kRows; ++i) {
      const Vec e = exp2(load(tile + i * ld + j) * scale - scale);
      sums[i] += e;
      column += e;
    }
    if (kColumnSums) store(column_sum + j, load(column_sum + j) + column);
  }
  for (int i = 0; i < kRows; ++i) row_sum[i] = sum_lanes(sums[i]);
}

template <bool kColumnSums>
void exp_sums_of_tile(const float* tile, int64_t rows, int64_t columns, int64_t ld, float scale, float* row_sum,
                      float* column_sum) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    exp_sums<4, kColumnSums>(tile + i * ld, columns, ld, scale, row_sum + i, column_sum);
  }
  for (; i < rows; ++i) exp_sums<1, kColumnSums>(tile + i * ld, columns, ld, scale, row_sum + i, column_sum);
}

}  // namespace

void nt_xent_exp_sums(const float* tile, int64_t rows, int64_t columns, int64_t ld, float scale, float* row_sum,
                      float* column_sum) {
  if (column_sum == nullptr) {
    exp_sums_of_tile<false>(tile, rows, columns, ld, scale, row_sum, column_sum);
  } else {
    exp_sums_of_tile<true>(tile, rows, columns, ld, scale, row_sum, column_sum);
  }
}

void nt_xent_online_sums(const float* tile, int64_t rows, int64_t columns, int64_t ld, float scale, float* row_max,
                         double* row_sum) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = tile + i * ld;
    Vec largest = splat(-__builtin_inff());
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vec s = load(row + j);
      largest = s > largest ? s : largest;
    }
    float maximum = row_max[i];
    for (int lane = 0; lane < kLanes; ++lane) {
      const float candidate = largest[lane] * scale;
      maximum = candidate > maximum ? candidate : maximum;
    }
    // If all entries are masked so far, any finite shift will do. A NaN is never the maximum, but reaches the sum.
    const float shift = maximum == -__builtin_inff() ? 0.0f : maximum;
    Vec sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) sum += exp2(load(row + j) * scale - shift);
    const double kept = row_max[i] == -__builtin_inff() ? 0.0 : __builtin_exp2(static_cast<double>(row_max[i]) - shift);
    const double before = row_sum[i];
    row_sum[i] = (before == 0.0 ? 0.0 : before * kept) + sum_lanes(sum);
    row_max[i] = maximum;
  }
}

void nt_xent_weights(float* tile, int64_t rows, int64_t columns, int64_t ld, float scale, const float* row_weight,
                     const float* column_weight) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * ld;
    const float weight = row_weight[i];
    for (int64_t j = 0; j < columns; j += kLanes) {
      store(row + j, exp2(load(row + j) * scale - scale) * (weight + load(column_weight + j)));
    }
  }
}

void nt_xent_shifted_weights(float* tile, int64_t rows, int64_t columns, int64_t ld, float scale,
                             const float* row_shift, const float* row_weight, const float* column_shift,
                             const float* column_weight) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * ld;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vec s = load(row + j) * scale;
      const Vec by_row = exp2(at_most_zero(s - row_shift[i])) * row_weight[i];
      const Vec by_column = exp2(at_most_zero(s - load(column_shift + j))) * load(column_weight + j);
      store(row + j, by_row + by_column);
    }
  }
}

void nt_xent_to_bf16(const float* from, int64_t count, uint16_t* to) {
  Bf16* out = reinterpret_cast<Bf16*>(to);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    store_lanes(out + i, load_lanes(from + i, lanes, 0.0f), lanes);
  }
}

}  // namespace scan_fast::SCAN_FAST_ISA
