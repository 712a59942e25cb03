// Inner loops of the CPU neighbour search, compiled once per instruction set (SCAN_FAST_ISA).
//
// product: a register tile of kRows x kColumns float32 sums over the whole of dim. Nothing is spilled, and the tile is
// written once, to a few KiB that stay in the L1 cache. AVX-512: 8 x 48 = 24 accumulators, with 3 loads and 8
// broadcasts per 24 multiply-adds. So it is bound by the two multiply-add ports (16 lanes x 2 ports x 2 flops per
// cycle), not by loads. Both operands are panels of kLanes rows, so one packed copy of a row serves either side.
// filter: one comparison per vector of the tile and side. Candidates are rare (about k + k ln(N / k) per row), so the
// scalar code for a candidate costs little.
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "neighbors/cpu_kernels.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

using neighbors::CandidateLists;
using neighbors::CpuKernels;
using neighbors::RoundedRow;

// ---- vectors ------------------------------------------------------------------------------------------------------

#if defined(SCAN_FAST_ISA_avx512)
constexpr int kRows = 8, kVectors = 3, kLanes = 16;
using Vector = __m512;
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline Vector broadcast(float v) { return _mm512_set1_ps(v); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline unsigned at_least(Vector v, Vector bound) { return _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ); }
#elif defined(SCAN_FAST_ISA_avx2)
constexpr int kRows = 4, kVectors = 3, kLanes = 8;
using Vector = __m256;
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline Vector broadcast(float v) { return _mm256_set1_ps(v); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline unsigned at_least(Vector v, Vector bound) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, bound, _CMP_GE_OQ)));
}
#else
#if defined(__aarch64__)
constexpr int kRows = 4, kVectors = 4, kLanes = 4;  // 16 of 32 registers accumulate
#else
constexpr int kRows = 2, kVectors = 4, kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(16)));
inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
inline Vector broadcast(float v) { return Vector{v, v, v, v}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline unsigned at_least(Vector v, Vector bound) {
  const auto hit = v >= bound;
#if defined(__aarch64__)
  return vaddvq_u32(reinterpret_cast<uint32x4_t>(hit & decltype(hit){1, 2, 4, 8}));
#endif
  return (hit[0] ? 1u : 0u) | (hit[1] ? 2u : 0u) | (hit[2] ? 4u : 0u) | (hit[3] ? 8u : 0u);
}
#endif
constexpr int kColumns = kVectors * kLanes;

// Eight lanes of any width. The compiler splits them if registers are narrower, which changes no result.
typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Bits8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

// Macros instead of functions: passing wide vectors by value would change the calling convention.
#define SCAN_FAST_LOAD8(name, pointer) \
  Float8 name;                         \
  std::memcpy(&(name), (pointer), sizeof(name))
#define SCAN_FAST_WIDEN(v) __builtin_convertvector(v, Double8)

// ---- exact sum ----------------------------------------------------------------------------------------------------

double dot(const float* a, const float* b, int64_t dim) {
  Double8 sum[4] = {};
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      SCAN_FAST_LOAD8(x, a + d + 8 * part);
      SCAN_FAST_LOAD8(y, b + d + 8 * part);
      sum[part] += SCAN_FAST_WIDEN(x) * SCAN_FAST_WIDEN(y);
    }
  }
  double lane[32];
  std::memcpy(lane, sum, sizeof(lane));
  for (int l = 0; d + l < dim; ++l) lane[l] += static_cast<double>(a[d + l]) * static_cast<double>(b[d + l]);
#pragma GCC unroll 5
  for (int half = 16; half >= 1; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

// ---- rounding -----------------------------------------------------------------------------------------------------

RoundedRow round(const float* x, double scale, int64_t dim, bool to_bfloat16, float* rounded) {
  Double8 residual = {}, norm = {};
  for (int64_t d = 0; d < dim; d += 8) {
    Float8 piece = {};
    const int64_t rest = dim - d < 8 ? dim - d : 8;
    std::memcpy(&piece, x + d, static_cast<size_t>(rest) * sizeof(float));
    const Double8 exact = SCAN_FAST_WIDEN(piece) * scale;
    Bits8 bits = reinterpret_cast<Bits8>(__builtin_convertvector(exact, Float8));
    if (to_bfloat16) bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    // AMX reads subnormals as zero. Flushing them here makes this part of the residual.
    bits &= reinterpret_cast<Bits8>((bits & 0x7f800000u) != 0u);
    const Float8 kept = reinterpret_cast<Float8>(bits);
    const Double8 wide = SCAN_FAST_WIDEN(kept);
    residual += (exact - wide) * (exact - wide);
    norm += wide * wide;
    std::memcpy(rounded + d, &kept, static_cast<size_t>(rest) * sizeof(float));
  }
  RoundedRow result = {0, 0};
  for (int l = 0; l < 8; ++l) {
    result.residual_squared += residual[l];
    result.norm_squared += norm[l];
  }
  return result;
}

// ---- float32 product ----------------------------------------------------------------------------------------------

void product(const float* a, const float* b, int64_t dim, float* c) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = broadcast(0.0f);
  }
  const int64_t panel = dim * kLanes;
  for (int64_t d = 0; d < dim; ++d) {
    Vector column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * panel + d * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector row = broadcast(a[d * kLanes + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * kColumns + v * kLanes, sum[r][v]);
  }
}

// ---- products of bfloat16 pairs -----------------------------------------------------------------------------------

typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

inline Words load_words(const uint32_t* p) {
  Words v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vector low_halves(Words v) { return reinterpret_cast<Vector>(v << 16); }
inline Vector high_halves(Words v) { return reinterpret_cast<Vector>(v & 0xffff0000u); }

// On any processor: the products are exact in float32, so only the sums are rounded, as in the instruction.
void product_bf16(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = broadcast(0.0f);
  }
  const int64_t panel = pairs * kLanes;
  for (int64_t d = 0; d < pairs; ++d) {
    for (int v = 0; v < kVectors; ++v) {
      const Words column = load_words(b + v * panel + d * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Words row = Words{} + a[d * kLanes + r];
        sum[r][v] = multiply_add(high_halves(row), high_halves(column), sum[r][v]);
        sum[r][v] = multiply_add(low_halves(row), low_halves(column), sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * kColumns + v * kLanes, sum[r][v]);
  }
}

#if defined(SCAN_FAST_ISA_avx512)
// Two multiply-adds per lane and instruction, twice the rate of float32.
__attribute__((target("avx512bf16"))) void product_avx512_bf16(const uint32_t* a, const uint32_t* b, int64_t pairs,
                                                               float* c) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  const int64_t panel = pairs * kLanes;
  for (int64_t d = 0; d < pairs; ++d) {
    __m512i column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = _mm512_loadu_si512(b + v * panel + d * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(a[d * kLanes + r]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)row, (__m512bh)column[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * kColumns + v * kLanes, sum[r][v]);
  }
}
#else
constexpr decltype(&product_bf16) product_avx512_bf16 = nullptr;
#endif

// ---- candidate lists ----------------------------------------------------------------------------------------------

int64_t count_at_least(const float* value, int64_t n, float bound) {
  const Vector wide = broadcast(bound);
  int64_t hits = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) hits += __builtin_popcount(at_least(load(value + i), wide));
  for (; i < n; ++i) hits += value[i] >= bound;
  return hits;
}

void tighten(CandidateLists& lists, int64_t row, bool final) {
  float* value = lists.value + row * lists.capacity;
  int32_t* index = lists.index + row * lists.capacity;
  const int64_t n = lists.count[row];
  if (n <= lists.k) {
    // No candidate can be dropped yet.
    const int64_t doubled = 2 * static_cast<int64_t>(lists.limit[row]);
    lists.limit[row] = static_cast<int32_t>(doubled < lists.capacity ? doubled : lists.capacity);
    return;
  }
  // Bisection for a value t that at least k candidates reach. Any such t is valid; a higher one keeps fewer.
  float low = value[0], high = value[0];
  for (int64_t i = 1; i < n; ++i) {
    low = value[i] < low ? value[i] : low;
    high = value[i] > high ? value[i] : high;
  }
  const int64_t enough = lists.k + lists.k / 16;
  for (int step = 0; step < (final ? 40 : 14); ++step) {
    const float middle = low + 0.5f * (high - low);
    if (middle <= low || middle > high) break;
    const int64_t hits = count_at_least(value, n, middle);
    if (hits >= lists.k) {
      low = middle;
      if (!final && hits <= enough) break;
    } else {
      high = middle;
    }
  }
  const double bound = static_cast<double>(low) - lists.margin[row];
  float threshold = static_cast<float>(bound);
  if (static_cast<double>(threshold) > bound) threshold = std::nextafterf(threshold, -INFINITY);
  if (threshold > lists.threshold[row]) lists.threshold[row] = threshold;
  threshold = lists.threshold[row];
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = value[i];
    value[kept] = v;
    index[kept] = index[i];
    kept += v >= threshold;
  }
  lists.count[row] = static_cast<int32_t>(kept);
  if (kept > lists.capacity - lists.capacity / 8) {
    lists.overflow[row] = 1;
    lists.threshold[row] = INFINITY;
  }
  const int64_t wanted = 2 * kept > 4 * lists.k ? 2 * kept : 4 * lists.k;
  const int64_t limit = wanted < 128 ? 128 : wanted;
  lists.limit[row] = static_cast<int32_t>(limit < lists.capacity ? limit : lists.capacity);
}

// Adds a database row to the list of `row` if it reaches the threshold.
inline void offer(float value, int64_t row, int64_t candidate, CandidateLists& lists) {
  if (candidate >= lists.columns || candidate == lists.self[row] || lists.skip[candidate]) return;
  if (!(value >= lists.threshold[row])) return;  // the threshold may have risen since the comparison
  const int64_t slot = row * lists.capacity + lists.count[row]++;
  lists.value[slot] = value;
  lists.index[slot] = static_cast<int32_t>(candidate);
  if (lists.count[row] >= lists.limit[row]) tighten(lists, row, false);
}

// Adds the columns in row_hits to the list of the row, and the row to the lists of the columns in column_hits.
__attribute__((noinline)) void enter(const float* c, unsigned row_hits, unsigned column_hits, int64_t row,
                                     int64_t first_column, CandidateLists& lists) {
  for (; row_hits != 0; row_hits &= row_hits - 1) {
    const int lane = __builtin_ctz(row_hits);
    offer(c[lane], row, first_column + lane, lists);
  }
  for (; column_hits != 0; column_hits &= column_hits - 1) {
    const int lane = __builtin_ctz(column_hits);
    offer(c[lane], first_column + lane, row, lists);
  }
}

void filter(const float* c, int64_t rows, int64_t columns, int64_t first_row, int64_t first_column,
            CandidateLists& lists) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    const float* line = c + r * columns;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const unsigned hits = at_least(load(line + j), broadcast(lists.threshold[row]));
      if (__builtin_expect(hits != 0, 0)) enter(line + j, hits, 0, row, first_column + j, lists);
    }
  }
}

void filter_both(const float* c, int64_t rows, int64_t columns, int64_t first_row, int64_t first_column,
                 CandidateLists& lists) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    const float* line = c + r * columns;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vector value = load(line + j);
      const unsigned row_hits = at_least(value, broadcast(lists.threshold[row]));
      const unsigned column_hits = at_least(value, load(lists.threshold + first_column + j));
      if (__builtin_expect((row_hits | column_hits) != 0, 0)) {
        enter(line + j, row_hits, column_hits, row, first_column + j, lists);
      }
    }
  }
}

}  // namespace

const CpuKernels& neighbor_kernels() {
  static constexpr CpuKernels kernels = {kRows,   kColumns,     kLanes,        &dot,
                                         &round,  &product,     &product_bf16, product_avx512_bf16,
                                         &filter, &filter_both, &tighten};
  return kernels;
}

}  // namespace scan_fast::SCAN_FAST_ISA
