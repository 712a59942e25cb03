// Products of packed bfloat16 tiles, and the packing. A tile has 512 elements, 1 KiB:
//   left operands    [16 rows][32 k]                  (16 x 32, k contiguous) with AMX,
//                    [16 pairs of k][16 rows][2]      otherwise
//   right operands   [16 pairs of k][16 columns][2]   (32 x 16, pairs of k adjacent, as the instruction requires)
// All functions require bf16_tiles_are_usable(); multiply() also requires a TileSession.
#pragma once

#include <cstdint>
#include <optional>

#include "common/amx.h"

namespace scan_fast::convolution {

constexpr int64_t kTile = 16, kStep = 32, kTileElements = 512;
// Result of one call of multiply(): 32 x 32 floats as tiles (0, 0), (0, 1), (1, 0), (1, 1).
constexpr int64_t kBlock = 1024;

// Returns whether the CPU multiplies such tiles: with AMX, or in vectors with AVX-512-BF16.
bool bf16_tiles_are_usable();

// Prepares the calling thread for multiply().
class TileSession {
 public:
  TileSession() {
    if (amx_is_usable()) amx_.emplace();
  }

 private:
  std::optional<AmxSession> amx_;
};

// One pixel of 32 images: that of image i is at base + i * stride. Images from `count` on count as zeros.
struct Pixel {
  const uint16_t* base;
  int64_t stride;
  int64_t count;
};

// Packs steps * 32 channels: rows are images, k is channels. Two left tiles per step, `stride` elements between steps.
void pack_left(const Pixel& pixel, int64_t steps, uint16_t* tiles, int64_t stride);

// Packs `channels`, a multiple of 32: rows are channels, k is images. One left tile per 16 channels, contiguous.
void pack_left_transposed(const Pixel& pixel, int64_t channels, uint16_t* tiles);

// Packs `channels`, a multiple of 32: k is images, columns are channels. One right tile per 16 channels, contiguous.
void pack_right(const Pixel& pixel, int64_t channels, uint16_t* tiles);

// Pack weights (32 or 2 * 16 rows, row_stride apart) into two contiguous right tiles:
// 32 columns of 32 k, where columns are rows of memory;
void pack_weight_rows(const float* base, int64_t row_stride, uint16_t* tiles);
// 32 columns of 32 k, where k are rows of memory.
void pack_weight_pairs(const float* base, int64_t row_stride, uint16_t* tiles);

// A sequence of pairs of tiles to multiply. The second tile of a pair follows the first in memory.
struct Run {
  const uint16_t *left, *right;
  int64_t count;
};

// block = (accumulate ? block : 0) + sum over runs and their pairs of left * right. Strides are between pairs. Uses AMX if
// it is usable.
void multiply(const Run* runs, int64_t count, int64_t left_stride, int64_t right_stride, bool accumulate, float* block);

// Rounds the rows of a block to bfloat16 and stores row i < count <= 32 at base + i * stride. If `addend`, of the same
// layout, is not null, it is added first. around_caches: does not read the lines that it overwrites; a thread that did so
// ends with complete_stores().
void store_block(const float* block, const uint16_t* addend, uint16_t* base, int64_t stride, int64_t count,
                 bool around_caches);
void complete_stores();
// Returns whether that is faster and possible: for a result that the caches could not keep for the next reader.
bool stores_around_caches(int64_t bytes, const void* target);

// Sums `parts` blocks, part_stride floats apart, into 32 rows of 32 floats, row_stride apart.
void sum_blocks(const float* block, int64_t parts, int64_t part_stride, float* out, int64_t row_stride);

}  // namespace scan_fast::convolution
