// Inner loops of the CPU neighbour search, one set per instruction set. No standard library templates here: an inline
// function that the linker merges across instruction sets could crash an older CPU.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"

namespace scan_fast::neighbors {

// A list is tightened when it has twice what was kept, or this many more.
constexpr int64_t kFewestNew = 32;

// Candidate lists of a block of query rows. Row r uses value[r * capacity ..] and index[r * capacity ..].
struct CandidateLists {
  float* threshold;     // (rows,) lowest fast similarity that enters the list; +inf: the row is closed
  float* value;         // (rows, capacity) fast similarities
  int32_t* index;       // (rows, capacity) database rows
  int32_t* count;       // (rows,)
  int32_t* limit;       // (rows,) count at which the list is tightened; at most capacity
  uint8_t* overflow;    // (rows,) set if the list exceeded its capacity; the row is then closed
  double* margin;       // (rows,) 2 eps, in the units of the fast search
  int64_t* self;        // (rows,) the excluded column, or -1
  const uint8_t* skip;  // (columns,) non-zero: this database row is never a neighbour
  int64_t columns;
  int64_t capacity;
  int64_t k;
};

// Formats of rounded rows: all are exact in float32. kInt16: multiples of 2^-15, of which each row is shorter than 1.2.
enum class Rounding { kFloat32, kBf16, kInt16 };

// Residual and norm of a rounded row, in the units of the fast search.
struct RoundedRow {
  double residual_squared;  // |u - u^|^2
  double norm_squared;      // |u^|^2
};

struct CpuKernels {
  // A product computes a tile of tile_rows rows with tile_columns rows. Operands are packed in panels (depth, panel_rows);
  // tile_rows divides panel_rows, and panel_rows divides tile_columns.
  int64_t tile_rows;
  int64_t tile_columns;
  int64_t panel_rows;
  // Whether product_int16 is faster than product_float32. product_avx512_vnni always is.
  bool prefers_int16;

  // The exact sum of neighbors.h.
  double (*dot)(const float* a, const float* b, int64_t dim);

  // u = x * scale, rounded. Subnormal results become zero.
  RoundedRow (*round)(const float* x, double scale, int64_t dim, Rounding rounding, float* rounded);

  // c (tile_rows, tile_columns). a points to the first row within its panel, b to the first of its panels.
  void (*product_float32)(const float* a, const float* b, int64_t dim, float* c);
  // The same for rows of 16-bit values. A 32-bit word holds two consecutive elements of a row, the first in its low half;
  // panels are (pairs, panel_rows) words. Integers are in units of 2^-15. product_int16 and product_bf16 run
  // everywhere, product_avx512_vnni only if cpu_has_avx512_vnni(), product_avx512_bf16 only if cpu_has_avx512_bf16(); they are
  // null in the other sets.
  void (*product_int16)(const int32_t* a, const int32_t* b, int64_t pairs, float* c);
  void (*product_avx512_vnni)(const int32_t* a, const int32_t* b, int64_t pairs, float* c);
  void (*product_bf16)(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c);
  void (*product_avx512_bf16)(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c);

  // Adds every element of a tile that reaches its row's threshold to the row's list. Rows beyond the end of the lists
  // must exist and be closed. A tile has at most 64 columns.
  void (*filter)(const float* c, int64_t rows, int64_t columns, int64_t first_row, int64_t first_column,
                 CandidateLists& lists);
  // The same for the rows and the columns of a tile; the columns are rows of the lists as well.
  void (*filter_both)(const float* c, int64_t rows, int64_t columns, int64_t first_row, int64_t first_column,
                      CandidateLists& lists);

  // Raises the row's threshold and drops the candidates below it. final: as tight as float32 allows.
  void (*tighten)(CandidateLists& lists, int64_t row, bool final);
};

}  // namespace scan_fast::neighbors

SCAN_FAST_DECLARE_PER_ISA(const neighbors::CpuKernels& neighbor_kernels())

#if defined(__x86_64__)
namespace scan_fast::avx512 {
void neighbor_product_bf16(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c);  // cpu_bf16.cpp
void neighbor_product_vnni(const int32_t* a, const int32_t* b, int64_t pairs, float* c);    // cpu_vnni.cpp
}  // namespace scan_fast::avx512
#endif

namespace scan_fast::neighbors {

// bfloat16 products on AMX tiles: 32 query rows with 32 database rows. cpu_amx.cpp describes the layout of panels.
constexpr int64_t kAmxTile = 32;

// Returns the size in elements of a packed panel of kAmxTile rows.
int64_t amx_panel_size(int64_t dim);

// Writes one rounded row, whose values are exact in bfloat16, into a query panel or a database panel.
void amx_pack_query(const float* rounded, int64_t dim, int64_t row_in_panel, uint16_t* panel);
void amx_pack_database(const float* rounded, int64_t dim, int64_t row_in_panel, uint16_t* panel);

// c (32, 32) = a b^T. Requires an AmxSession.
void amx_product(const uint16_t* a, const uint16_t* b, int64_t dim, float* c);

}  // namespace scan_fast::neighbors
