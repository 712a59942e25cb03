#include "nt_xent/nt_xent_cpu_kernel.h"

#include "nt_xent/nt_xent_cpu_tiles.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

// 2^x for x <= 127: relative error below 2e-7, exactly zero below -126, NaN for NaN. Adding 1.5 * 2^23 + 127 rounds x to
// an integer n, with n + 127 in the low bits. A shift makes them the exponent of 2^n.
inline Vec exp2(Vec x) {
  const Vec magic = splat(12583039.0f);
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  Vec p = splat(1.326472719e-3f);  // minimax of degree 5 with p(0) = 1: 9.2e-8
  p = p * r + 9.671512640e-3f;
  p = p * r + 5.550733743e-2f;
  p = p * r + 2.402224209e-1f;
  p = p * r + 6.931469776e-1f;
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

// ---- rows --------------------------------------------------------------------------------------------------------

double nt_xent_dot(const float* x, const float* y, int64_t dim) {
  DoubleSum sum;
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes) sum.add_product(load(x + k), load(y + k));
  double rest = 0;
  for (; k < dim; ++k) rest += static_cast<double>(x[k]) * static_cast<double>(y[k]);
  return sum.total() + rest;
}

void nt_xent_unit_rows(const float* x, int64_t rows, int64_t dim, float* unit, float* inv_norm) {
  for (int64_t row = 0; row < rows; ++row, x += dim, unit += dim) {
    // In double, so that neither huge nor tiny rows lose their direction. The comparison lets NaN through.
    const double length = __builtin_sqrt(nt_xent_dot(x, x, dim));
    const double norm = length < 1e-12 ? 1e-12 : length;
    const double inverse = 1.0 / norm;
    SCAN_FAST_INDEPENDENT
    for (int64_t k = 0; k < dim; ++k) unit[k] = static_cast<float>(static_cast<double>(x[k]) * inverse);
    inv_norm[row] = static_cast<float>(inverse);
  }
}

void nt_xent_finish_row(const float* unit, const float* positive, int64_t dim, double pull, double temperature,
                        float inv_norm, bool radial, float* gradient) {
  const double inverse = 1.0 / temperature;
  double along = 0;
  SCAN_FAST_INDEPENDENT
  for (int64_t k = 0; k < dim; ++k) {
    gradient[k] =
        static_cast<float>((static_cast<double>(gradient[k]) + pull * static_cast<double>(positive[k])) * inverse);
  }
  if (radial) along = nt_xent_dot(gradient, unit, dim);
  SCAN_FAST_INDEPENDENT
  for (int64_t k = 0; k < dim; ++k) {
    gradient[k] = static_cast<float>((static_cast<double>(gradient[k]) - along * static_cast<double>(unit[k])) *
                                     static_cast<double>(inv_norm));
  }
}

// ---- products ----------------------------------------------------------------------------------------------------

void nt_xent_pack(const float* unit, int64_t rows, int64_t dim, float* panels, float* slices) {
  const int64_t padded = nt_xent_padded(rows);
  for (int64_t first = 0; first < padded; first += kLanes, panels += kLanes * dim) {
    for (int64_t k = 0; k < dim; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) {
        panels[k * kLanes + lane] = first + lane < rows ? unit[(first + lane) * dim + k] : 0.0f;
      }
    }
  }
  if (slices == nullptr) return;
  for (int64_t d = 0; d < dim; d += kNarrowColumns) {
    for (int64_t row = 0; row < padded; ++row, slices += kNarrowColumns) {
      for (int64_t c = 0; c < kNarrowColumns; ++c) {
        slices[c] = row < rows && d + c < dim ? unit[row * dim + d + c] : 0.0f;
      }
    }
  }
}

void nt_xent_similarities(const float* row_panels, int64_t rows, const float* column_panels, int64_t columns,
                          int64_t dim, float* tile, int64_t ld) {
  for_wide_tiles(rows, columns, tile, ld,
                 [&](int64_t i, int64_t j, Vec(&sum)[kWideRows][kWideVectors]) __attribute__((always_inline)) {
                   add_products(sum, dim, row_panels + i / kLanes * kLanes * dim + i % kLanes, 1, kLanes,
                                column_panels + j * dim, dim * kLanes, kLanes);
                 });
}

void nt_xent_gather(const float* tile, int64_t ld, int64_t rows, int64_t depth, bool transposed, const float* slices,
                    int64_t padded_depth, int64_t dim, float* to) {
  // Two loops, because one of the two steps through the tile is constant in each.
  if (transposed) {
    for_narrow_tiles(rows, dim, to,
                     [&](int64_t i, int64_t d, Vec(&sum)[kNarrowRows][kNarrowVectors]) __attribute__((always_inline)) {
                       add_products(sum, depth, tile + i, 1, ld, slices + d * padded_depth, kLanes, kNarrowColumns);
                     });
  } else {
    for_narrow_tiles(rows, dim, to,
                     [&](int64_t i, int64_t d, Vec(&sum)[kNarrowRows][kNarrowVectors]) __attribute__((always_inline)) {
                       add_products(sum, depth, tile + i * ld, ld, 1, slices + d * padded_depth, kLanes,
                                    kNarrowColumns);
                     });
  }
}

}  // namespace scan_fast::SCAN_FAST_ISA
