// CPU kernel that renders one view, compiled once per instruction set.
#pragma once

#include "augment/augment.h"
#include "common/cpu_dispatch.h"

namespace scan_fast {

// Resize filter along one axis. Output pixel j is the sum over t < taps of weights[t * padded + j] times pixel first[j]
// + t of the box. Only the first number[j] weights are non-zero. `padded` is `side` rounded up to kTapPadding; the
// padding is zero.
// first == nullptr: the box has the output's size, and pixels are copied.
struct AxisTaps {
  const int32_t* first;
  const int32_t* number;
  const int32_t* weights;
  int64_t taps, padded;
};

constexpr int64_t kTapPadding = 16;

// Bytes between the planes of two channels, for planes of `pixels` bytes. Leaves room to read and write whole vectors
// at the end.
constexpr int64_t plane_bytes(int64_t pixels) { return (pixels + 63) / 64 * 64 + 64; }

// Byte offsets of the parts of a thread's scratch memory, and its size.
struct ViewScratch {
  int64_t row, middle, planes[3], bytes;
};
inline ViewScratch view_scratch(int64_t height, int64_t width, int64_t side, int64_t taps) {
  ViewScratch at;
  at.row = 0;
  at.middle = plane_bytes(3 * (width + taps));
  at.planes[0] = at.middle + 3 * plane_bytes(height * side);
  // Two images, then one plane with a border of one pixel before and two pixels after.
  at.planes[1] = at.planes[0] + 3 * plane_bytes(side * side);
  at.planes[2] = at.planes[1] + 3 * plane_bytes(side * side);
  at.bytes = at.planes[2] + plane_bytes((side + 3) * (side + 3));
  return at;
}

}  // namespace scan_fast

SCAN_FAST_DECLARE_PER_ISA(void render_view(const ::scan_fast::ViewBatch& batch, int64_t number,
                                           const ::scan_fast::AxisTaps& horizontal,
                                           const ::scan_fast::AxisTaps& vertical, const ::scan_fast::ViewScratch& at,
                                           unsigned char* scratch))
