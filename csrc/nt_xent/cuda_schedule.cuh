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

template <int kWalkedRows>
struct ForwardSchedule {
  static constexpr int walked_width = kWalkedRows;
  int64_t anchors, others;         // A and O above
  int64_t owner_begin, owner_end;  // outer tiles of this launch
  int64_t blocks;
  int64_t piece_slots;  // the transposed slots follow these
  int owner_width;      // a multiple of the inner width

  __host__ __device__ int64_t anchor_tiles() const { return (anchors + walked_width - 1) / walked_width; }
  __host__ __device__ int64_t other_tiles() const { return (others + walked_width - 1) / walked_width; }
  __host__ __device__ int64_t owners() const { return (anchors + owner_width - 1) / owner_width; }
  // First inner tile of an outer tile: its diagonal.
  __host__ __device__ int64_t first_walked(int64_t owner) const { return owner * (owner_width / walked_width); }
  __host__ __device__ int64_t length(int64_t owner) const {
    return anchor_tiles() - first_walked(owner) + other_tiles();
  }
  // Number of tiles of the launch before an outer tile's first.
  __host__ __device__ int64_t prefix(int64_t owner) const {
    const int64_t count = owner - owner_begin;
    return count * (anchor_tiles() + other_tiles()) -
           (owner_begin + owner - 1) * count / 2 * (owner_width / walked_width);
  }
  __host__ __device__ int64_t total() const { return prefix(owner_end); }
  __host__ __device__ int64_t block_begin(int64_t block) const { return total() * block / blocks; }
  __host__ __device__ int64_t block_of(int64_t tile) const { return ((tile + 1) * blocks - 1) / total(); }
  __host__ __device__ int64_t owner_of(int64_t tile) const {
    int64_t low = owner_begin, high = owner_end - 1;
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
  __host__ __device__ int64_t pieces(int64_t owner) const {
    return block_of(prefix(owner + 1) - 1) - block_of(prefix(owner)) + 1;
  }
  __host__ __device__ int64_t piece_slot(int64_t owner, int64_t block) const {
    return block - block_of(prefix(owner));
  }
  __host__ __device__ int64_t mirror_slot(int64_t owner) const { return piece_slots + owner - owner_begin; }
  __host__ __device__ int64_t slots() const { return piece_slots + owner_end - owner_begin; }

  // The k-th slot that holds a value for an anchor, k < filled(anchor): the transposed slots, then the segments of its
  // own outer tile.
  __host__ __device__ int64_t mirrors(int64_t anchor) const {
    const int64_t owner = anchor / owner_width, end = owner < owner_end ? owner : owner_end;
    return end > owner_begin ? end - owner_begin : 0;
  }
  __host__ __device__ int64_t filled(int64_t anchor) const {
    const int64_t owner = anchor / owner_width;
    return mirrors(anchor) + (owner < owner_begin || owner >= owner_end ? 0 : pieces(owner));
  }
  __host__ __device__ int64_t filled_slot(int64_t anchor, int64_t k) const {
    const int64_t count = mirrors(anchor);
    return k < count ? piece_slots + k : k - count;
  }
};

// Schedule of a launch for the outer tiles [begin, end), with at most `most_blocks` blocks.
template <int kWalkedRows>
ForwardSchedule<kWalkedRows> make_forward_schedule(int64_t anchors, int64_t others, int owner_width, int64_t begin,
                                                   int64_t end, int64_t most_blocks) {
  ForwardSchedule<kWalkedRows> s{anchors, others, begin, end, 1, 0, owner_width};
  s.blocks = s.total() < most_blocks ? s.total() : most_blocks;
  // The first outer tile has the most tiles. At most two more blocks than it fills have a segment in it.
  const int64_t longest = s.length(begin), filled = longest * s.blocks / s.total() + 2;
  s.piece_slots = filled < longest ? filled : longest;
  return s;
}

}  // namespace scan_fast
