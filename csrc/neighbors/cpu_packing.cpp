// Operands and candidate lists of the CPU neighbour search.
//
// Rows are scaled, rounded and packed once, in the order in which the tile products read them. AMX needs its left
// operand by rows and its right one by pairs of columns (cpu_amx.cpp). Vectors need panels (dim, lanes) on both
// sides (cpu_kernels.cpp), so one packed copy serves both.
#include <cstring>

#include "neighbors/cpu_search.h"

namespace scan_fast::neighbors {

TileEngine::TileEngine(TileProducts which, int64_t n_columns)
    : products(which),
      dim(n_columns),
      tile_rows(amx() ? kAmxTile : kernels().tile_rows),
      tile_columns(amx() ? kAmxTile : kernels().tile_columns),
      panel_rows(amx() ? kAmxTile : kernels().panel_rows),
      panel_bytes(amx()                                ? amx_panel_size(dim) * 2
                  : products == TileProducts::kFloat32 ? panel_rows * dim * 4
                                                       : panel_rows * ((dim + 1) / 2) * 4),
      int16_product_(cpu_has_avx512_vnni() ? kernels().product_avx512_vnni : kernels().product_int16),
      bf16_product_(cpu_has_avx512_bf16() ? kernels().product_avx512_bf16 : kernels().product_bf16) {}

void TileEngine::pack_left(const float* rounded, int64_t row, uint8_t* packed) const {
  uint8_t* const panel = packed + row / panel_rows * panel_bytes;
  if (amx()) {
    amx_pack_query(rounded, dim, row % panel_rows, reinterpret_cast<uint16_t*>(panel));
  } else if (products == TileProducts::kInt16Vectors) {
    int16_t* const out = reinterpret_cast<int16_t*>(panel) + row % panel_rows * 2;
    for (int64_t d = 0; d < dim; ++d) {
      out[d / 2 * 2 * panel_rows + d % 2] = static_cast<int16_t>(rounded[d] * 0x1p15f);
    }
  } else if (products == TileProducts::kBf16Vectors) {
    uint16_t* const out = reinterpret_cast<uint16_t*>(panel) + row % panel_rows * 2;
    for (int64_t d = 0; d < dim; ++d) {
      uint32_t bits;
      std::memcpy(&bits, rounded + d, sizeof(bits));
      out[d / 2 * 2 * panel_rows + d % 2] = static_cast<uint16_t>(bits >> 16);
    }
  } else {
    float* const out = reinterpret_cast<float*>(panel) + row % panel_rows;
    for (int64_t d = 0; d < dim; ++d) out[d * panel_rows] = rounded[d];
  }
}

void TileEngine::pack_right(const float* rounded, int64_t row, uint8_t* packed) const {
  if (!amx()) return pack_left(rounded, row, packed);
  amx_pack_database(rounded, dim, row % panel_rows,
                    reinterpret_cast<uint16_t*>(packed + row / panel_rows * panel_bytes));
}

PackedDatabase pack_database(const TileEngine& engine, const Rows& database, int64_t n, bool both_sides) {
  const int64_t padded = ceil_div(n, engine.tile_columns) * engine.tile_columns;
  const int64_t panels = padded / engine.panel_rows;
  PackedDatabase packed{};
  packed.rounded.resize(n);
  packed.right_bytes.grow(panels * engine.panel_bytes);
  packed.right = packed.right_bytes.data();
  packed.left = engine.amx() ? nullptr : packed.right;
  if (both_sides && engine.amx()) {
    packed.left_bytes.grow(panels * engine.panel_bytes);
    packed.left = packed.left_bytes.data();
  }
  parallel_for(panels, [&](int64_t panel, int) {
    std::vector<float> rounded(engine.dim);
    std::fill_n(packed.right_bytes.data() + panel * engine.panel_bytes, engine.panel_bytes, uint8_t{0});
    if (packed.left_bytes.data() != nullptr) {
      std::fill_n(packed.left_bytes.data() + panel * engine.panel_bytes, engine.panel_bytes, uint8_t{0});
    }
    for (int64_t j = panel * engine.panel_rows; j < std::min(n, (panel + 1) * engine.panel_rows); ++j) {
      if (!database.usable(j)) continue;
      packed.rounded[j] = kernels().round(database.data + j * engine.dim, database.scale[j], engine.dim,
                                          engine.rounding(), rounded.data());
      engine.pack_right(rounded.data(), j, packed.right_bytes.data());
      if (packed.left_bytes.data() != nullptr) engine.pack_left(rounded.data(), j, packed.left_bytes.data());
    }
  });
  for (const RoundedRow& row : packed.rounded) {
    packed.worst_residual = std::max(packed.worst_residual, row.residual_squared);
    packed.longest = std::max(packed.longest, row.norm_squared);
  }
  packed.worst_residual = std::sqrt(packed.worst_residual);
  packed.longest = std::sqrt(packed.longest);
  return packed;
}

CandidateLists ListMemory::open(int64_t rows, int64_t capacity, int64_t k, const std::vector<uint8_t>& skip) {
  threshold.grow(rows);
  value.grow(rows * capacity);
  index.grow(rows * capacity);
  count.grow(rows);
  limit.grow(rows);
  margin.grow(rows);
  self.grow(rows);
  overflow.grow(rows);
  std::fill_n(threshold.data(), rows, std::numeric_limits<float>::infinity());
  std::fill_n(count.data(), rows, 0);
  std::fill_n(limit.data(), rows, static_cast<int32_t>(std::min(capacity, k + std::max(k, kFewestNew))));
  std::fill_n(margin.data(), rows, 0.0);
  std::fill_n(self.data(), rows, int64_t{-1});
  std::fill_n(overflow.data(), rows, uint8_t{0});
  return {threshold.data(), value.data(),
          index.data(),     count.data(),
          limit.data(),     overflow.data(),
          margin.data(),    self.data(),
          skip.data(),      static_cast<int64_t>(skip.size()),
          capacity,         k};
}

}  // namespace scan_fast::neighbors
