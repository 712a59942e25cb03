// The only file of its family that is compiled with AMX and AVX-512.
//
// One step of multiply() has two left tiles and two right tiles. With AMX these are 4 tile loads of 8 cycles against 4 tile
// products of 16 cycles. It reaches 3.3 Tflop/s per core if both operands come from the L1 cache, and 2.2 if both come from
// L2 (Sapphire Rapids). Hence runs of about eight steps over operands that the next call uses again.
//
// In vectors, the sums of 11 rows and 32 columns fill 22 registers. A pair of k costs 2 loads and 11 broadcasts against 22
// products; Zen 5 begins two of either per cycle. So a run is read three times, from the L1 cache. The broadcasts of a pair
// of k are neighbours in memory: with rows of 64 bytes, as AMX wants them, two at a time would need the same bank of the
// cache, and the products took 1.2 times as long.
#include "convolution/bf16_tiles.h"

#if defined(__AMX_BF16__)

#include <cstring>

#include "common/amx_products.h"
#include "common/cpu_features.h"

namespace scan_fast::convolution {
namespace {

// Loads 32 channels of image i, or zeros.
inline __m512i row_of(const Pixel& pixel, int64_t i, int64_t channel) {
  const __mmask32 all = i < pixel.count ? 0xffffffffu : 0u;
  return _mm512_maskz_loadu_epi16(all, pixel.base + (i * pixel.stride + channel));
}

// Interleaves elements 0 to 15, or 16 to 31, of two rows.
inline __m512i low_pairs(__m512i first, __m512i second) {
  const __m512i index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(first, index, second);
}
inline __m512i high_pairs(__m512i first, __m512i second) {
  const __m512i index = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                         53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(first, index, second);
}

// Transposes 16 x 16 elements of 32 bits.
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline void store_tile(const __m512i (&v)[16], uint16_t* tile) {
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * kStep, v[i]);
}

inline __m512i rounded(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

inline __m512 widened(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void multiply_amx(const Run* runs, int64_t count, int64_t left_stride, int64_t right_stride, bool accumulate,
                  float* block) {
  constexpr int64_t kResult = kBlock / 4;
  if (accumulate) {
    _tile_loadd(0, block, 64);
    _tile_loadd(1, block + kResult, 64);
    _tile_loadd(2, block + 2 * kResult, 64);
    _tile_loadd(3, block + 3 * kResult, 64);
  } else {
    zero_tile_sums();
  }
  for (const Run* run = runs; run < runs + count; ++run) {
    const uint16_t *left = run->left, *right = run->right;
    for (int64_t i = run->count; i > 0; --i, left += left_stride, right += right_stride) {
      add_tile_products(left, right);
    }
  }
  _tile_stored(0, block, 64);
  _tile_stored(1, block + kResult, 64);
  _tile_stored(2, block + 2 * kResult, 64);
  _tile_stored(3, block + 3 * kResult, 64);
}

// pack_left() for multiply_rows(). The images lie far apart, so no hardware prefetcher follows: each line of the pixel after
// the next is requested here.
void pack_left_pairs(const Pixel& pixel, int64_t steps, uint16_t* tiles, int64_t stride) {
  for (int64_t half = 0; half < 2; ++half, tiles += kTileElements) {
    for (int64_t s = 0; s < steps; ++s) {
      __m512i v[16];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t image = half * kTile + i;
        v[i] = row_of(pixel, image, s * kStep);
        if (image < pixel.count) _mm_prefetch(pixel.base + image * pixel.stride + (s + 2 * steps) * kStep, _MM_HINT_T0);
      }
      transpose(v);
      store_tile(v, tiles + s * stride);
    }
  }
}

// The place of a row in a pair of left tiles [16 pairs of k][16 rows][2].
constexpr int64_t left_row(int64_t row) { return row / kTile * kTileElements + row % kTile * 2; }

// Computes rows kFirst to kFirst + kRows - 1 of the block.
template <int kFirst, int kRows>
void multiply_rows(const Run* runs, int64_t count, int64_t left_stride, int64_t right_stride, bool accumulate,
                   float* block) {
  const auto row_of_block = [&](int r) {
    return block + (kFirst + r) / kTile * (kBlock / 2) + (kFirst + r) % kTile * kTile;
  };
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = accumulate ? _mm512_loadu_ps(row_of_block(r)) : _mm512_setzero_ps();
    sum[r][1] = accumulate ? _mm512_loadu_ps(row_of_block(r) + kBlock / 4) : _mm512_setzero_ps();
  }
  for (const Run* run = runs; run < runs + count; ++run) {
    const uint16_t *left = run->left, *right = run->right;
    for (int64_t i = run->count; i > 0; --i, left += left_stride, right += right_stride) {
      for (int64_t k = 0; k < kTile; ++k) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(right + k * kStep);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(right + kTileElements + k * kStep);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          int pair;
          std::memcpy(&pair, left + left_row(kFirst + r) + k * kStep, sizeof(pair));
          const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], row, low);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], row, high);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(row_of_block(r), sum[r][0]);
    _mm512_storeu_ps(row_of_block(r) + kBlock / 4, sum[r][1]);
  }
}

}  // namespace

bool bf16_tiles_are_usable() { return amx_is_usable() || (cpu_has_avx512_bf16() && cpu_multiplies_bf16_vectors()); }

void pack_left(const Pixel& pixel, int64_t steps, uint16_t* tiles, int64_t stride) {
  if (!amx_is_usable()) return pack_left_pairs(pixel, steps, tiles, stride);
  for (int64_t i = 0; i < 2 * kTile; ++i) {
    uint16_t* out = tiles + i * kStep;
    for (int64_t s = 0; s < steps; ++s, out += stride) _mm512_storeu_si512(out, row_of(pixel, i, s * kStep));
  }
}

void pack_left_transposed(const Pixel& pixel, int64_t channels, uint16_t* tiles) {
  if (!amx_is_usable()) return pack_right(pixel, channels, tiles);
  for (int64_t c = 0; c < channels; c += kStep, tiles += 2 * kTileElements) {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      const __m512i first = row_of(pixel, 2 * i, c), second = row_of(pixel, 2 * i + 1, c);
      low[i] = low_pairs(first, second);
      high[i] = high_pairs(first, second);
    }
    transpose(low);
    store_tile(low, tiles);
    transpose(high);
    store_tile(high, tiles + kTileElements);
  }
}

void pack_right(const Pixel& pixel, int64_t channels, uint16_t* tiles) {
  for (int64_t i = 0; i < kTile; ++i) {
    uint16_t* out = tiles + i * kStep;
    for (int64_t c = 0; c < channels; c += kStep, out += 2 * kTileElements) {
      const __m512i first = row_of(pixel, 2 * i, c), second = row_of(pixel, 2 * i + 1, c);
      _mm512_storeu_si512(out, low_pairs(first, second));
      _mm512_storeu_si512(out + kTileElements, high_pairs(first, second));
    }
  }
}

void pack_weight_rows(const float* base, int64_t row_stride, uint16_t* tiles) {
  for (int half = 0; half < 2; ++half, base += kTile * row_stride, tiles += kTileElements) {
    __m512i v[16];
    for (int i = 0; i < 16; ++i) {
      const float* row = base + i * row_stride;
      v[i] = rounded(_mm512_loadu_ps(row), _mm512_loadu_ps(row + 16));
    }
    transpose(v);
    store_tile(v, tiles);
  }
}

void pack_weight_pairs(const float* base, int64_t row_stride, uint16_t* tiles) {
  for (int64_t i = 0; i < kTile; ++i) {
    const float *row = base + 2 * i * row_stride, *next = row + row_stride;
    const __m512i first = rounded(_mm512_loadu_ps(row), _mm512_loadu_ps(row + 16));
    const __m512i second = rounded(_mm512_loadu_ps(next), _mm512_loadu_ps(next + 16));
    _mm512_storeu_si512(tiles + i * kStep, low_pairs(first, second));
    _mm512_storeu_si512(tiles + kTileElements + i * kStep, high_pairs(first, second));
  }
}

void multiply(const Run* runs, int64_t count, int64_t left_stride, int64_t right_stride, bool accumulate,
              float* block) {
  if (amx_is_usable()) return multiply_amx(runs, count, left_stride, right_stride, accumulate, block);
  multiply_rows<0, 11>(runs, count, left_stride, right_stride, accumulate, block);
  multiply_rows<11, 11>(runs, count, left_stride, right_stride, accumulate, block);
  multiply_rows<22, 10>(runs, count, left_stride, right_stride, accumulate, block);
}

void store_block(const float* block, const uint16_t* addend, uint16_t* base, int64_t stride, int64_t count,
                 bool around_caches) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = block + i / kTile * (kBlock / 2) + i % kTile * kTile;
    __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + kBlock / 4);
    if (addend != nullptr) {
      low = _mm512_add_ps(low, widened(addend + i * stride));
      high = _mm512_add_ps(high, widened(addend + i * stride + kTile));
    }
    if (around_caches) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(base + i * stride), rounded(low, high));
    } else {
      _mm512_storeu_si512(base + i * stride, rounded(low, high));
    }
  }
}

bool stores_around_caches(int64_t bytes, const void* target) {
  constexpr int64_t kFewest = int64_t{64} << 20;
  return !amx_is_usable() && bytes >= kFewest && reinterpret_cast<uintptr_t>(target) % 64 == 0;
}

void complete_stores() { _mm_sfence(); }

void sum_blocks(const float* block, int64_t parts, int64_t part_stride, float* out, int64_t row_stride) {
  for (int64_t i = 0; i < 2 * kTile; ++i) {
    const float* from = block + i / kTile * (kBlock / 2) + i % kTile * kTile;
    for (int64_t half = 0; half < 2; ++half, from += kBlock / 4) {
      __m512 sum = _mm512_loadu_ps(from);
      for (int64_t p = 1; p < parts; ++p) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + p * part_stride));
      _mm512_storeu_ps(out + i * row_stride + half * kTile, sum);
    }
  }
}

}  // namespace scan_fast::convolution

#else

#include <cstdlib>

// convolution_is_usable() is false in such a build.
namespace scan_fast::convolution {

bool bf16_tiles_are_usable() { return false; }
void pack_left(const Pixel&, int64_t, uint16_t*, int64_t) { std::abort(); }
void pack_left_transposed(const Pixel&, int64_t, uint16_t*) { std::abort(); }
void pack_right(const Pixel&, int64_t, uint16_t*) { std::abort(); }
void pack_weight_rows(const float*, int64_t, uint16_t*) { std::abort(); }
void pack_weight_pairs(const float*, int64_t, uint16_t*) { std::abort(); }
void multiply(const Run*, int64_t, int64_t, int64_t, bool, float*) { std::abort(); }
void store_block(const float*, const uint16_t*, uint16_t*, int64_t, int64_t, bool) { std::abort(); }
void complete_stores() { std::abort(); }
bool stores_around_caches(int64_t, const void*) { std::abort(); }
void sum_blocks(const float*, int64_t, int64_t, float*, int64_t) { std::abort(); }

}  // namespace scan_fast::convolution

#endif
