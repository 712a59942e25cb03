// NT-Xent for sm_90a, host side: chooses the kernel variant, the launches, the blocks and the column splits of a
// problem.
//
// How large a problem must be for a block to use every stage of its ring at least three times, so that errors in the
// wrap-around of rings show. With P multiprocessors, all 2N rows anchors, R = ceil(2N / 128) row tiles:
//   forward    R (R + 1) / 2 tiles in P equal runs. A tile takes one ring stage per panel of 64 dimensions, twice as
//              many for split operands, three times as many if both operands stream and are split. 8 stages up to 128
//              dimensions; 5 above that or for split operands; 6 if both operands stream
//   backward   R tiles (2 R if D > 128 or operands are split), divided by column_splits; one stage each, 4 stages
//              beyond 256 dimensions (128 split): R tiles per row tile in equal runs, with stages as in the forward
//              pass; then 2R / splits panels of positions (three times as many split), one stage each, 4 stages
// On 132 multiprocessors, the ring wraps twice from this number of samples N on (test_nt_xent_sm90.cpp):
//                         D <= 64   D <= 128   D <= 192   D <= 256
//     16-bit  forward       4225       3073       1985       1729      use (4352, 64), (4096, 128), (2048, 192),
//             backward      2113       2113       1409       1409          (2048, 256)
//     float32 forward       2497       1729                            use (2560, 64), (2048, 128)
//             backward      1409       1409
// Beyond these dimensions, smaller problems do: (2048, 512), (2048, 1024).
// The double buffer of the resident forward operand wraps from N = 1729 on, and for the second time from 3201 on.
// More than 16,384 anchors need a second launch of the forward pass: (9000, 128).
#pragma once

#include <algorithm>

#include "nt_xent/cuda_plan.cuh"
#include "nt_xent/sm90_backward.cuh"
#include "nt_xent/sm90_backward_wide.cuh"
#include "nt_xent/sm90_forward.cuh"

namespace scan_fast {

// Outer tiles per launch of the forward pass; each has a transposed slot. The tests lower it.
#if defined(SCAN_FAST_EMULATE)
inline int max_transposed_slots = 128;
#else
constexpr int max_transposed_slots = 128;
#endif
// Bytes of W in the workspace of the backward pass. The tests lower it.
#if defined(SCAN_FAST_EMULATE)
inline int64_t max_weight_bytes = 64 << 20;
#else
constexpr int64_t max_weight_bytes = 64 << 20;
#endif

namespace {

// Up to 128 dimensions, up to 256, and up to 128 split. The resident operand has two buffers of 32 KB or 64 KB.
using NarrowProducts = Products<half_t, kPanelRows, Resident::kColumns, 2, 8>;
using WideProducts = Products<half_t, kPanelRows, Resident::kColumns, 4, 5>;
using SplitProducts = Products<half_t, kPanelRows, Resident::kColumns, 4, 5, true>;
// Up to 512 dimensions, or 256 split: one buffer of 128 KB, and the warpgroups side by side. Above, both operands
// stream.
template <Resident kResident, bool kSplit>
using LargeProducts = Products<half_t, kPanelRows, kResident, 8, 5, kSplit>;
template <bool kSplit>
using StreamedProducts = Products<half_t, kPanelRows, Resident::kNone, 0, 6, kSplit>;
// W Z: 128 rows by 256 dimensions.
template <bool kSplit>
using GatherProducts = Products<half_t, 2 * kPanelRows, Resident::kNone, 0, 4, kSplit>;

constexpr int kMaxDim = 1024;

template <Resident kResident, typename Body>
void with_large_products(int panels, bool reduced, Body body) {
  if (panels * (reduced ? 1 : 2) <= 8) {
    reduced ? body.template operator()<LargeProducts<kResident, false>>()
            : body.template operator()<LargeProducts<kResident, true>>();
  } else {
    reduced ? body.template operator()<StreamedProducts<false>>() : body.template operator()<StreamedProducts<true>>();
  }
}

struct Sm90Plan {
  Params p;
  bool reduced;
  int panels;
  PackedPositions at;

  // both: whether the handled second views are anchors.
  Sm90Plan(const NTXentProblem& problem, bool reduced_, int64_t local_rows, int panels_, bool both)
      : p(make_params(problem, local_rows, 1)),
        reduced(reduced_),
        panels(panels_),
        at{p.samples, p.sample_begin, p.sample_count, both} {}
  int64_t operands() const { return packed_size(at.total(), panels * (reduced ? 1 : 2)); }
  template <bool kSplit>
  Panels<kSplit> packing(half_t* packed) const {
    return {packed, panels, at};
  }
};

struct ForwardPlan : Sm90Plan {
  int anchors, outer_tiles;

  ForwardPlan(const NTXentProblem& problem, bool reduced_)
      : Sm90Plan(problem, reduced_, problem.local_anchors(), static_cast<int>(panels_of(problem.dim)),
                 problem.both_anchors),
        anchors(at.anchors()),
        outer_tiles(static_cast<int>(row_tiles(anchors))) {}
  template <typename Body>
  void for_rounds(Body body) const {
    for (int begin = 0; begin < outer_tiles; begin += max_transposed_slots) {
      const int end = std::min(outer_tiles, begin + max_transposed_slots);
      body(make_forward_schedule<kPanelRows>(anchors, at.others(), kPanelRows, begin, end, multiprocessors()),
           begin == 0, end == outer_tiles);
    }
  }
  // Calls body.operator()<Products>() with the variant of the main loop.
  template <typename Body>
  void with_products(Body body) const {
    if (panels * (reduced ? 1 : 2) > 4) {
      with_large_products<Resident::kColumns>(panels, reduced, body);
    } else if (!reduced) {
      body.template operator()<SplitProducts>();
    } else {
      panels <= 2 ? body.template operator()<NarrowProducts>() : body.template operator()<WideProducts>();
    }
  }
};

struct BackwardPlan : Sm90Plan {
  int rows, chunk, column_tiles;
  bool narrow;  // one kernel forms W and multiplies it; otherwise W is stored for `chunk` rows at a time

  BackwardPlan(const NTXentProblem& problem, bool reduced_)
      : Sm90Plan(problem, reduced_, 2 * problem.sample_count, backward_panels(problem.dim, reduced_), true),
        rows(p.local_rows),
        chunk(rows),
        narrow(problem.dim <= (reduced ? 256 : 128)) {
    const int64_t room = multiprocessors();
    if (narrow) {
      with_tiles([&]<typename B>() { column_tiles = at.total() / B::kColumns; });
      const double price = split_cost(rows, room, kPanelRows, at.total() / column_tiles, !reduced);
      p.splits = static_cast<int>(column_splits(row_tiles(rows), column_tiles, room, price));
    } else {
      column_tiles = at.total() / kPanelRows;
      const int64_t tile_bytes = int64_t{kPanelRows} * at.total() * static_cast<int64_t>(sizeof(half_t)) * parts();
      const int64_t most = std::max<int64_t>(1, max_weight_bytes / tile_bytes) * kPanelRows;
      chunk = static_cast<int>(std::min<int64_t>(rows, most));
      const double price = split_cost(chunk, room, kPanelRows, kPanelRows, !reduced);
      p.splits =
          static_cast<int>(column_splits(row_tiles(chunk) * slices(), column_tiles, room, price, /*equal=*/true));
    }
  }
  static int backward_panels(int64_t dim, bool reduced) {
    if (dim > (reduced ? 256 : 128)) return static_cast<int>(panels_of(dim));
    return dim <= 64 ? 1 : dim <= 128 ? 2 : 4;
  }
  int parts() const { return reduced ? 1 : 2; }
  int slices() const { return ceil_div(panels, 4); }  // of up to 256 dimensions
  // Rows [begin, begin + rows) whose W is stored.
  StoredWeights stored(int begin) const { return {begin, std::min(chunk, rows - begin), column_tiles, p.splits}; }
  // Calls body.operator()<BackwardTiles>() with the variant of the kernel, if `narrow`.
  template <typename Body>
  void with_tiles(Body body) const {
    if (reduced && panels == 4) return body.template operator()<BackwardTiles<4, false>>();
    if (reduced) {
      return panels == 1 ? body.template operator()<BackwardTiles<1, false>>()
                         : body.template operator()<BackwardTiles<2, false>>();
    }
    return panels == 1 ? body.template operator()<BackwardTiles<1, true>>()
                       : body.template operator()<BackwardTiles<2, true>>();
  }
  int positions() const { return at.total(); }
  int64_t weight_elements() const { return narrow ? 0 : parts() * stored(0).elements(); }
  // Of the transposed operand: slices of 256 dimensions.
  int64_t transposed_elements() const { return narrow ? 0 : int64_t{parts()} * slices() * 4 * kPanelDims * at.total(); }
};

}  // namespace
}  // namespace scan_fast
