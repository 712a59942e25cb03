// bfloat16 products on AMX tiles for the CPU neighbour search.
//
// A tile holds 16 rows of 64 bytes. One step multiplies 32 query rows with 32 database rows over 32 elements of dim. It
// uses four accumulator tiles, two tiles of queries and two of the database. 4 tile loads of 8 cycles stand against 4
// tile products of 16 cycles, so the matrix unit is the limit while panels come from the L1 and L2 cache. Panels are
// stored in the order of use:
//   queries   [step][half][16 rows][32 elements]
//   database  [step][half][16 pairs of elements][16 rows][2 elements]     (the instruction takes pairs along k)
// This file is compiled for AMX. Its products may be called only if amx_is_usable().
#include <cstdlib>
#include <cstring>

#include "common/amx_products.h"
#include "neighbors/cpu_kernels.h"

namespace scan_fast::neighbors {
namespace {

constexpr int64_t kStep = 32;           // elements of dim per tile product
constexpr int64_t kTileSize = 16 * 32;  // elements

int64_t steps(int64_t dim) { return (dim + kStep - 1) / kStep; }

uint16_t high_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace

int64_t amx_panel_size(int64_t dim) { return steps(dim) * 2 * kTileSize; }

void amx_pack_query(const float* rounded, int64_t dim, int64_t row_in_panel, uint16_t* panel) {
  uint16_t* out = panel + (row_in_panel / 16) * kTileSize + (row_in_panel % 16) * kStep;
  for (int64_t d = 0; d < dim; ++d) out[(d / kStep) * 2 * kTileSize + d % kStep] = high_half(rounded[d]);
}

void amx_pack_database(const float* rounded, int64_t dim, int64_t row_in_panel, uint16_t* panel) {
  uint16_t* out = panel + (row_in_panel / 16) * kTileSize + (row_in_panel % 16) * 2;
  for (int64_t d = 0; d < dim; ++d) {
    out[(d / kStep) * 2 * kTileSize + (d % kStep) / 2 * 32 + d % 2] = high_half(rounded[d]);
  }
}

#if defined(__AMX_BF16__)

void amx_product(const uint16_t* a, const uint16_t* b, int64_t dim, float* c) {
  zero_tile_sums();
  for (int64_t step = steps(dim); step > 0; --step, a += 2 * kTileSize, b += 2 * kTileSize) {
    add_tile_products(a, b);
  }
  const int stride = kAmxTile * sizeof(float);
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  _tile_stored(2, c + 16 * kAmxTile, stride);
  _tile_stored(3, c + 16 * kAmxTile + 16, stride);
}

#else

void amx_product(const uint16_t*, const uint16_t*, int64_t, float*) { std::abort(); }

#endif

}  // namespace scan_fast::neighbors
