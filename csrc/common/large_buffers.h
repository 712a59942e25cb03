// Pool of memory for large CPU results.
//
// malloc maps memory for a large array in each call, and returns it to the operating system when it is freed. The page
// faults of the first access (20,000 for the 80 MB of gradients of a 10 x 1024 x 1000 SCAN loss) then take twice as
// long as the computation. A training step frees the previous step's gradients before it allocates new ones, so a pool
// of freed buffers avoids the page faults.
#pragma once

#include <ATen/ATen.h>

namespace scan_fast {

// Does what at::empty does. A contiguous CPU tensor of kLargeBuffer bytes or more gets its memory from the pool, in
// huge pages if the system offers them.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

constexpr size_t kLargeBuffer = size_t{1} << 20;

// Most bytes that wait in the pool for reuse; freed memory beyond this goes back to the system at once.
constexpr size_t kPoolCapacity = size_t{256} << 20;

// Returns the bytes that wait in the pool.
size_t pooled_bytes();

// Gives the waiting memory back to the system.
void release_pooled();

}  // namespace scan_fast
