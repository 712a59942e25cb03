// GPU kernels of the augment family: PIL's filter taps, then crop, resize and mirror.
//
// Included by augment_cuda.cu only.
#pragma once

#include "augment/cuda_group.cuh"

namespace scan_fast {
namespace {

__global__ void __launch_bounds__(kThreads) tabulate_filters(ViewBatch batch, Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= batch.count * 2 * batch.side) return;
  const int j = static_cast<int>(i % batch.side), axis = static_cast<int>(i / batch.side % 2);
  const int32_t* recipe = batch.recipes + i / (2 * batch.side) * (kRecipeHeader + batch.steps * kRecipeStep);
  const int length = recipe[2 + axis], side = static_cast<int>(batch.side);
  if (length == side) return;
  int32_t* filter = work.filters + i * (2 + work.taps);
  const TapRange range = tap_range(j, length, side);
  const double sum = tap_sum(range);
  filter[0] = range.first;
  filter[1] = range.count;
  for (int t = 0; t < range.count; ++t) filter[2 + t] = fixed_tap(range, t, sum);
}

template <typename G, typename Words>
__device__ __forceinline__ void crop_resize(const ViewBatch& batch, const Workspace& work, int64_t image,
                                            const int32_t* recipe, const Words& out) {
  const int64_t index = batch.indices == nullptr ? image : batch.indices[image];
  const uint8_t* source = batch.images + ((index * batch.height + recipe[0]) * batch.width + recipe[1]) * 3;
  const int side = static_cast<int>(batch.side), height = recipe[2], width = recipe[3], stride = 2 + work.taps;
  const bool mirrored = recipe[4] != 0;
  const int32_t* vertical = work.filters + image * 2 * side * stride;
  const int32_t* horizontal = vertical + static_cast<int64_t>(side) * stride;
  for (int i = G::thread(); i < side * side; i += G::kSize) {
    const int y = i / side, x = mirrored ? side - 1 - i % side : i % side;
    const int32_t* rows = vertical + static_cast<int64_t>(y) * stride;
    const int32_t* columns = horizontal + static_cast<int64_t>(x) * stride;
    const int first_row = height == side ? y : rows[0], row_count = height == side ? 1 : rows[1];
    const int first_column = width == side ? x : columns[0], column_count = width == side ? 1 : columns[1];
    constexpr int kHalf = 1 << (kTapBits - 1);
    int r = kHalf, g = kHalf, b = kHalf;
#pragma unroll 1
    for (int s = 0; s < row_count; ++s) {
      const uint8_t* pixel = source + (static_cast<int64_t>(first_row + s) * batch.width + first_column) * 3;
      // Rounded to pixel values between the two passes, as in PIL.
      int row_r = kHalf, row_g = kHalf, row_b = kHalf;
#pragma unroll 2
      for (int t = 0; t < column_count; ++t, pixel += 3) {
        const int weight = width == side ? 1 << kTapBits : columns[2 + t];
        row_r += static_cast<int>(__ldg(pixel)) * weight;
        row_g += static_cast<int>(__ldg(pixel + 1)) * weight;
        row_b += static_cast<int>(__ldg(pixel + 2)) * weight;
      }
      const int weight = height == side ? 1 << kTapBits : rows[2 + s];
      r += from_fixed(row_r) * weight;
      g += from_fixed(row_g) * weight;
      b += from_fixed(row_b) * weight;
    }
    out[i] = packed(from_fixed(r), from_fixed(g), from_fixed(b));
  }
}

}  // namespace
}  // namespace scan_fast
