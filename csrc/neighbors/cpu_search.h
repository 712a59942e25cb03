// Parts that the CPU neighbour searches share: measured rows, packed operands, candidate lists, and the decision by
// exact similarities.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/amx.h"
#include "common/parallel.h"
#include "neighbors/cpu_kernels.h"
#include "neighbors/neighbors.h"

namespace scan_fast::neighbors {

const CpuKernels& kernels();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised memory, aligned to cache lines. Large buffers are on huge pages if the system provides them on request:
// lists and panels are accessed in an order that would cause TLB misses on ordinary pages.
template <typename T>
class Buffer {
 public:
  void grow(int64_t size) {
    if (size <= size_) return;
    const int64_t wanted = size * static_cast<int64_t>(sizeof(T)), unit = wanted < 2 * kHugePage ? 64 : kHugePage;
    const size_t bytes = static_cast<size_t>(ceil_div(wanted, unit) * unit);
    memory_.reset(static_cast<T*>(std::aligned_alloc(static_cast<size_t>(unit), bytes)));
    if (memory_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == kHugePage) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    size_ = size;
  }
  T* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  std::unique_ptr<T[], Free> memory_;
  int64_t size_ = 0;
};

// Rows of one operand and their lengths, measured before any search.
struct Rows {
  const float* data;
  std::vector<double> length;  // sqrt(v.v), not clamped; non-finite if and only if the row has a non-finite entry
  std::vector<double> scale;   // factor to the units of the fast search
  double longest = 0;          // the largest finite length
  double shortest = 0;         // the smallest one that is not 0
  double unit = 1;             // "dot": the power of two in scale

  bool usable(int64_t row) const { return std::isfinite(length[row]); }
};

inline double cosine_length(double length) { return std::max(length, 1e-12); }

// Ways to multiply tiles: float32, or pairs of integers or bfloat16 values, in vector registers, or bfloat16 on AMX tiles.
enum class TileProducts { kFloat32, kInt16Vectors, kBf16Vectors, kBf16Amx };

// One of them. Rows are packed in panels of panel_rows. A tile is tile_rows rows of the left operand by tile_columns rows
// of the right one.
struct TileEngine {
  TileProducts products;
  int64_t dim, tile_rows, tile_columns, panel_rows, panel_bytes;

  TileEngine(TileProducts which, int64_t dim);
  bool amx() const { return products == TileProducts::kBf16Amx; }
  Rounding rounding() const {
    return products == TileProducts::kFloat32        ? Rounding::kFloat32
           : products == TileProducts::kInt16Vectors ? Rounding::kInt16
                                                     : Rounding::kBf16;
  }
  // Writes one rounded row into its zeroed panel. The two layouts are the same but for AMX.
  void pack_left(const float* rounded, int64_t row, uint8_t* packed) const;
  void pack_right(const float* rounded, int64_t row, uint8_t* packed) const;
  // Computes c (tile_rows, tile_columns) for the tile that begins at row `left` of a and row `right` of b.
  void multiply(const uint8_t* a, int64_t left, const uint8_t* b, int64_t right, float* c) const {
    const uint8_t* const a_panel = a + left / panel_rows * panel_bytes;
    const uint8_t* const b_panel = b + right / panel_rows * panel_bytes;
    if (amx()) {
      amx_product(reinterpret_cast<const uint16_t*>(a_panel), reinterpret_cast<const uint16_t*>(b_panel), dim, c);
    } else if (products == TileProducts::kInt16Vectors) {
      int16_product_(reinterpret_cast<const int32_t*>(a_panel) + left % panel_rows,
                     reinterpret_cast<const int32_t*>(b_panel), (dim + 1) / 2, c);
    } else if (products == TileProducts::kBf16Vectors) {
      bf16_product_(reinterpret_cast<const uint32_t*>(a_panel) + left % panel_rows,
                    reinterpret_cast<const uint32_t*>(b_panel), (dim + 1) / 2, c);
    } else {
      kernels().product_float32(reinterpret_cast<const float*>(a_panel) + left % panel_rows,
                                reinterpret_cast<const float*>(b_panel), dim, c);
    }
  }

 private:
  decltype(CpuKernels::product_int16) int16_product_;
  decltype(CpuKernels::product_bf16) bf16_product_;
};

// Configures AMX tiles for the calling thread if the engine uses them.
class EngineSession {
 public:
  explicit EngineSession(const TileEngine& engine) : amx_(engine.amx() ? std::make_unique<AmxSession>() : nullptr) {}

 private:
  std::unique_ptr<AmxSession> amx_;
};

// All database rows, rounded and packed.
struct PackedDatabase {
  Buffer<uint8_t> right_bytes, left_bytes;
  const uint8_t *right, *left;      // left: only for a symmetric search
  std::vector<RoundedRow> rounded;  // (rows,)
  double longest = 0;               // max |u^_j|
  double worst_residual = 0;        // max |u_j - u^_j|
};

PackedDatabase pack_database(const TileEngine& engine, const Rows& database, int64_t n, bool both_sides);

// Memory of the candidate lists of some rows. All lists are closed at first.
struct ListMemory {
  Buffer<float> threshold, value;
  Buffer<int32_t> index, count, limit;
  Buffer<double> margin;
  Buffer<int64_t> self;
  Buffer<uint8_t> overflow;

  CandidateLists open(int64_t rows, int64_t capacity, int64_t k, const std::vector<uint8_t>& skip);
};

struct Neighbor {
  float similarity;
  int32_t index;
};

// A total order, so that the k best do not depend on the order of the candidates.
inline bool better(const Neighbor& a, const Neighbor& b) {
  return a.similarity > b.similarity || (a.similarity == b.similarity && a.index < b.index);
}

// Inputs and outputs that all searches of one call share.
struct Search {
  const TopkProblem& problem;
  const Rows& queries;
  const Rows& database;
  const std::vector<uint8_t>& skip;
  float* similarity;
  int64_t* index;

  float exact(int64_t i, int64_t j) const;
  // Opens the list of query i as row `row` of the lists. If no fast search can decide, the list stays closed.
  void open(int64_t i, const RoundedRow& rounded, const PackedDatabase& packed, CandidateLists& lists,
            int64_t row) const;
  // Decides query i by the exact similarities of its candidates. Returns false if its list overflowed.
  bool decide(int64_t i, CandidateLists& lists, int64_t row, std::vector<Neighbor>& found) const;
  // Writes the k best candidates. Reorders `found`.
  void write(int64_t i, std::vector<Neighbor>& found) const;

 private:
  double error_bound(int64_t i, const RoundedRow& rounded, const PackedDatabase& packed) const;
};

// Each returns the queries that it could not decide, in ascending order.
// Searches the given queries against all rows, in blocks of queries.
std::vector<int64_t> search_blocks(const Search& search, const std::vector<int64_t>& wanted, TileProducts products,
                                   int64_t capacity);
// Searches all rows of a database against each other; each pair is multiplied once.
std::vector<int64_t> search_symmetric(const Search& search, TileProducts products, int64_t capacity);

}  // namespace scan_fast::neighbors
