#include "nt_xent/nt_xent_cpu_kernel.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

#if defined(SCAN_FAST_ISA_avx512)
constexpr int kLanes = 16;
#elif defined(SCAN_FAST_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }

// 2^x for x <= 127, relative error below 2e-7, exactly zero below -126, NaN for NaN. Adding 1.5 * 2^23 rounds x to an
// integer n that then stands in the low bits, from where a shift moves it into the exponent of 2^(x - n).
inline Vector exp2(Vector x) {
  const Vector magic = all(12582912.0f);
  const Vector shifted = x + magic;
  const Vector r = x - (shifted - magic);
  Vector p = all(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const Bits bits = reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23);
  return x < all(-126.0f) ? Vector{} : reinterpret_cast<Vector>(bits);
}

// A probability's logarithm; at tiny temperatures the rounding of s alone could lift it far above zero.
inline Vector at_most_zero(Vector x) { return x > Vector{} ? Vector{} : x; }

// In a fixed order, so that every run gives the same bits.
inline float sum_lanes(Vector value) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

template <int kRows, bool kColumnSums>
void exp_sums(const float* tile, int64_t columns, int64_t ld, float scale, float* row_sum, float* column_sum) {
  Vector sums[kRows] = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vector column = {};
    for (int i = 0; i < kRows; ++i) {
      const Vector e = exp2(load(tile + i * ld + j) * scale - scale);
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
    Vector largest = all(-__builtin_inff());
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vector s = load(row + j);
      largest = s > largest ? s : largest;
    }
    float maximum = row_max[i];
    for (int lane = 0; lane < kLanes; ++lane) {
      const float candidate = largest[lane] * scale;
      maximum = candidate > maximum ? candidate : maximum;
    }
    // Where nothing counts yet, any finite shift does; a NaN is no maximum but reaches the sum.
    const float shift = maximum == -__builtin_inff() ? 0.0f : maximum;
    Vector sum = {};
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
      const Vector s = load(row + j) * scale;
      const Vector by_row = exp2(at_most_zero(s - row_shift[i])) * row_weight[i];
      const Vector by_column = exp2(at_most_zero(s - load(column_shift + j))) * load(column_weight + j);
      store(row + j, by_row + by_column);
    }
  }
}

void nt_xent_to_bf16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vector value = load(from + i);
    const Bits bits = reinterpret_cast<Bits>(value);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits kept = value == value ? rounded : Bits{} + 0x7fc0u;
    *reinterpret_cast<Halves*>(to + i) = __builtin_convertvector(kept, Halves);
  }
  for (; i < count; ++i) {
    union {
      float value;
      uint32_t bits;
    } word = {from[i]};
    to[i] = word.value == word.value ? static_cast<uint16_t>((word.bits + 0x7fffu + ((word.bits >> 16) & 1u)) >> 16)
                                     : static_cast<uint16_t>(0x7fc0u);
  }
}

}  // namespace scan_fast::SCAN_FAST_ISA
