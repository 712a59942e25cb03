// GPU kernels of the augment family: PIL's filter taps, then crop, resize and mirror.
//
// Included by augment_cuda.cu only.
#pragma once

#include "augment/cuda_group.cuh"

namespace scan_fast {
namespace {

constexpr int kHalf = 1 << (kTapBits - 1);
constexpr int kFewTaps = 3;  // at most, if the box is not longer than the view

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
  for (int t = range.count; t < kFewTaps; ++t) filter[2 + t] = 0;
}

// The taps of an output position in a box that is not longer than the view. The weights of taps that do not exist are
// 0, and their positions are in the box.
struct FewTaps {
  int position[kFewTaps], weight[kFewTaps];

  __device__ __forceinline__ FewTaps(const int32_t* filter, int j, int length, int side) {
    const bool copied = length == side;
    const int first = copied ? j : filter[0];
#pragma unroll
    for (int t = 0; t < kFewTaps; ++t) {
      position[t] = min(first + t, length - 1);
      weight[t] = !copied ? filter[2 + t] : t == 0 ? 1 << kTapBits : 0;
    }
  }
};

struct Crop {
  const uint8_t* source;  // first pixel of the box
  int64_t row_bytes;      // of the source
  const int32_t *vertical, *horizontal;
  int side, height, width, stride;
  bool mirrored;
};

// Adds the weighted pixels of one output column and source row, for one rounding.
__device__ __forceinline__ Rgb filtered_row(const Crop& crop, int first_row, int column) {
  const int32_t* filter = crop.horizontal + static_cast<int64_t>(column) * crop.stride;
  const bool copied = crop.width == crop.side;
  const int first = copied ? column : filter[0], count = copied ? 1 : filter[1];
  const uint8_t* pixel = crop.source + first_row * crop.row_bytes + 3 * first;
  int r = kHalf, g = kHalf, b = kHalf;
#pragma unroll 2
  for (int t = 0; t < count; ++t, pixel += 3) {
    const int weight = copied ? 1 << kTapBits : filter[2 + t];
    r += static_cast<int>(__ldg(pixel)) * weight;
    g += static_cast<int>(__ldg(pixel + 1)) * weight;
    b += static_cast<int>(__ldg(pixel + 2)) * weight;
  }
  return {from_fixed(r), from_fixed(g), from_fixed(b)};
}

// A box that is higher than the view: its filtered rows do not fit into an image. Each is computed for each of the two
// or three output rows that it contributes to.
template <typename G, typename Words>
__device__ __forceinline__ void resize_high(const Crop& crop, const Words& out) {
  const int side = crop.side;
  for (Walk<G> at(side); at.i < side * side; at.next()) {
    const int32_t* rows = crop.vertical + static_cast<int64_t>(at.y) * crop.stride;
    const int column = crop.mirrored ? side - 1 - at.x : at.x, first = rows[0], count = rows[1];
    int r = kHalf, g = kHalf, b = kHalf;
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      const Rgb row = filtered_row(crop, first + t, column);
      const int weight = rows[2 + t];
      r += row.r * weight;
      g += row.g * weight;
      b += row.b * weight;
    }
    out[at.i] = packed(from_fixed(r), from_fixed(g), from_fixed(b));
  }
}

// Crops, resizes and mirrors an image into `out`; `between` is scratch. Two passes as in PIL, rounded to pixel values
// between them. Ends with a barrier.
template <typename G, typename Words>
__device__ __forceinline__ void crop_resize(const ViewBatch& batch, const Workspace& work, int64_t image,
                                            const int32_t* recipe, const Words& out, const Words& between) {
  const int64_t index = batch.indices == nullptr ? image : batch.indices[image];
  Crop crop;
  crop.source = batch.images + ((index * batch.height + recipe[0]) * batch.width + recipe[1]) * 3;
  crop.row_bytes = batch.width * 3;
  crop.side = static_cast<int>(batch.side), crop.height = recipe[2], crop.width = recipe[3];
  crop.stride = 2 + work.taps;
  crop.vertical = work.filters + image * 2 * crop.side * crop.stride;
  crop.horizontal = crop.vertical + static_cast<int64_t>(crop.side) * crop.stride;
  crop.mirrored = recipe[4] != 0;
  const int side = crop.side;
  if (crop.height > side) {
    resize_high<G>(crop, out);
    G::sync();
    return;
  }
  // A thread has the same output columns in all of its rows, so that it loads their taps once.
  const int columns = min(side, G::kSize), rows_at_once = G::kSize / columns, first_row = G::thread() / columns;
  const int first_column = first_row < rows_at_once ? G::thread() % columns : side;
  const bool copied = crop.height == side;
  const Words rows = copied ? out : between;
#pragma unroll 1
  for (int x = first_column; x < side; x += columns) {
    const int column = crop.mirrored ? side - 1 - x : x;
    if (crop.width > side) {
#pragma unroll 1
      for (int y = first_row; y < crop.height; y += rows_at_once) {
        const Rgb row = filtered_row(crop, y, column);
        rows[y * side + x] = packed(row.r, row.g, row.b);
      }
      continue;
    }
    const FewTaps taps(crop.horizontal + static_cast<int64_t>(column) * crop.stride, column, crop.width, side);
#pragma unroll 2
    for (int y = first_row; y < crop.height; y += rows_at_once) {
      const uint8_t* line = crop.source + y * crop.row_bytes;
      int r = kHalf, g = kHalf, b = kHalf;
#pragma unroll
      for (int t = 0; t < kFewTaps; ++t) {
        const uint8_t* pixel = line + 3 * taps.position[t];
        r += static_cast<int>(__ldg(pixel)) * taps.weight[t];
        g += static_cast<int>(__ldg(pixel + 1)) * taps.weight[t];
        b += static_cast<int>(__ldg(pixel + 2)) * taps.weight[t];
      }
      rows[y * side + x] = packed(from_fixed(r), from_fixed(g), from_fixed(b));
    }
  }
  G::sync();
  if (copied) return;
#pragma unroll 1
  for (int x = first_column; x < side; x += columns) {
#pragma unroll 2
    for (int y = first_row; y < side; y += rows_at_once) {
      const FewTaps taps(crop.vertical + static_cast<int64_t>(y) * crop.stride, y, crop.height, side);
      int r = kHalf, g = kHalf, b = kHalf;
#pragma unroll
      for (int t = 0; t < kFewTaps; ++t) {
        const uint32_t word = between[taps.position[t] * side + x];
        const Rgb p = unpacked(word);
        r += p.r * taps.weight[t];
        g += p.g * taps.weight[t];
        b += p.b * taps.weight[t];
      }
      out[y * side + x] = packed(from_fixed(r), from_fixed(g), from_fixed(b));
    }
  }
  G::sync();
}

}  // namespace
}  // namespace scan_fast
