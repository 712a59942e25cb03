// Inner loops of the augment CPU kernel. It renders one image at a time, in three byte planes that stay in the L1 cache
// (3 KiB each at 32 x 32), with one pass over them per operation.
//
// Crop and resize: the rows of the box are filtered horizontally into planes, then vertically, in 22-bit fixed point as
// in PIL. A 32-bit gather at a pixel's address loads its three channels at once, so the interleaved source needs no
// pass to separate them, and mirroring only changes the addresses. The pointwise operations are loops over pixel.h that
// the compiler vectorises. Histograms and table look-ups stay scalar, at about one byte per cycle.
#include "augment/augment_cpu_kernel.h"
#include "augment/pixel.h"
#include "common/simd.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

inline IntVec load_bytes(const uint8_t* p) {
  ByteVec bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, IntVec);
}
inline void store_bytes(uint8_t* p, IntVec v) {
  const ByteVec bytes = __builtin_convertvector(v, ByteVec);
  std::memcpy(p, &bytes, sizeof(bytes));
}
inline IntVec load_ints(const int32_t* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline IntVec lane_numbers() {
  IntVec v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = lane;
  return v;
}

// Loads the four bytes at base + offset for each lane.
inline IntVec gather_words(const uint8_t* base, IntVec offsets) {
#if defined(SCAN_FAST_ISA_avx512)
  return (IntVec)_mm512_i32gather_epi32((__m512i)offsets, base, 1);
#elif defined(SCAN_FAST_ISA_avx2)
  return (IntVec)_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), (__m256i)offsets, 1);
#else
  IntVec words;
  for (int lane = 0; lane < kLanes; ++lane) {
    int32_t word;
    std::memcpy(&word, base + offsets[lane], sizeof(word));
    words[lane] = word;
  }
  return words;
#endif
}

inline IntVec clamp_fixed(IntVec sum) {
  const IntVec value = sum >> kTapBits;
  return value > 255 ? 255 - IntVec{} : value;
}

struct Image {
  uint8_t* planes;
  int64_t side, stride;  // stride: bytes between planes

  uint8_t* plane(int channel) const { return planes + channel * stride; }
  int64_t pixels() const { return side * side; }
};

// ---- crop and resize ---------------------------------------------------------------------------------------------

// Filters one interleaved row of `width` pixels into `side` pixels of three planes. May read one word plus one filter
// length past the end of the row, and may write one vector past the end of the output rows.
inline void filter_row(const uint8_t* row, int64_t width, bool mirrored, const AxisTaps& taps, int64_t side,
                       uint8_t* out, int64_t stride) {
  const int32_t half = 1 << (kTapBits - 1);
  for (int64_t j = 0; j < side; j += kLanes) {
    if (taps.first == nullptr) {
      const IntVec position = static_cast<int32_t>(j) + lane_numbers();
      IntVec pixel = mirrored ? static_cast<int32_t>(width - 1) - position : position;
      pixel = pixel < 0 ? IntVec{} : pixel >= static_cast<int32_t>(width) ? IntVec{} : pixel;
      const IntVec word = gather_words(row, 3 * pixel);
      for (int c = 0; c < 3; ++c) store_bytes(out + c * stride + j, word >> (8 * c) & 255);
      continue;
    }
    IntVec offset = 3 * load_ints(taps.first + j);
    IntVec red = half - IntVec{}, green = red, blue = red;
    for (int64_t t = 0; t < taps.taps; ++t, offset += 3) {
      const IntVec word = gather_words(row, offset), weight = load_ints(taps.weights + t * taps.padded + j);
      red += (word & 255) * weight;
      green += (word >> 8 & 255) * weight;
      blue += (word >> 16 & 255) * weight;
    }
    store_bytes(out + j, clamp_fixed(red));
    store_bytes(out + stride + j, clamp_fixed(green));
    store_bytes(out + 2 * stride + j, clamp_fixed(blue));
  }
}

// Filters the columns of one plane with rows of `side` pixels.
inline void filter_columns(const uint8_t* in, const AxisTaps& taps, int64_t side, uint8_t* out) {
  for (int64_t y = 0; y < side; ++y) {
    const uint8_t* top = in + taps.first[y] * side;
    for (int64_t x = 0; x < side; x += kLanes) {
      IntVec sum = (1 << (kTapBits - 1)) - IntVec{};
      for (int64_t t = 0; t < taps.number[y]; ++t) {
        sum += load_bytes(top + t * side + x) * taps.weights[t * taps.padded + y];
      }
      store_bytes(out + y * side + x, clamp_fixed(sum));
    }
  }
}

void crop_resize(const ViewBatch& batch, int64_t number, const int32_t* recipe, const AxisTaps& horizontal,
                 const AxisTaps& vertical, const Image& out, uint8_t* row, uint8_t* middle) {
  const int64_t top = recipe[0], left = recipe[1], height = recipe[2], width = recipe[3];
  const int64_t index = batch.indices == nullptr ? number : batch.indices[number];
  const uint8_t* source = batch.images + ((index * batch.height + top) * batch.width + left) * 3;
  const bool resized = vertical.first != nullptr;
  uint8_t* rows = resized ? middle : out.planes;
  const int64_t stride = resized ? plane_bytes(batch.height * batch.side) : out.stride;
  for (int64_t y = 0; y < height; ++y) {
    std::memcpy(row, source + y * batch.width * 3, static_cast<size_t>(3 * width));
    filter_row(row, width, recipe[4] != 0, horizontal, batch.side, rows + y * batch.side, stride);
  }
  if (!resized) return;
  for (int c = 0; c < 3; ++c) filter_columns(middle + c * stride, vertical, batch.side, out.plane(c));
}

// ---- pointwise operations ----------------------------------------------------------------------------------------

// Calls body(r, g, b) for every pixel, and for the padding of the last vector.
template <typename Body>
inline void for_pixels(const Image& image, Body body) {
  uint8_t* __restrict__ r = image.plane(0);
  uint8_t* __restrict__ g = image.plane(1);
  uint8_t* __restrict__ b = image.plane(2);
  const int64_t n = (image.pixels() + 63) / 64 * 64;
  SCAN_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Rgb out = body(Rgb{r[i], g[i], b[i]});
    r[i] = static_cast<uint8_t>(out.r);
    g[i] = static_cast<uint8_t>(out.g);
    b[i] = static_cast<uint8_t>(out.b);
  }
}

// Replaces every pixel value of every channel by body(value), the padding of the planes included.
template <typename Body>
inline void for_values(const Image& image, Body body) {
  uint8_t* __restrict__ p = image.planes;
  const int64_t n = 3 * image.stride;
  SCAN_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(body(p[i]));
}

void contrast(const Image& image, float factor) {
  const uint8_t *r = image.plane(0), *g = image.plane(1), *b = image.plane(2);
  int64_t sum = 0;
  for (int64_t y = 0; y < image.side; ++y, r += image.side, g += image.side, b += image.side) {
    int32_t row = 0;
    for (int64_t x = 0; x < image.side; ++x) row += luma(r[x], g[x], b[x]);
    sum += row;
  }
  const int grey = rounded_mean(sum, image.pixels());
  for_values(image, [=](int value) { return blend(grey, value, factor); });
}

void look_up(const Image& image, int channel, const uint8_t* table) {
  uint8_t* p = image.plane(channel);
  for (int64_t i = 0; i < image.pixels(); ++i) p[i] = table[p[i]];
}

void autocontrast(const Image& image) {
  for (int c = 0; c < 3; ++c) {
    const uint8_t* p = image.plane(c);
    uint8_t low = 255, high = 0;
    for (int64_t i = 0; i < image.pixels(); ++i) {
      low = p[i] < low ? p[i] : low;
      high = p[i] > high ? p[i] : high;
    }
    if (low == high) continue;
    uint8_t table[256];
    for (int value = 0; value < 256; ++value) table[value] = static_cast<uint8_t>(stretched(value, low, high));
    look_up(image, c, table);
  }
}

void equalize(const Image& image) {
  const int64_t pixels = image.pixels();
  for (int c = 0; c < 3; ++c) {
    // Four counters per value: adjacent pixels are often equal, and an increment of one counter waits for the last.
    uint32_t counts[4][256] = {};
    const uint8_t* p = image.plane(c);
    int64_t i = 0;
    for (; i + 4 <= pixels; i += 4) {
      for (int k = 0; k < 4; ++k) ++counts[k][p[i + k]];
    }
    for (; i < pixels; ++i) ++counts[0][p[i]];
    int last = 0;
    for (int value = 0; value < 256; ++value) {
      counts[0][value] += counts[1][value] + counts[2][value] + counts[3][value];
      last = counts[0][value] > 0 ? value : last;
    }
    const int step = static_cast<int>((pixels - counts[0][last]) / 255);
    if (step == 0) continue;
    uint8_t table[256];
    int below = 0;
    for (int value = 0; value < 256; ++value) {
      table[value] = static_cast<uint8_t>(equalized(value, below, step));
      below += static_cast<int>(counts[0][value]);
    }
    look_up(image, c, table);
  }
}

// ---- operations that look at other pixels --------------------------------------------------------------------------

void sharpness(const Image& in, const Image& out, float factor) {
  const int64_t side = in.side;
  std::memcpy(out.planes, in.planes, static_cast<size_t>(3 * in.stride));
  for (int c = 0; c < 3; ++c) {
    for (int64_t y = 1; y + 1 < side; ++y) {
      const uint8_t* __restrict__ middle = in.plane(c) + y * side;
      const uint8_t* __restrict__ above = middle - side;
      const uint8_t* __restrict__ below = middle + side;
      uint8_t* __restrict__ row = out.plane(c) + y * side;
      SCAN_FAST_INDEPENDENT
      for (int64_t x = 1; x < side - 1; ++x) {
        const int sum = above[x - 1] + above[x] + above[x + 1] + middle[x - 1] + middle[x] + middle[x + 1] +
                        below[x - 1] + below[x] + below[x + 1];
        row[x] = static_cast<uint8_t>(blend(smoothed(sum, middle[x]), middle[x], factor));
      }
    }
  }
}

void nearest(const Image& in, const Image& out, const int32_t* m) {
  const int32_t side = static_cast<int32_t>(in.side);
  for (int32_t y = 0; y < side; ++y) {
    // Unsigned, so that positions far outside the image wrap around.
    const uint32_t line = static_cast<uint32_t>(y);
    const uint32_t start_x = static_cast<uint32_t>(m[0]) + static_cast<uint32_t>(m[2]) * line;
    const uint32_t start_y = static_cast<uint32_t>(m[3]) + static_cast<uint32_t>(m[5]) * line;
    for (int32_t x = 0; x < side; x += kLanes) {
      const UnsignedVec column = (UnsignedVec)(x + lane_numbers());
      const IntVec px = (IntVec)(start_x + column * static_cast<uint32_t>(m[1])) >> 16;
      const IntVec py = (IntVec)(start_y + column * static_cast<uint32_t>(m[4])) >> 16;
      const IntVec inside = (px >= 0) & (px < side) & (py >= 0) & (py < side);
      const IntVec position = (py * side + px) & inside;
      for (int c = 0; c < 3; ++c) {
        store_bytes(out.plane(c) + y * in.side + x, gather_words(in.plane(c), position) & 255 & inside);
      }
    }
  }
}

void bilinear(const Image& in, const Image& out, const float* m, uint8_t* bordered) {
  const int32_t side = static_cast<int32_t>(in.side);
  const int64_t pitch = in.side + 3;
  for (int c = 0; c < 3; ++c) {
    std::memset(bordered, 0, static_cast<size_t>(pitch * pitch));
    for (int64_t y = 0; y < side; ++y) {
      std::memcpy(bordered + (y + 1) * pitch + 1, in.plane(c) + y * in.side, static_cast<size_t>(side));
    }
    for (int32_t y = 0; y < side; ++y) {
      uint8_t* __restrict__ row = out.plane(c) + y * in.side;
      SCAN_FAST_INDEPENDENT
      for (int32_t x = 0; x < side; ++x) {
        const float px = bilinear_position(m[0], m[1], m[2], x, y, side);
        const float py = bilinear_position(m[3], m[4], m[5], x, y, side);
        const int column = static_cast<int>(px + 1.0f), line = static_cast<int>(py + 1.0f);  // within the border
        const uint8_t* p = bordered + line * pitch + column;
        row[x] = static_cast<uint8_t>(scan_fast::bilinear(p[0], p[1], p[pitch], p[pitch + 1],
                                                          px - static_cast<float>(column - 1),
                                                          py - static_cast<float>(line - 1)));
      }
    }
  }
}

// Applies one operation to `now`. Returns true if the result is in `other`.
bool apply(Operation operation, const int32_t* words, const Image& now, const Image& other, uint8_t* bordered) {
  float arguments[kRecipeStep - 1];
  std::memcpy(arguments, words, sizeof(arguments));
  const float amount = arguments[0];
  switch (operation) {
    case Operation::kBrightness: for_values(now, [=](int value) { return blend(0, value, amount); }); return false;
    case Operation::kContrast: contrast(now, amount); return false;
    case Operation::kSaturation:
      for_pixels(now, [=](Rgb p) {
        const int grey = luma(p.r, p.g, p.b);
        return Rgb{blend(grey, p.r, amount), blend(grey, p.g, amount), blend(grey, p.b, amount)};
      });
      return false;
    case Operation::kHue: {
      const int step = hue_step(amount);
      for_pixels(now, [=](Rgb p) { return hue_shifted(p, step); });
      return false;
    }
    case Operation::kGrayscale:
      for_pixels(now, [](Rgb p) {
        const int grey = luma(p.r, p.g, p.b);
        return Rgb{grey, grey, grey};
      });
      return false;
    case Operation::kAutocontrast: autocontrast(now); return false;
    case Operation::kEqualize: equalize(now); return false;
    case Operation::kSolarize: for_values(now, [=](int value) { return solarized(value, amount); }); return false;
    case Operation::kPosterize: {
      const int mask = 255 << (8 - static_cast<int>(amount));
      for_values(now, [=](int value) { return value & mask; });
      return false;
    }
    case Operation::kSharpness: sharpness(now, other, amount); return true;
    case Operation::kNearest: nearest(now, other, words); return true;
    case Operation::kBilinear: bilinear(now, other, arguments, bordered); return true;
    default: return false;
  }
}

// ---- output ------------------------------------------------------------------------------------------------------

// Rounds to nearest even; the input must be finite.
inline uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T, typename Convert>
inline void interleave(const Image& image, T* __restrict__ out, Convert convert) {
  const uint8_t* __restrict__ r = image.plane(0);
  const uint8_t* __restrict__ g = image.plane(1);
  const uint8_t* __restrict__ b = image.plane(2);
  const int64_t n = image.pixels();
  SCAN_FAST_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[3 * i] = convert(r[i], 0);
    out[3 * i + 1] = convert(g[i], 1);
    out[3 * i + 2] = convert(b[i], 2);
  }
}

template <typename T>
inline void cut_out(T* out, int64_t side, const int32_t* box) {
  if (box[3] <= box[1]) return;
  for (int64_t y = box[0]; y < box[2]; ++y) {
    std::memset(out + (y * side + box[1]) * 3, 0, static_cast<size_t>(box[3] - box[1]) * 3 * sizeof(T));
  }
}

void write(const ViewBatch& batch, const Image& image, const int32_t* cutout, int64_t number) {
  const int64_t start = number * image.pixels() * 3;
  const float scale[3] = {batch.scale[0], batch.scale[1], batch.scale[2]};
  const float shift[3] = {batch.shift[0], batch.shift[1], batch.shift[2]};
  const auto normalised = [&](uint8_t value, int c) { return static_cast<float>(value) * scale[c] + shift[c]; };
  if (batch.format == ViewFormat::kUint8) {
    interleave(image, static_cast<uint8_t*>(batch.out) + start, [](uint8_t value, int) { return value; });
  } else if (batch.format == ViewFormat::kFloat32) {
    float* out = static_cast<float*>(batch.out) + start;
    interleave(image, out, normalised);
    cut_out(out, image.side, cutout);
  } else {
    uint16_t* out = static_cast<uint16_t*>(batch.out) + start;
    interleave(image, out, [&](uint8_t value, int c) { return bfloat16_bits(normalised(value, c)); });
    cut_out(out, image.side, cutout);
  }
}

}  // namespace

void render_view(const ViewBatch& batch, int64_t number, const AxisTaps& horizontal, const AxisTaps& vertical,
                 const ViewScratch& at, unsigned char* scratch) {
  const int32_t* recipe = batch.recipes + number * (kRecipeHeader + batch.steps * kRecipeStep);
  const int64_t stride = plane_bytes(batch.side * batch.side);
  Image now{scratch + at.planes[0], batch.side, stride}, other{scratch + at.planes[1], batch.side, stride};
  crop_resize(batch, number, recipe, horizontal, vertical, now, scratch + at.row, scratch + at.middle);
  for (int64_t step = 0; step < batch.steps; ++step) {
    const int32_t* words = recipe + kRecipeHeader + step * kRecipeStep;
    if (apply(static_cast<Operation>(words[0]), words + 1, now, other, scratch + at.planes[2])) {
      const Image swapped = now;
      now = other;
      other = swapped;
    }
  }
  write(batch, now, recipe + 5, number);
}

}  // namespace scan_fast::SCAN_FAST_ISA
