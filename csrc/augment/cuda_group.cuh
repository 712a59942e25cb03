// GPU kernels of the augment family: the group of threads that renders one image, and its shared memory.
//
// Included by augment_cuda.cu only.
#pragma once

#include "augment/augment.h"
#include "augment/pixel.h"
#include "common/device.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 256, kValues = 256;

struct Workspace {
  int32_t* filters;  // (count, 2, side, 2 + taps): first, number, weights; axis 0 vertical, 1 horizontal
  uint32_t* images;  // (blocks, 2, side * side), or null
  int taps;
  int64_t blocks;
};

// The threads that render one image: a block of kWarps warps.
template <int kWarps_>
struct Group {
  static constexpr int kWarps = kWarps_, kSize = 32 * kWarps;
  static_assert(kWarps > 1 && kValues % kSize == 0, "each thread owns as many pixel values");

  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int warp() { return thread() / 32; }
  __device__ __forceinline__ static int lane() { return thread() % 32; }
  __device__ __forceinline__ static void sync() { __syncthreads(); }
};

// The positions of a thread in rows of `width`, kSize apart, without a division for each.
template <typename G>
struct Walk {
  int i, x, y, width, columns, rows;

  __device__ __forceinline__ explicit Walk(int row_width) : i(G::thread()), width(row_width) {
    y = i / width, x = i % width;
    rows = G::kSize / width, columns = G::kSize % width;
  }
  __device__ __forceinline__ void next() {
    i += G::kSize;
    x += columns;
    y += rows;
    if (x >= width) x -= width, ++y;
  }
};

// Shared memory of a group, for operations that need more than the image.
struct Tables {
  Shared<int> counts;       // (3, kValues)
  Shared<uint32_t> lookup;  // (kValues) new value of each pixel value; one byte per channel, as in a pixel
  Shared<int> partial;      // (6, kWarps)
  Shared<long long> sums;   // (kWarps)
};

__device__ __forceinline__ uint32_t packed(int r, int g, int b) {
  return static_cast<uint32_t>(r) | static_cast<uint32_t>(g) << 8 | static_cast<uint32_t>(b) << 16;
}
__device__ __forceinline__ Rgb unpacked(uint32_t word) {
  return {static_cast<int>(word & 255), static_cast<int>(word >> 8 & 255), static_cast<int>(word >> 16 & 255)};
}

// Returns the sum over the group to every thread. Begins with a barrier.
template <typename G>
__device__ __forceinline__ long long group_sum(long long value, const Shared<long long>& partial) {
  value = warp_sum(value);
  __syncthreads();
  if (G::lane() == 0) partial[G::warp()] = value;
  __syncthreads();
  long long sum = 0;
  for (int w = 0; w < G::kWarps; ++w) sum += partial[w];
  return sum;
}

}  // namespace
}  // namespace scan_fast
