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

template <int kInnerRows>
struct ForwardSchedule {
  static constexpr int inner_width = kInnerRows;
  int64_t anchors, others;         // A and O above
  int64_t outer_begin, outer_end;  // outer tiles of this launch
  int64_t blocks;
  int64_t segment_slots;  // the transposed slots follow these
  int outer_width;        // a multiple of the inner width

  __host__ __device__ int64_t anchor_tiles() const { return (anchors + inner_width - 1) / inner_width; }
  __host__ __device__ int64_t other_tiles() const { return (others + inner_width - 1) / inner_width; }
  __host__ __device__ int64_t outer_tiles() const { return (anchors + outer_width - 1) / outer_width; }
  // First inner tile of an outer tile: its diagonal.
  __host__ __device__ int64_t first_inner(int64_t outer) const { return outer * (outer_width / inner_width); }
  __host__ __device__ int64_t length(int64_t outer) const {
    return anchor_tiles() - first_inner(outer) + other_tiles();
  }
  // Number of tiles of the launch before an outer tile's first.
  __host__ __device__ int64_t prefix(int64_t outer) const {
    const int64_t count = outer - outer_begin;
    return count * (anchor_tiles() + other_tiles()) -
           (outer_begin + outer - 1) * count / 2 * (outer_width / inner_width);
  }
  __host__ __device__ int64_t total() const { return prefix(outer_end); }
  __host__ __device__ int64_t block_begin(int64_t block) const { return total() * block / blocks; }
  __host__ __device__ int64_t block_of(int64_t tile) const { return ((tile + 1) * blocks - 1) / total(); }
  __host__ __device__ int64_t outer_of(int64_t tile) const {
    int64_t low = outer_begin, high = outer_end - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (prefix(middle) <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  __host__ __device__ int64_t segments(int64_t outer) const {
    return block_of(prefix(outer + 1) - 1) - block_of(prefix(outer)) + 1;
  }
  __host__ __device__ int64_t segment_slot(int64_t outer, int64_t block) const {
    return block - block_of(prefix(outer));
  }
  __host__ __device__ int64_t transposed_slot(int64_t outer) const { return segment_slots + outer - outer_begin; }
  __host__ __device__ int64_t slots() const { return segment_slots + outer_end - outer_begin; }

  // The k-th slot that holds a value for an anchor, k < filled(anchor): the transposed slots, then the segments of its
  // own outer tile.
  __host__ __device__ int64_t transposed_slots(int64_t anchor) const {
    const int64_t outer = anchor / outer_width, end = outer < outer_end ? outer : outer_end;
    return end > outer_begin ? end - outer_begin : 0;
  }
  __host__ __device__ int64_t filled(int64_t anchor) const {
    const int64_t outer = anchor / outer_width;
    return transposed_slots(anchor) + (outer < outer_begin || outer >= outer_end ? 0 : segments(outer));
  }
  __host__ __device__ int64_t filled_slot(int64_t anchor, int64_t k) const {
    const int64_t count = transposed_slots(anchor);
    return k < count ? segment_slots + k : k - count;
  }
};

// Schedule of a launch for the outer tiles [begin, end), with at most `max_blocks` blocks.
template <int kInnerRows>
ForwardSchedule<kInnerRows> make_forward_schedule(int64_t anchors, int64_t others, int outer_width, int64_t begin,
                                                  int64_t end, int64_t max_blocks) {
  ForwardSchedule<kInnerRows> s{anchors, others, begin, end, 1, 0, outer_width};
  s.blocks = s.total() < max_blocks ? s.total() : max_blocks;
  // The first outer tile has the most tiles. At most two more blocks than it fills have a segment in it.
  const int64_t longest = s.length(begin), filled = longest * s.blocks / s.total() + 2;
  s.segment_slots = filled < longest ? filled : longest;
  return s;
}

}  // namespace scan_fast
