// Inner loops of the CPU neighbour search, compiled once per instruction set (SCAN_FAST_ISA).
//
// product_*: a register tile of sums over the whole of dim (common/register_tiles.h). The tile is written once, to a few
// KiB that stay in the L1 cache. Both operands are panels of kLanes rows, so one packed copy of a row serves either side.
// filter: one comparison per vector of the tile and side. Candidates are rare (about k + k ln(N / k) per row), so the
// scalar code for a candidate costs little.
#include <cmath>
#include <cstring>

#include "neighbors/cpu_kernels.h"
#include "neighbors/cpu_tile.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

using neighbors::CandidateLists;
using neighbors::CpuKernels;
using neighbors::kFewestNew;
using neighbors::RoundedRow;
using neighbors::Rounding;

inline unsigned at_least(Vec v, Vec bound) {
#if defined(SCAN_FAST_ISA_avx512)
  return _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ);
#else
  return lane_bits(v >= bound);
#endif
}

// Half a vector of floats, widened: one register of doubles. GCC passes wider vectors through memory.
constexpr int kDoubles = kLanes / 2;
typedef float Floats __attribute__((vector_size(kDoubles * 4)));
typedef uint32_t FloatBits __attribute__((vector_size(kDoubles * 4)));
typedef double Doubles __attribute__((vector_size(kDoubles * 8)));

// GCC splits __builtin_convertvector for AVX2 into halves.
inline Doubles widened(Floats v) {
#if defined(SCAN_FAST_ISA_avx512)
  return _mm512_cvtps_pd(v);
#elif defined(SCAN_FAST_ISA_avx2)
  return _mm256_cvtps_pd(v);
#else
  return __builtin_convertvector(v, Doubles);
#endif
}
inline Doubles load_widened(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return widened(v);
}

// ---- exact sum ----------------------------------------------------------------------------------------------------

double dot(const float* a, const float* b, int64_t dim) {
  constexpr int kParts = 32 / kDoubles;
  Doubles sum[kParts] = {};
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) {
      sum[part] += load_widened(a + d + kDoubles * part) * load_widened(b + d + kDoubles * part);
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

RoundedRow round(const float* x, double scale, int64_t dim, Rounding rounding, float* rounded) {
  Doubles residual = {}, norm = {};
  for (int64_t d = 0; d < dim; d += kDoubles) {
    Floats piece = {};
    const int64_t rest = dim - d < kDoubles ? dim - d : kDoubles;
    std::memcpy(&piece, x + d, static_cast<size_t>(rest) * sizeof(float));
    const Doubles exact = widened(piece) * scale;
    Doubles near = exact;
    if (rounding == Rounding::kInt16) {
      near = exact * 0x1p15 + 0x1.8p52 - 0x1.8p52;  // to the nearest integer
      near = near > 32767.0 ? Doubles{} + 32767.0 : near;
      near = (near < -32767.0 ? Doubles{} - 32767.0 : near) * 0x1p-15;
    }
    FloatBits bits = reinterpret_cast<FloatBits>(__builtin_convertvector(near, Floats));
    if (rounding == Rounding::kBf16) bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    // AMX reads subnormals as zero. Flushing them here makes this part of the residual.
    bits &= reinterpret_cast<FloatBits>((bits & 0x7f800000u) != 0u);
    const Floats kept = reinterpret_cast<Floats>(bits);
    const Doubles wide = widened(kept);
    residual += (exact - wide) * (exact - wide);
    norm += wide * wide;
    std::memcpy(rounded + d, &kept, static_cast<size_t>(rest) * sizeof(float));
  }
  RoundedRow result = {0, 0};
  for (int l = 0; l < kDoubles; ++l) {
    result.residual_squared += residual[l];
    result.norm_squared += norm[l];
  }
  return result;
}

// ---- products -----------------------------------------------------------------------------------------------------

void product_float32(const float* a, const float* b, int64_t dim, float* c) { multiply_tile<Vec>(a, b, dim, c); }
void product_int16(const int32_t* a, const int32_t* b, int64_t pairs, float* c) {
  multiply_tile<IntVec>(a, b, pairs, c);
}
void product_bf16(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c) { multiply_tile<Vec>(a, b, pairs, c); }

// One instruction multiplies twice as many integers as floats, but a second one adds the sums. AVX2: faster if the processor
// has more units for sums than for products, otherwise no slower. SSE2: twice as fast, because float products take a second
// instruction as well. AVX-512: sums and products share two units, so integers gain nothing (a prediction) without
// AVX-512-VNNI.
#if defined(SCAN_FAST_ISA_avx512)
constexpr auto product_avx512_bf16 = &neighbor_product_bf16;
constexpr auto product_avx512_vnni = &neighbor_product_vnni;
constexpr bool kPrefersInt16 = false;
#else
constexpr decltype(&product_bf16) product_avx512_bf16 = nullptr;
constexpr decltype(&product_int16) product_avx512_vnni = nullptr;
#if defined(__SSE2__)
constexpr bool kPrefersInt16 = true;
#else
constexpr bool kPrefersInt16 = false;
#endif
#endif

// ---- candidate lists ----------------------------------------------------------------------------------------------

int64_t count_at_least(const float* value, int64_t n, float bound) {
  const Vec wide = splat(bound);
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
  const int64_t limit = kept + (kept > kFewestNew ? kept : kFewestNew);
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
__attribute__((noinline)) void enter(const float* line, uint64_t row_hits, uint64_t column_hits, int64_t row,
                                     int64_t first_column, CandidateLists& lists) {
  for (; row_hits != 0; row_hits &= row_hits - 1) {
    const int lane = __builtin_ctzll(row_hits);
    offer(line[lane], row, first_column + lane, lists);
  }
  for (; column_hits != 0; column_hits &= column_hits - 1) {
    const int lane = __builtin_ctzll(column_hits);
    offer(line[lane], first_column + lane, row, lists);
  }
}

template <bool kBoth>
inline __attribute__((always_inline)) void filter_lines(const float* c, int64_t rows, int64_t columns,
                                                        int64_t first_row, int64_t first_column,
                                                        CandidateLists& lists) {
  for (int64_t row = first_row; row < first_row + rows; ++row, c += columns) {
    const Vec row_bound = splat(lists.threshold[row]);
    uint64_t row_hits = 0, column_hits = 0;
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Vec value = load(c + j);
      row_hits |= static_cast<uint64_t>(at_least(value, row_bound)) << j;
      if (kBoth) {
        const Vec bounds = load(lists.threshold + first_column + j);
        column_hits |= static_cast<uint64_t>(at_least(value, bounds)) << j;
      }
    }
    if ((row_hits | column_hits) != 0) enter(c, row_hits, column_hits, row, first_column, lists);
  }
}

template <bool kBoth>
void filter(const float* c, int64_t rows, int64_t columns, int64_t first_row, int64_t first_column,
            CandidateLists& lists) {
  if (columns == kTileColumns) {
    filter_lines<kBoth>(c, rows, kTileColumns, first_row, first_column, lists);
  } else {
    filter_lines<kBoth>(c, rows, columns, first_row, first_column, lists);
  }
}

}  // namespace

const CpuKernels& neighbor_kernels() {
  static constexpr CpuKernels kernels = {kWideRows,
                                         kTileColumns,
                                         kLanes,
                                         kPrefersInt16,
                                         &dot,
                                         &round,
                                         &product_float32,
                                         &product_int16,
                                         product_avx512_vnni,
                                         &product_bf16,
                                         product_avx512_bf16,
                                         &filter<false>,
                                         &filter<true>,
                                         &tighten};
  return kernels;
}

}  // namespace scan_fast::SCAN_FAST_ISA
