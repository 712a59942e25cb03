// GPU kernels of the augment family: the operations of a recipe on an image with one 32-bit word per pixel.
//
// Pointwise operations work in place on the pixels that the same thread wrote, without a barrier. An operation that
// reads other pixels or shared tables begins with a barrier. Included by augment_cuda.cu only.
#pragma once

#include "augment/cuda_group.cuh"

namespace scan_fast {
namespace {

template <typename G, typename Words, typename Body>
__device__ __forceinline__ void for_pixels(const Words& image, int pixels, Body body) {
  // Not unrolled: the divisions of the hue shift call subroutines, and saving registers around them would spill.
#pragma unroll 1
  for (int i = G::thread(); i < pixels; i += G::kSize) {
    const uint32_t word = image[i];
    const Rgb out = body(unpacked(word));
    image[i] = packed(out.r, out.g, out.b);
  }
}

template <typename G, typename Words>
__device__ __forceinline__ void contrast(const Words& image, int pixels, float factor, const Tables& tables) {
  long long sum = 0;
  for (int i = G::thread(); i < pixels; i += G::kSize) {
    const uint32_t word = image[i];
    const Rgb p = unpacked(word);
    sum += luma(p.r, p.g, p.b);
  }
  const int grey = rounded_mean(group_sum<G>(sum, tables.sums), pixels);
  for_pixels<G>(image, pixels, [=](Rgb p) {
    return Rgb{blend(grey, p.r, factor), blend(grey, p.g, factor), blend(grey, p.b, factor)};
  });
}

// Waits at a barrier, then replaces every pixel value by its table entry.
template <typename G, typename Words>
__device__ __forceinline__ void look_up(const Words& image, int pixels, const Tables& tables) {
  G::sync();
  for (int i = G::thread(); i < pixels; i += G::kSize) {
    const uint32_t word = image[i];
    const uint32_t r = tables.lookup[word & 255], g = tables.lookup[word >> 8 & 255],
                   b = tables.lookup[word >> 16 & 255];
    image[i] = (r & 255u) | (g & 0xff00u) | (b & 0xff0000u);
  }
}

template <typename G, typename Words>
__device__ __forceinline__ void autocontrast(const Words& image, int pixels, const Tables& tables) {
  int low[3] = {255, 255, 255}, high[3] = {0, 0, 0};
  for (int i = G::thread(); i < pixels; i += G::kSize) {
    const uint32_t word = image[i];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const int value = static_cast<int>(word >> (8 * c) & 255);
      low[c] = min(low[c], value);
      high[c] = max(high[c], value);
    }
  }
  G::sync();
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    low[c] = warp_min(low[c]);
    high[c] = warp_max(high[c]);
    if (G::lane() == 0) {
      tables.partial[2 * c * G::kWarps + G::warp()] = low[c];
      tables.partial[(2 * c + 1) * G::kWarps + G::warp()] = high[c];
    }
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    for (int w = 0; w < G::kWarps; ++w) {
      const int other_low = tables.partial[2 * c * G::kWarps + w];
      const int other_high = tables.partial[(2 * c + 1) * G::kWarps + w];
      low[c] = min(low[c], other_low);
      high[c] = max(high[c], other_high);
    }
  }
#pragma unroll 1
  for (int value = G::thread(); value < kValues; value += G::kSize) {
    int to[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) to[c] = low[c] < high[c] ? stretched(value, low[c], high[c]) : value;
    tables.lookup[value] = packed(to[0], to[1], to[2]);
  }
  look_up<G>(image, pixels, tables);
}

template <typename G, typename Words>
__device__ __forceinline__ void equalize(const Words& image, int pixels, const Tables& tables) {
  constexpr int kOwn = kValues / G::kSize;  // consecutive pixel values per thread
  G::sync();
  for (int i = G::thread(); i < 3 * kValues; i += G::kSize) tables.counts[i] = 0;
  G::sync();
  for (int i = G::thread(); i < pixels; i += G::kSize) {
    const uint32_t word = image[i];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      atomicAdd((tables.counts + static_cast<int64_t>(kValues * c + static_cast<int>(word >> (8 * c) & 255))).get(), 1);
    }
  }
  G::sync();
  uint32_t becomes[kOwn] = {};
#pragma unroll 1
  for (int c = 0; c < 3; ++c) {
    // Count the pixels below this thread's values and find the highest value present: within the warp, then the group.
    const int first = kValues * c + G::thread() * kOwn;
    int count[kOwn], own = 0, last = -1;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      count[i] = tables.counts[first + i];
      own += count[i];
      if (count[i] > 0) last = G::thread() * kOwn + i;
    }
    int below = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kFullMask, below, static_cast<unsigned>(offset));
      below += G::lane() >= offset ? other : 0;
    }
    last = warp_max(last);
    if (G::lane() == 31) {
      tables.partial[2 * c * G::kWarps + G::warp()] = below;
      tables.partial[(2 * c + 1) * G::kWarps + G::warp()] = last;
    }
    __syncthreads();
    for (int w = 0; w < G::kWarps; ++w) {
      const int sum = tables.partial[2 * c * G::kWarps + w], highest = tables.partial[(2 * c + 1) * G::kWarps + w];
      below += w < G::warp() ? sum : 0;
      last = max(last, highest);
    }
    below -= own;
    const int highest_count = tables.counts[kValues * c + last];
    const int step = (pixels - highest_count) / 255;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      becomes[i] |= static_cast<uint32_t>(equalized(G::thread() * kOwn + i, below, step)) << (8 * c);
      below += count[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) tables.lookup[G::thread() * kOwn + i] = becomes[i];
  look_up<G>(image, pixels, tables);
}

template <typename G, typename Words>
__device__ __forceinline__ void sharpness(const Words& in, const Words& out, int side, float factor) {
  G::sync();
  for (Walk<G> at(side); at.i < side * side; at.next()) {
    const int i = at.i, x = at.x, y = at.y;
    const uint32_t middle = in[i];
    if (x == 0 || y == 0 || x == side - 1 || y == side - 1) {
      out[i] = middle;
      continue;
    }
    // A sum of nine values has 12 bits, so red and blue are summed in one word, 16 bits apart.
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

template <typename G, typename Words>
__device__ __forceinline__ void nearest(const Words& in, const Words& out, int side, const int32_t* words) {
  G::sync();
  for (Walk<G> at(side); at.i < side * side; at.next()) {
    // Unsigned, so that positions far outside the image wrap around, as in the CPU kernel.
    const unsigned y = static_cast<unsigned>(at.y), x = static_cast<unsigned>(at.x);
    unsigned m[6];
#pragma unroll
    for (int k = 0; k < 6; ++k) m[k] = static_cast<unsigned>(words[k]);
    const int px = static_cast<int>(m[0] + m[1] * x + m[2] * y) >> 16;
    const int py = static_cast<int>(m[3] + m[4] * x + m[5] * y) >> 16;
    uint32_t word = 0;
    if (px >= 0 && px < side && py >= 0 && py < side) word = in[py * side + px];
    out[at.i] = word;
  }
}

template <typename Words>
__device__ __forceinline__ Rgb pixel_or_black(const Words& in, int side, int x, int y) {
  uint32_t word = 0;
  if (x >= 0 && x < side && y >= 0 && y < side) word = in[y * side + x];
  return unpacked(word);
}

template <typename G, typename Words>
__device__ __forceinline__ void bilinear(const Words& in, const Words& out, int side,
                                         const float (&m)[kRecipeStep - 1]) {
  G::sync();
  for (Walk<G> at(side); at.i < side * side; at.next()) {
    const float px = bilinear_position(m[0], m[1], m[2], at.x, at.y, side);
    const float py = bilinear_position(m[3], m[4], m[5], at.x, at.y, side);
    const int x = static_cast<int>(px + 1.0f) - 1, y = static_cast<int>(py + 1.0f) - 1;
    const float right = px - static_cast<float>(x), down = py - static_cast<float>(y);
    const Rgb a = pixel_or_black(in, side, x, y), b = pixel_or_black(in, side, x + 1, y);
    const Rgb c = pixel_or_black(in, side, x, y + 1), d = pixel_or_black(in, side, x + 1, y + 1);
    out[at.i] = packed(scan_fast::bilinear(a.r, b.r, c.r, d.r, right, down),
                       scan_fast::bilinear(a.g, b.g, c.g, d.g, right, down),
                       scan_fast::bilinear(a.b, b.b, c.b, d.b, right, down));
  }
}

// Applies one operation to `now`. Returns true if the result is in `other`.
template <typename G, typename Words>
__device__ __forceinline__ bool apply(const int32_t* words, const Words& now, const Words& other, int side,
                                      const Tables& tables) {
  const int pixels = side * side;
  const float amount = __int_as_float(words[1]);
  switch (static_cast<Operation>(words[0])) {
    case Operation::kBrightness:
      for_pixels<G>(now, pixels,
                    [=](Rgb p) { return Rgb{blend(0, p.r, amount), blend(0, p.g, amount), blend(0, p.b, amount)}; });
      return false;
    case Operation::kContrast: contrast<G>(now, pixels, amount, tables); return false;
    case Operation::kSaturation:
      for_pixels<G>(now, pixels, [=](Rgb p) {
        const int grey = luma(p.r, p.g, p.b);
        return Rgb{blend(grey, p.r, amount), blend(grey, p.g, amount), blend(grey, p.b, amount)};
      });
      return false;
    case Operation::kHue: {
      const int step = hue_step(amount);
      for_pixels<G>(now, pixels, [=](Rgb p) { return hue_shifted(p, step); });
      return false;
    }
    case Operation::kGrayscale:
      for_pixels<G>(now, pixels, [](Rgb p) {
        const int grey = luma(p.r, p.g, p.b);
        return Rgb{grey, grey, grey};
      });
      return false;
    case Operation::kAutocontrast: autocontrast<G>(now, pixels, tables); return false;
    case Operation::kEqualize: equalize<G>(now, pixels, tables); return false;
    case Operation::kSolarize:
      for_pixels<G>(now, pixels,
                    [=](Rgb p) { return Rgb{solarized(p.r, amount), solarized(p.g, amount), solarized(p.b, amount)}; });
      return false;
    case Operation::kPosterize: {
      const int mask = 255 << (8 - static_cast<int>(amount));
      for_pixels<G>(now, pixels, [=](Rgb p) { return Rgb{p.r & mask & 255, p.g & mask & 255, p.b & mask & 255}; });
      return false;
    }
    case Operation::kSharpness: sharpness<G>(now, other, side, amount); return true;
    case Operation::kNearest: nearest<G>(now, other, side, words + 1); return true;
    case Operation::kBilinear: {
      float m[kRecipeStep - 1];
#pragma unroll
      for (int k = 0; k < kRecipeStep - 1; ++k) m[k] = __int_as_float(words[1 + k]);
      bilinear<G>(now, other, side, m);
      return true;
    }
    default: return false;
  }
}

}  // namespace
}  // namespace scan_fast
