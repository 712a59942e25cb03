// Products of packed bfloat16 tiles, and the packing. A tile is 512 elements, 1 KiB:
//   left operands    [16 rows][32 k]                  (16 x 32, k contiguous)
//   right operands   [16 pairs of k][16 columns][2]   (32 x 16, pairs of k adjacent, as the instruction wants them)
// Everything here runs on a processor with AMX alone (common/amx.h), multiply() within an AmxSession.
#pragma once

#include <cstdint>

namespace scan_fast::convolution {

constexpr int64_t kTile = 16, kStep = 32, kTileElements = 512;
// What one call of multiply() makes: 32 x 32 floats as tiles (0, 0), (0, 1), (1, 0), (1, 1).
constexpr int64_t kBlock = 1024;

// The same place in 32 images: that of image i is at base + i * stride. Images from `count` on are all zeros.
struct Pixel {
  const uint16_t* base;
  int64_t stride;
  int64_t count;
};

// steps * 32 channels: rows are images, k is channels. Two left tiles per step, `stride` elements from step to step.
void pack_left(const Pixel& pixel, int64_t steps, uint16_t* tiles, int64_t stride);

// `channels`, a multiple of 32: rows are channels, k is images. One left tile per 16 channels, one after the other.
void pack_left_transposed(const Pixel& pixel, int64_t channels, uint16_t* tiles);

// `channels`, a multiple of 32: k is images, columns are channels. One right tile per 16 channels, one after the other.
void pack_right(const Pixel& pixel, int64_t channels, uint16_t* tiles);

// Weights (32 or 2 * 16 rows, row_stride apart) to two right tiles, one after the other:
// 32 columns of 32 k, columns being rows of memory;
void pack_weight_rows(const float* base, int64_t row_stride, uint16_t* tiles);
// 32 columns of 32 k, k being rows of memory.
void pack_weight_pairs(const float* base, int64_t row_stride, uint16_t* tiles);

// Pairs of tiles to be multiplied one after the other; the second tile of a pair follows the first.
struct Run {
  const uint16_t *left, *right;
  int64_t count;
};

// block = (accumulate ? block : 0) + sum over runs and their pairs of left right. Strides are from pair to pair.
void multiply(const Run* runs, int64_t count, int64_t left_stride, int64_t right_stride, bool accumulate,
              float* block);

// The rows of a block, rounded to bfloat16, to base + i * stride for i < count <= 32; added to those of `addend`, laid out
// in the same way, where it is not null.
void store_block(const float* block, const uint16_t* addend, uint16_t* base, int64_t stride, int64_t count);

// The sum over `parts` of a block, part_stride floats apart, to 32 rows of 32 floats, row_stride apart.
void sum_blocks(const float* block, int64_t parts, int64_t part_stride, float* out, int64_t row_stride);

}  // namespace scan_fast::convolution
