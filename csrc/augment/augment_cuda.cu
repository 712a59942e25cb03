// The views on the GPU: one block per image, the image as one 32-bit word per pixel in shared memory.
//
//   tabulate_filters  thread per (image, axis, output position): PIL's filter taps in 22-bit fixed point
//   render_views      block per image: crop, resize and mirror from the source, then the recipe's operations one after
//                     another, then normalisation, cutout and the write
//
// render_views keeps two images. Operations on single pixels work in place on the pixels that the thread itself wrote,
// without a barrier; an operation that looks at other pixels, at all of them, or at shared tables begins with one.
// Sums and histograms are integers, so nothing depends on the order of threads. 32 x 32: 4 pixels a thread, 8 KiB of
// images and 7 KiB of tables; at 64 registers a multiprocessor holds 4 blocks, 1024 threads. Images that would take
// more than kSharedBytes (above 113 x 113) lie in global memory, one pair for each of a limited number of blocks, where
// the second cache holds them.
//
// Limit: memory sees 3 bytes of source and 6 or 12 of view per pixel; the arithmetic, a few hundred instructions per
// pixel at four or five operations, is the larger part. The levels are those of the CPU, see pixel.h.
#include <cstring>
#include <type_traits>

#include "augment/augment.h"
#include "augment/pixel.h"
#include "common/device.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr size_t kSharedBytes = 100 * 1024;
constexpr int kBlocksPerMultiprocessor = 4;  // where images lie in global memory

struct Workspace {
  int32_t* filters;  // (count, 2, side, 2 + taps): first, number, weights; axis 0 vertical, 1 horizontal
  uint32_t* images;  // (blocks, 2, side * side), or null
  int taps;
  int64_t blocks;
};

__device__ __forceinline__ uint32_t packed(int r, int g, int b) {
  return static_cast<uint32_t>(r) | static_cast<uint32_t>(g) << 8 | static_cast<uint32_t>(b) << 16;
}
__device__ __forceinline__ Rgb unpacked(uint32_t word) {
  return {static_cast<int>(word & 255), static_cast<int>(word >> 8 & 255), static_cast<int>(word >> 16 & 255)};
}

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

// The sum over the block, the same in every thread. Begins with a barrier.
__device__ __forceinline__ long long block_sum(long long value, const Shared<long long>& partial) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  long long sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += partial[w];
  return sum;
}

// The shared memory of the operations that need more than the image.
struct Tables {
  Shared<int> counts;         // (3, 256)
  Shared<unsigned> levels;    // (3, 256) what each level becomes
  Shared<int> partial;        // (6, kWarps)
  Shared<long long> sums;     // (kWarps)
};

template <typename Words>
__device__ __forceinline__ void crop_resize(const ViewBatch& batch, const Workspace& work, int64_t image,
                                            const int32_t* recipe, const Words& out) {
  const int64_t index = batch.indices == nullptr ? image : batch.indices[image];
  const uint8_t* source =
      batch.images + ((index * batch.height + recipe[0]) * batch.width + recipe[1]) * 3;
  const int side = static_cast<int>(batch.side), height = recipe[2], width = recipe[3], stride = 2 + work.taps;
  const bool mirrored = recipe[4] != 0;
  const int32_t* vertical = work.filters + image * 2 * side * stride;
  const int32_t* horizontal = vertical + static_cast<int64_t>(side) * stride;
  for (int i = static_cast<int>(threadIdx.x); i < side * side; i += kThreads) {
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
      // Rounded to levels between the two passes, as PIL does.
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

template <typename Words, typename Body>
__device__ __forceinline__ void for_pixels(const Words& image, int pixels, Body body) {
  // Not unrolled: the divisions of the hue call subroutines, and registers saved around them would be spilled.
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < pixels; i += kThreads) {
    const uint32_t word = image[i];
    const Rgb out = body(unpacked(word));
    image[i] = packed(out.r, out.g, out.b);
  }
}

template <typename Words>
__device__ __forceinline__ void contrast(const Words& image, int pixels, float factor, const Tables& tables) {
  long long sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < pixels; i += kThreads) {
    const uint32_t word = image[i];
    const Rgb p = unpacked(word);
    sum += luma(p.r, p.g, p.b);
  }
  const int grey = rounded_mean(block_sum(sum, tables.sums), pixels);
  for_pixels(image, pixels,
             [=](Rgb p) { return Rgb{blend(grey, p.r, factor), blend(grey, p.g, factor), blend(grey, p.b, factor)}; });
}

// After a barrier, replaces every level by its table's.
template <typename Words>
__device__ __forceinline__ void look_up(const Words& image, int pixels, const Tables& tables) {
  __syncthreads();
  for_pixels(image, pixels, [&](Rgb p) {
    const unsigned r = tables.levels[p.r], g = tables.levels[256 + p.g], b = tables.levels[512 + p.b];
    return Rgb{static_cast<int>(r), static_cast<int>(g), static_cast<int>(b)};
  });
}

template <typename Words>
__device__ __forceinline__ void autocontrast(const Words& image, int pixels, const Tables& tables) {
  int low[3] = {255, 255, 255}, high[3] = {0, 0, 0};
  for (int i = static_cast<int>(threadIdx.x); i < pixels; i += kThreads) {
    const uint32_t word = image[i];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const int level = static_cast<int>(word >> (8 * c) & 255);
      low[c] = min(low[c], level);
      high[c] = max(high[c], level);
    }
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    low[c] = warp_min(low[c]);
    high[c] = warp_max(high[c]);
    if (threadIdx.x % 32 == 0) {
      tables.partial[2 * c * kWarps + static_cast<int>(threadIdx.x / 32)] = low[c];
      tables.partial[(2 * c + 1) * kWarps + static_cast<int>(threadIdx.x / 32)] = high[c];
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int c = 0; c < 3; ++c) {
    int lowest = 255, highest = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int other_low = tables.partial[2 * c * kWarps + w], other_high = tables.partial[(2 * c + 1) * kWarps + w];
      lowest = min(lowest, other_low);
      highest = max(highest, other_high);
    }
    for (int level = static_cast<int>(threadIdx.x); level < 256; level += kThreads) {
      tables.levels[256 * c + level] =
          static_cast<unsigned>(lowest < highest ? stretched(level, lowest, highest) : level);
    }
  }
  look_up(image, pixels, tables);
}

template <typename Words>
__device__ __forceinline__ void equalize(const Words& image, int pixels, const Tables& tables) {
  static_assert(kThreads == 256, "a thread per level");
  const int level = static_cast<int>(threadIdx.x), lane = level % 32, warp = level / 32;
  __syncthreads();
#pragma unroll
  for (int c = 0; c < 3; ++c) tables.counts[256 * c + level] = 0;
  __syncthreads();
  for (int i = level; i < pixels; i += kThreads) {
    const uint32_t word = image[i];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      atomicAdd((tables.counts + static_cast<int64_t>(256 * c + static_cast<int>(word >> (8 * c) & 255))).get(), 1);
    }
  }
  __syncthreads();
  // How many pixels are below each level, and the highest level that occurs: within the warp, then across warps.
  int count[3], below[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    count[c] = tables.counts[256 * c + level];
    int sum = count[c];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kFullMask, sum, static_cast<unsigned>(offset));
      sum += lane >= offset ? other : 0;
    }
    below[c] = sum - count[c];
    const int last = warp_max(count[c] > 0 ? level : -1);
    if (lane == 31) {
      tables.partial[2 * c * kWarps + warp] = sum;
      tables.partial[(2 * c + 1) * kWarps + warp] = last;
    }
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    int last = -1;
    for (int w = 0; w < kWarps; ++w) {
      const int sum = tables.partial[2 * c * kWarps + w], highest = tables.partial[(2 * c + 1) * kWarps + w];
      below[c] += w < warp ? sum : 0;
      last = max(last, highest);
    }
    const int highest_count = tables.counts[256 * c + last];
    const int step = (pixels - highest_count) / 255;
    tables.levels[256 * c + level] = static_cast<unsigned>(equalized(level, below[c], step));
  }
  look_up(image, pixels, tables);
}

template <typename Words>
__device__ __forceinline__ void sharpness(const Words& in, const Words& out, int side, float factor) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < side * side; i += kThreads) {
    const int y = i / side, x = i % side;
    const uint32_t middle = in[i];
    if (x == 0 || y == 0 || x == side - 1 || y == side - 1) {
      out[i] = middle;
      continue;
    }
    // Sums of nine levels have 12 bits: red and blue are summed in one word, 16 bits apart.
    uint32_t red_blue = 0, green = 0;
#pragma unroll
    for (int row = -1; row <= 1; ++row) {
#pragma unroll
      for (int column = -1; column <= 1; ++column) {
        const uint32_t word = in[i + row * side + column];
        red_blue += word & 0xff00ffu;
        green += word >> 8 & 255;
      }
    }
    const Rgb p = unpacked(middle);
    out[i] = packed(blend(smoothed(static_cast<int>(red_blue & 0xffff), p.r), p.r, factor),
                    blend(smoothed(static_cast<int>(green), p.g), p.g, factor),
                    blend(smoothed(static_cast<int>(red_blue >> 16), p.b), p.b, factor));
  }
}

template <typename Words>
__device__ __forceinline__ void nearest(const Words& in, const Words& out, int side, const int32_t* words) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < side * side; i += kThreads) {
    // Wraps around where the map leads far outside, as the CPU's vectors do.
    const unsigned y = static_cast<unsigned>(i / side), x = static_cast<unsigned>(i % side);
    unsigned m[6];
#pragma unroll
    for (int k = 0; k < 6; ++k) m[k] = static_cast<unsigned>(words[k]);
    const int px = static_cast<int>(m[0] + m[1] * x + m[2] * y) >> 16;
    const int py = static_cast<int>(m[3] + m[4] * x + m[5] * y) >> 16;
    uint32_t word = 0;
    if (px >= 0 && px < side && py >= 0 && py < side) word = in[py * side + px];
    out[i] = word;
  }
}

template <typename Words>
__device__ __forceinline__ Rgb pixel_or_black(const Words& in, int side, int x, int y) {
  uint32_t word = 0;
  if (x >= 0 && x < side && y >= 0 && y < side) word = in[y * side + x];
  return unpacked(word);
}

template <typename Words>
__device__ __forceinline__ void bilinear(const Words& in, const Words& out, int side,
                                         const float (&m)[kRecipeStep - 1]) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < side * side; i += kThreads) {
    const float px = bilinear_position(m[0], m[1], m[2], i % side, i / side, side);
    const float py = bilinear_position(m[3], m[4], m[5], i % side, i / side, side);
    const int x = static_cast<int>(px + 1.0f) - 1, y = static_cast<int>(py + 1.0f) - 1;
    const float right = px - static_cast<float>(x), down = py - static_cast<float>(y);
    const Rgb a = pixel_or_black(in, side, x, y), b = pixel_or_black(in, side, x + 1, y);
    const Rgb c = pixel_or_black(in, side, x, y + 1), d = pixel_or_black(in, side, x + 1, y + 1);
    out[i] = packed(scan_fast::bilinear(a.r, b.r, c.r, d.r, right, down),
                    scan_fast::bilinear(a.g, b.g, c.g, d.g, right, down),
                    scan_fast::bilinear(a.b, b.b, c.b, d.b, right, down));
  }
}

// Applies one operation to `now`; returns true where the result is in `other`.
template <typename Words>
__device__ __forceinline__ bool apply(const int32_t* words, const Words& now, const Words& other, int side,
                                      const Tables& tables) {
  const int pixels = side * side;
  const float amount = __int_as_float(words[1]);
  switch (static_cast<Operation>(words[0])) {
    case Operation::kBrightness:
      for_pixels(now, pixels,
                 [=](Rgb p) { return Rgb{blend(0, p.r, amount), blend(0, p.g, amount), blend(0, p.b, amount)}; });
      return false;
    case Operation::kContrast: contrast(now, pixels, amount, tables); return false;
    case Operation::kSaturation:
      for_pixels(now, pixels, [=](Rgb p) {
        const int grey = luma(p.r, p.g, p.b);
        return Rgb{blend(grey, p.r, amount), blend(grey, p.g, amount), blend(grey, p.b, amount)};
      });
      return false;
    case Operation::kHue: {
      const int step = hue_step(amount);
      for_pixels(now, pixels, [=](Rgb p) { return hue_shifted(p, step); });
      return false;
    }
    case Operation::kGrayscale:
      for_pixels(now, pixels, [](Rgb p) {
        const int grey = luma(p.r, p.g, p.b);
        return Rgb{grey, grey, grey};
      });
      return false;
    case Operation::kAutocontrast: autocontrast(now, pixels, tables); return false;
    case Operation::kEqualize: equalize(now, pixels, tables); return false;
    case Operation::kSolarize:
      for_pixels(now, pixels,
                 [=](Rgb p) { return Rgb{solarized(p.r, amount), solarized(p.g, amount), solarized(p.b, amount)}; });
      return false;
    case Operation::kPosterize: {
      const int mask = 255 << (8 - static_cast<int>(amount));
      for_pixels(now, pixels, [=](Rgb p) { return Rgb{p.r & mask & 255, p.g & mask & 255, p.b & mask & 255}; });
      return false;
    }
    case Operation::kSharpness: sharpness(now, other, side, amount); return true;
    case Operation::kNearest: nearest(now, other, side, words + 1); return true;
    case Operation::kBilinear: {
      float m[kRecipeStep - 1];
#pragma unroll
      for (int k = 0; k < kRecipeStep - 1; ++k) m[k] = __int_as_float(words[1 + k]);
      bilinear(now, other, side, m);
      return true;
    }
    default: return false;
  }
}

// Consecutive threads write consecutive values.
template <typename T, typename Words>
__device__ __forceinline__ void write(const ViewBatch& batch, const Words& image, int64_t number,
                                      const int32_t* cutout) {
  const int side = static_cast<int>(batch.side), values = 3 * side * side;
  T* out = static_cast<T*>(batch.out) + number * values;
  __syncthreads();
#pragma unroll 2
  for (int k = static_cast<int>(threadIdx.x); k < values; k += kThreads) {
    const int i = k / 3, c = k % 3;
    const uint32_t word = image[i];
    const int level = static_cast<int>(word >> (8 * c) & 255);
    if constexpr (std::is_same_v<T, uint8_t>) {
      out[k] = static_cast<uint8_t>(level);
    } else {
      const float scale = c == 0 ? batch.scale[0] : c == 1 ? batch.scale[1] : batch.scale[2];
      const float shift = c == 0 ? batch.shift[0] : c == 1 ? batch.shift[1] : batch.shift[2];
      const int y = i / side, x = i % side;
      const bool cut = y >= cutout[0] && y < cutout[2] && x >= cutout[1] && x < cutout[3];
      out[k] = from_float<T>(cut ? 0.0f : product(static_cast<float>(level), scale) + shift);
    }
  }
}

template <typename T, bool kInShared>
__global__ void __launch_bounds__(kThreads, 4) render_views(ViewBatch batch, Workspace work) {
  using Words = std::conditional_t<kInShared, Shared<uint32_t>, uint32_t*>;
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(int, counts, 3 * 256);
  SCAN_FAST_SHARED(unsigned, levels, 3 * 256);
  SCAN_FAST_SHARED(int, partial, 6 * kWarps);
  SCAN_FAST_SHARED(long long, sums, kWarps);
  const Tables tables{counts, levels, partial, sums};
  const int side = static_cast<int>(batch.side);
  const int64_t pixels = batch.side * batch.side;
  Words images;
  if constexpr (kInShared) {
    images = memory.template as<uint32_t>();
  } else {
    images = work.images + static_cast<int64_t>(blockIdx.x) * 2 * pixels;
  }
  for (int64_t image = blockIdx.x; image < batch.count; image += gridDim.x) {
    const int32_t* recipe = batch.recipes + image * (kRecipeHeader + batch.steps * kRecipeStep);
    Words now = images, other = images + pixels;
    __syncthreads();  // the last image has been written out
    crop_resize(batch, work, image, recipe, now);
    for (int64_t step = 0; step < batch.steps; ++step) {
      if (apply(recipe + kRecipeHeader + step * kRecipeStep, now, other, side, tables)) {
        const Words swapped = now;
        now = other;
        other = swapped;
      }
    }
    write<T>(batch, now, image, recipe + 5);
  }
}

bool in_shared(const ViewBatch& batch) {
  return static_cast<size_t>(batch.side * batch.side) * 2 * sizeof(uint32_t) <= kSharedBytes;
}

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Lays the workspace out from `memory` on; returns its size.
size_t lay_out(const ViewBatch& batch, void* memory, Workspace* work) {
  const int longest = static_cast<int>(batch.height > batch.width ? batch.height : batch.width);
  work->taps = most_taps(longest, static_cast<int>(batch.side));
  const int64_t most = in_shared(batch) ? 65535 : kBlocksPerMultiprocessor * multiprocessors();
  work->blocks = batch.count < most ? batch.count : most;
  const size_t filters =
      rounded(static_cast<size_t>(batch.count * 2 * batch.side * (2 + work->taps)) * sizeof(int32_t));
  const size_t images =
      in_shared(batch) ? 0 : static_cast<size_t>(work->blocks * 2 * batch.side * batch.side) * sizeof(uint32_t);
  unsigned char* bytes = static_cast<unsigned char*>(memory);
  work->filters = reinterpret_cast<int32_t*>(bytes);
  work->images = images == 0 || bytes == nullptr ? nullptr : reinterpret_cast<uint32_t*>(bytes + filters);
  return filters + images;
}

template <typename T>
void render(const ViewBatch& batch, const Workspace& work, StreamHandle stream) {
  const dim3 grid(static_cast<unsigned>(work.blocks)), block(kThreads);
  if (in_shared(batch)) {
    const size_t bytes = static_cast<size_t>(batch.side * batch.side) * 2 * sizeof(uint32_t);
    launch(render_views<T, true>, grid, block, bytes, stream, batch, work);
  } else {
    launch(render_views<T, false>, grid, block, 0, stream, batch, work);
  }
}

}  // namespace

size_t augment_cuda_workspace(const ViewBatch& batch) {
  Workspace work;
  return lay_out(batch, nullptr, &work);
}

void augment_cuda(const ViewBatch& batch, void* workspace, StreamHandle stream) {
  if (batch.count == 0) return;
  Workspace work;
  lay_out(batch, workspace, &work);
  const int64_t positions = batch.count * 2 * batch.side;
  const dim3 blocks(static_cast<unsigned>((positions + kThreads - 1) / kThreads));
  launch(tabulate_filters, blocks, dim3(kThreads), 0, stream, batch, work);
  switch (batch.format) {
    case ViewFormat::kUint8: render<uint8_t>(batch, work, stream); return;
    case ViewFormat::kFloat32: render<float>(batch, work, stream); return;
    case ViewFormat::kBFloat16: render<bf16_t>(batch, work, stream); return;
  }
}

}  // namespace scan_fast
