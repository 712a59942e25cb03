// Schedule of the NT-Xent forward pass on the GPU: assigns the tiles of similarities to blocks. Index arithmetic only,
// for host and device.
//
// Positions. The anchors of a call are numbered 0 .. A-1 (the handled samples' first views, then their second views),
// the other rows 0 .. O-1. Both are divided into tiles. Similarities are symmetric, so among anchors only tiles on and
// below the diagonal are formed:
//
//                     outer tiles (columns)
//                       0     1     2
//      inner      0     d                     d  diagonal: summed over the rows only
//      tiles      1     t     d               t  below the diagonal: summed over the rows for the outer tile, and over
//      (rows)     2     t     t     d            the columns for the inner tile; the transposed tile is not formed
//                 ------------------
//      others     3     o     o     o         o  other rows: summed over the rows only
//                 4     o     o     o
//
// Runs. The tiles of outer tile 0, 1, 2, ... in sequence are divided into equal consecutive runs, one per block:
//      outer tile     0 0 0 0 0 1 1 1 1 2 2 2
//      inner tile     0 1 2 3 4 1 2 3 4 2 3 4
//      block          0 0 0 1 1 1 2 2 2 3 3 3
// A segment is the part of a run within one outer tile: block 1 has a segment in outer tile 0 and one in outer tile 1.
//
// Slots. Each segment has a slot for the sums of its outer tile. Each outer tile has one transposed slot for the sums
// of its `t` tiles over the columns. Each entry of a slot is written once, and the slots of a row are added in a fixed
// order, so there are no atomics.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace scan_fast {

// Counts are at most 2^30: up to 128 outer tiles of a launch times the tiles of 2^30 rows. The host divides once; a
// block finds its tiles with a few multiplications.
template <int kInnerRows>
struct ForwardSchedule {
  static constexpr int inner_width = kInnerRows;
  int anchors, others;            // A and O above
  int anchor_tiles, other_tiles;  // inner tiles of each
  int outer_begin, outer_end;     // outer tiles of this launch
  int outer_width, inner_per_outer;
  int longest;               // tiles of the first outer tile
  int blocks, share, extra;  // a run has `share` tiles, of the first `extra` blocks one more
  int segment_slots;         // the transposed slots follow these

  // First inner tile of an outer tile: its diagonal.
  __host__ __device__ int first_inner(int outer) const { return outer * inner_per_outer; }
  __host__ __device__ int length(int outer) const { return longest - (outer - outer_begin) * inner_per_outer; }
  // Number of tiles of the launch before an outer tile's first.
  __host__ __device__ int prefix(int outer) const {
    const int count = outer - outer_begin;
    return count * longest - count * (count - 1) / 2 * inner_per_outer;
  }
  __host__ __device__ int total() const { return prefix(outer_end); }
  __host__ __device__ int block_begin(int block) const { return block * share + (block < extra ? block : extra); }
  __host__ __device__ int block_of(int tile) const {
    const int in_longer = extra * (share + 1);
    return tile < in_longer ? tile / (share + 1) : extra + (tile - in_longer) / share;
  }
  __host__ __device__ int outer_of(int tile) const {
    int low = outer_begin, high = outer_end - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (prefix(middle) <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  __host__ __device__ int segments(int outer) const {
    return block_of(prefix(outer + 1) - 1) - block_of(prefix(outer)) + 1;
  }
  __host__ __device__ int segment_slot(int outer, int block) const { return block - block_of(prefix(outer)); }
  __host__ __device__ int transposed_slot(int outer) const { return segment_slots + outer - outer_begin; }
  __host__ __device__ int slots() const { return segment_slots + outer_end - outer_begin; }

  // The slots that hold a value for an anchor of an outer tile: the first transposed_slots(outer) of the transposed
  // slots, then the first segments(outer) slots if own_segments(outer).
  __host__ __device__ int transposed_slots(int outer) const {
    const int end = outer < outer_end ? outer : outer_end;
    return end > outer_begin ? end - outer_begin : 0;
  }
  __host__ __device__ int own_segments(int outer) const {
    return outer < outer_begin || outer >= outer_end ? 0 : segments(outer);
  }
};

// Index of a value in (slots, anchors).
__host__ __device__ inline int64_t slot_at(int slot, int anchors, int anchor) {
  return static_cast<int64_t>(slot) * anchors + anchor;
}

// Schedule of a launch for the outer tiles [begin, end), with at most `max_blocks` blocks.
template <int kInnerRows>
ForwardSchedule<kInnerRows> make_forward_schedule(int anchors, int others, int outer_width, int begin, int end,
                                                  int max_blocks) {
  ForwardSchedule<kInnerRows> s{};
  s.anchors = anchors;
  s.others = others;
  s.anchor_tiles = (anchors + kInnerRows - 1) / kInnerRows;
  s.other_tiles = (others + kInnerRows - 1) / kInnerRows;
  s.outer_begin = begin;
  s.outer_end = end;
  s.outer_width = outer_width;
  s.inner_per_outer = outer_width / kInnerRows;
  s.longest = s.anchor_tiles - s.first_inner(begin) + s.other_tiles;
  const int total = s.total();
  s.blocks = total < max_blocks ? total : max_blocks;
  s.share = total / s.blocks;
  s.extra = total % s.blocks;
  // The first outer tile has the most tiles. At most two more blocks than it fills have a segment in it.
  const int filled = s.longest / s.share + 2;
  s.segment_slots = filled < s.longest ? filled : s.longest;
  return s;
}

}  // namespace scan_fast
