// Rows of a narrow matrix in vectors, one row per lane. load_columns and store_columns move kLanes consecutive rows,
// transposed.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/simd.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

// Matrices of more columns are not moved by load_columns and store_columns; their users keep Vec[kMaxColumns].
constexpr int kMaxColumns = 32;

typedef float Quad __attribute__((vector_size(16)));
constexpr int kQuads = kLanes / 4;

inline Quad load_quad(const float* p) {
  Quad quad;
  std::memcpy(&quad, p, sizeof(quad));
  return quad;
}
// A vector of the quads at p, p + stride, ...
inline Vec load_quads(const float* p, int64_t stride) {
#if defined(SCAN_FAST_ISA_avx512)
  Vec v = _mm512_castps128_ps512(load_quad(p));
  v = _mm512_insertf32x4(v, load_quad(p + stride), 1);
  v = _mm512_insertf32x4(v, load_quad(p + 2 * stride), 2);
  return _mm512_insertf32x4(v, load_quad(p + 3 * stride), 3);
#elif defined(SCAN_FAST_ISA_avx2)
  return _mm256_set_m128(load_quad(p + stride), load_quad(p));
#else
  (void)stride;
  return load_quad(p);
#endif
}
template <int kIndex>
inline void store_quad(float* p, Vec v) {
#if defined(SCAN_FAST_ISA_avx512)
  _mm_storeu_ps(p, _mm512_extractf32x4_ps(v, kIndex));
#elif defined(SCAN_FAST_ISA_avx2)
  _mm_storeu_ps(p, _mm256_extractf128_ps(v, kIndex));
#else
  std::memcpy(p, &v, sizeof(v));
#endif
}

// Shuffles x and y quad by quad: each quad of the result holds the elements kElements of the quads of x (0 to 3) and y
// (4 to 7) at its place.
template <int... kElements>
inline Vec shuffle_quads(Vec x, Vec y) {
  static_assert(sizeof...(kElements) == 4);
  constexpr int elements[] = {kElements...};
  constexpr auto index = [](int i) { return i / 4 * 4 + elements[i % 4] % 4 + elements[i % 4] / 4 * kLanes; };
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(x, y, index(kLane)...);
  }(std::make_integer_sequence<int, kLanes>());
}

// Transposes the 4 x 4 matrices that the four vectors hold quad by quad.
inline void transpose_quads(Vec* v) {
  const Vec a = shuffle_quads<0, 4, 1, 5>(v[0], v[1]), b = shuffle_quads<0, 4, 1, 5>(v[2], v[3]);
  const Vec c = shuffle_quads<2, 6, 3, 7>(v[0], v[1]), d = shuffle_quads<2, 6, 3, 7>(v[2], v[3]);
  v[0] = shuffle_quads<0, 1, 4, 5>(a, b);
  v[1] = shuffle_quads<2, 3, 6, 7>(a, b);
  v[2] = shuffle_quads<0, 1, 4, 5>(c, d);
  v[3] = shuffle_quads<2, 3, 6, 7>(c, d);
}

// Floats of kLanes rows, and of the elements past them that the last quad reads.
constexpr int64_t kRowsScratch = kLanes * kMaxColumns + kLanes;

// columns[c][r] = p[r * count + c] for c < count and r < kLanes: kLanes rows of a row-major matrix of `count` columns,
// of which `left` elements remain from p on. Rows past the end are zeros; columns past the last, up to a multiple of
// four, hold anything.
template <typename T>
inline void load_columns(const T* p, int64_t count, int64_t left, Vec* columns) {
  float scratch[kRowsScratch];
  const float* rows = scratch;
  const int64_t all = kLanes * count;
  if (sizeof(T) == sizeof(float) && left >= all + 3) {
    rows = reinterpret_cast<const float*>(p);
  } else {
    for (int64_t i = 0; i < all + 3; i += kLanes) {
      const int64_t after = left - i;
      store(scratch + i, after >= kLanes ? load(p + i)
                         : after > 0     ? load_partial(p + i, static_cast<int>(after), 0.0f)
                                         : Vec{});
    }
  }
  for (int64_t c = 0; c < count; c += 4) {
    // The quads of one vector come from rows r, r + 4, ..., so that 4 x 4 transpositions end in the order of rows.
    for (int r = 0; r < 4; ++r) columns[c + r] = load_quads(rows + r * count + c, 4 * count);
    transpose_quads(columns + c);
  }
}

template <int kIndex>
inline void store_rows(float* rows, int64_t count, const Vec* columns) {
  if constexpr (kIndex < kQuads) {
    // In the order of rows: the next row overwrites the elements that a quad stores past the end of its row.
    for (int r = 0; r < 4; ++r) {
      for (int64_t c = 0; c < count; c += 4) store_quad<kIndex>(rows + (4 * kIndex + r) * count + c, columns[c + r]);
    }
    store_rows<kIndex + 1>(rows, count, columns);
  }
}

// The reverse for the first min(kLanes, rows left) rows. Destroys `columns`, and may write anything to the elements of
// later rows among the `left`: they must be stored afterwards.
template <typename T>
inline void store_columns(T* p, int64_t count, int64_t left, Vec* columns) {
  for (int64_t c = 0; c < count; c += 4) transpose_quads(columns + c);
  const int64_t all = kLanes * count;
  if (sizeof(T) == sizeof(float) && left >= all + 3) {
    store_rows<0>(reinterpret_cast<float*>(p), count, columns);
    return;
  }
  float scratch[kRowsScratch];
  store_rows<0>(scratch, count, columns);
  const int64_t used = left < all ? left : all;
  for (int64_t i = 0; i < used; i += kLanes) {
    const int64_t after = used - i;
    store_lanes(p + i, load(scratch + i), after < kLanes ? static_cast<int>(after) : kLanes);
  }
}

}  // namespace
}  // namespace scan_fast::SCAN_FAST_ISA
