// NT-Xent for sm_90a, host side: chooses the kernel variant, the launches, the blocks and the column splits of a
// problem.
//
// How large a problem must be for a block to use every stage of its ring at least three times, so that errors in the
// wrap-around of rings show. With P multiprocessors, all 2N rows anchors, R = ceil(2N / 128) row tiles:
//   forward    R (R + 1) / 2 tiles in P equal runs. A tile takes one ring stage per panel of 64 dimensions, twice as
//              many for split operands. 8 stages up to 128 dimensions; 5 above that or for split operands
//   backward   R tiles (2 R if D > 128 or operands are split), divided by column_splits; one stage each, 4 stages
// On 132 multiprocessors, the ring wraps twice from this number of samples N on (test_nt_xent_sm90.cpp):
//                         D <= 64   D <= 128   D <= 192   D <= 256
//     16-bit  forward       4225       3073       1985       1729      use (4352, 64), (4096, 128), (2048, 192),
//             backward      2113       2113       1409       1409          (2048, 256)
//     float32 forward       2497       1729                            use (2560, 64), (2048, 128)
//             backward      1409       1409
// The double buffer of the resident forward operand wraps from N = 1729 on, and for the second time from 3201 on.
// More than 16,384 anchors need a second launch of the forward pass: (9000, 128).
#pragma once

#include <algorithm>

#include "nt_xent/cuda_plan.cuh"
#include "nt_xent/sm90_backward.cuh"
#include "nt_xent/sm90_forward.cuh"

namespace scan_fast {

// Outer tiles per launch of the forward pass; each has a transposed slot. The tests lower it.
#if defined(SCAN_FAST_EMULATE)
inline int64_t max_transposed_slots = 128;
#else
constexpr int64_t max_transposed_slots = 128;
#endif

namespace {

// Up to 128 dimensions, up to 256, and up to 128 split. The resident operand has two buffers of 32 KB or 64 KB.
using NarrowProducts = Products<half_t, kPanelRows, Resident::kColumns, 2, 8>;
using WideProducts = Products<half_t, kPanelRows, Resident::kColumns, 4, 5>;
using SplitProducts = Products<half_t, kPanelRows, Resident::kColumns, 4, 5, true>;

struct ForwardPlan {
  Params p;
  PackedPositions positions;
  int panels;
  int64_t outer_tiles;

  explicit ForwardPlan(const NTXentProblem& problem)
      : p(make_params(problem, problem.local_anchors(), 1)),
        positions{problem.samples, problem.sample_begin, problem.sample_count, problem.both_anchors},
        panels(static_cast<int>(panels_of(problem.dim))),
        outer_tiles(row_tiles(problem.local_anchors())) {}
  // Calls body(schedule, is_first, is_last) for each launch.
  template <typename Body>
  void for_rounds(Body body) const {
    for (int64_t begin = 0; begin < outer_tiles; begin += max_transposed_slots) {
      const int64_t end = std::min(outer_tiles, begin + max_transposed_slots);
      body(make_forward_schedule<kPanelRows>(positions.anchors(), positions.others(), kPanelRows, begin, end,
                                             multiprocessors()),
           begin == 0, end == outer_tiles);
    }
  }
  // Calls body.operator()<Products>() with the variant of the main loop.
  template <typename Body>
  auto with_products(bool reduced, Body body) const {
    if (!reduced) return body.template operator()<SplitProducts>();
    return panels <= 2 ? body.template operator()<NarrowProducts>() : body.template operator()<WideProducts>();
  }
};

struct BackwardPlan {
  PackedPositions positions;
  int panels, column_tiles;
  Params p;

  BackwardPlan(const NTXentProblem& problem, bool reduced)
      : positions{problem.samples, problem.sample_begin, problem.sample_count, true},
        panels(problem.dim <= 64    ? 1
               : problem.dim <= 128 ? 2
                                    : 4) {
    const int64_t columns = panels > 2 || !reduced ? 64 : 128;  // as in BackwardTiles
    const int64_t tiles = positions.total() / columns, rows = positions.anchors(), room = multiprocessors();
    const double price = split_cost(rows, room, kPanelRows, columns, !reduced);
    column_tiles = static_cast<int>(tiles);
    p = make_params(problem, rows, column_splits(row_tiles(rows), tiles, room, price));
  }
  // Calls body.operator()<BackwardTiles>() with the variant of the kernel.
  template <typename Body>
  auto with_tiles(bool reduced, Body body) const {
    if (reduced && panels == 4) return body.template operator()<BackwardTiles<4, false>>();
    if (reduced) {
      return panels == 1 ? body.template operator()<BackwardTiles<1, false>>()
                         : body.template operator()<BackwardTiles<2, false>>();
    }
    return panels == 1 ? body.template operator()<BackwardTiles<1, true>>()
                       : body.template operator()<BackwardTiles<2, true>>();
  }
};

}  // namespace
}  // namespace scan_fast
