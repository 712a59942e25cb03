// Memory for large CPU results, kept for the next call.
//
// malloc maps a large array anew each time and returns it to the kernel when it is freed; the page faults of the next
// first touch (20,000 for the 80 MB of gradients of a 10 x 1024 x 1000 SCAN loss) then cost twice what computing the
// values does. A training step frees last step's gradients before it asks for new ones, so the pages are there.
#pragma once

#include <ATen/ATen.h>

namespace scan_fast {

// As at::empty for a contiguous CPU tensor. From kLargeBuffer bytes on, its memory comes from the pool, in huge pages
// where the system offers them; smaller ones and other devices are at::empty.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

constexpr size_t kLargeBuffer = size_t{1} << 20;

// At most so many bytes wait in the pool for reuse; what is freed beyond that goes back to the system at once.
constexpr size_t kPoolCapacity = size_t{256} << 20;

// Bytes that wait in the pool now.
size_t pooled_bytes();

// Gives the waiting memory back to the system.
void release_pooled();

}  // namespace scan_fast
