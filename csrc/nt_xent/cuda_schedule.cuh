// NT-Xent on the GPU: which block forms which tiles of the forward pass. Index arithmetic only, for host and device.
//
// Positions. The anchors of a call are numbered 0 .. A-1 (the handled samples' first views, then second views), the
// other rows 0 .. O-1. The anchors are cut into owner tiles, all rows into walked tiles. Owner tile o meets
// its own rows, the anchors behind them, and all other rows. A tile behind the diagonal serves both sides: its
// exponentials are summed over the walked rows, for the owner, and over the owner's, for the walked rows.
//
// Blocks. The tiles of all owners, one after another, are dealt out in equal consecutive runs. A run may cross owners:
// a piece is what one run has of one owner, and has a slot for the owner's sums. An owner has one slot for the sums that
// it makes for others' rows. Each slot is written by one block, and the slots of a row are added in order.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace scan_fast {

template <int kWalkedRows>
struct ForwardSchedule {
  static constexpr int walked_width = kWalkedRows;
  int64_t anchors, others;         // A, O
  int64_t owner_begin, owner_end;  // the owners of this launch
  int64_t blocks;
  int64_t piece_slots;  // slots before those that hold sums for others' rows
  int owner_width;      // a multiple of the walked tiles'

  __host__ __device__ int64_t anchor_tiles() const { return (anchors + walked_width - 1) / walked_width; }
  __host__ __device__ int64_t other_tiles() const { return (others + walked_width - 1) / walked_width; }
  __host__ __device__ int64_t owners() const { return (anchors + owner_width - 1) / owner_width; }
  // The owner's own tiles come first.
  __host__ __device__ int64_t first_walked(int64_t owner) const { return owner * (owner_width / walked_width); }
  __host__ __device__ int64_t length(int64_t owner) const {
    return anchor_tiles() - first_walked(owner) + other_tiles();
  }
  // Tiles of the launch before an owner's first.
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

  // The k-th slot that holds something for an anchor, k < filled(anchor): others' sums for it, then its owner's pieces.
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

// The launch of the owners [begin, end), with at most `most_blocks` blocks.
template <int kWalkedRows>
ForwardSchedule<kWalkedRows> make_forward_schedule(int64_t anchors, int64_t others, int owner_width, int64_t begin,
                                                   int64_t end, int64_t most_blocks) {
  ForwardSchedule<kWalkedRows> s{anchors, others, begin, end, 1, 0, owner_width};
  s.blocks = s.total() < most_blocks ? s.total() : most_blocks;
  // The first owner's run is the longest; it touches at most two blocks more than it fills.
  const int64_t longest = s.length(begin), filled = longest * s.blocks / s.total() + 2;
  s.piece_slots = filled < longest ? filled : longest;
  return s;
}

}  // namespace scan_fast
