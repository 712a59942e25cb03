// The only file of its family that is compiled with AMX and AVX-512.
//
// One step of multiply() has two left tiles and two right tiles: 4 tile loads of 8 cycles against 4 tile products of 16
// cycles. It reaches 3.3 Tflop/s per core if both operands come from the L1 cache, and 2.2 if both come from L2
// (Sapphire Rapids). Hence runs of about eight steps over operands that the next call uses again.
#include "convolution/amx_tiles.h"

#if defined(__AMX_BF16__)

#include "common/intrinsics.h"

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

}  // namespace

void pack_left(const Pixel& pixel, int64_t steps, uint16_t* tiles, int64_t stride) {
  for (int64_t i = 0; i < 2 * kTile; ++i) {
    uint16_t* out = tiles + i * kStep;
    for (int64_t s = 0; s < steps; ++s, out += stride) _mm512_storeu_si512(out, row_of(pixel, i, s * kStep));
  }
}

void pack_left_transposed(const Pixel& pixel, int64_t channels, uint16_t* tiles) {
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
  constexpr int64_t kResult = kBlock / 4;
  if (accumulate) {
    _tile_loadd(0, block, 64);
    _tile_loadd(1, block + kResult, 64);
    _tile_loadd(2, block + 2 * kResult, 64);
    _tile_loadd(3, block + 3 * kResult, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const Run* run = runs; run < runs + count; ++run) {
    const uint16_t *left = run->left, *right = run->right;
    for (int64_t i = run->count; i > 0; --i, left += left_stride, right += right_stride) {
      _tile_loadd(4, left, 64);
      _tile_loadd(6, right, 64);
      _tile_loadd(7, right + kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, left + kTileElements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, block, 64);
  _tile_stored(1, block + kResult, 64);
  _tile_stored(2, block + 2 * kResult, 64);
  _tile_stored(3, block + 3 * kResult, 64);
}

void store_block(const float* block, const uint16_t* addend, uint16_t* base, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = block + i / kTile * (kBlock / 2) + i % kTile * kTile;
    __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + kBlock / 4);
    if (addend != nullptr) {
      low = _mm512_add_ps(low, widened(addend + i * stride));
      high = _mm512_add_ps(high, widened(addend + i * stride + kTile));
    }
    _mm512_storeu_si512(base + i * stride, rounded(low, high));
  }
}

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

void pack_left(const Pixel&, int64_t, uint16_t*, int64_t) { std::abort(); }
void pack_left_transposed(const Pixel&, int64_t, uint16_t*) { std::abort(); }
void pack_right(const Pixel&, int64_t, uint16_t*) { std::abort(); }
void pack_weight_rows(const float*, int64_t, uint16_t*) { std::abort(); }
void pack_weight_pairs(const float*, int64_t, uint16_t*) { std::abort(); }
void multiply(const Run*, int64_t, int64_t, int64_t, bool, float*) { std::abort(); }
void store_block(const float*, const uint16_t*, uint16_t*, int64_t, int64_t) { std::abort(); }
void sum_blocks(const float*, int64_t, int64_t, float*, int64_t) { std::abort(); }

}  // namespace scan_fast::convolution

#endif
