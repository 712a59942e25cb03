// Products of bfloat16 tiles of 512 elements, for sources that are compiled with AMX; they require an AmxSession. Sums are
// 32 x 32 floats in tiles 0 to 3, by rows.
#pragma once

#if defined(__AMX_BF16__)

#include <cstdint>

#include "common/intrinsics.h"

namespace scan_fast {
namespace {

inline __attribute__((always_inline)) void zero_tile_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Adds two left tiles (16 rows x 32) times two right tiles (32 x 16, pairs of k adjacent). The second follows the first.
inline __attribute__((always_inline)) void add_tile_products(const uint16_t* left, const uint16_t* right) {
  _tile_loadd(4, left, 64);
  _tile_loadd(6, right, 64);
  _tile_loadd(7, right + 512, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, left + 512, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

}  // namespace
}  // namespace scan_fast

#endif
