// Arithmetic of each operation for one pixel or one pixel value. The same source is compiled for the GPU, for each CPU
// instruction set (the compiler vectorises loops over it) and for the emulated GPU.
// Multiplications and additions must not be fused. The host files are compiled without contraction; on the GPU
// `product` rounds every product.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SCAN_FAST_PIXEL static __host__ __device__ __forceinline__
#else
#define SCAN_FAST_PIXEL static inline __attribute__((always_inline, unused))
#endif

namespace scan_fast {

#if defined(__CUDA_ARCH__)
SCAN_FAST_PIXEL float product(float a, float b) { return __fmul_rn(a, b); }
SCAN_FAST_PIXEL double product(double a, double b) { return __dmul_rn(a, b); }
#else
SCAN_FAST_PIXEL float product(float a, float b) { return a * b; }
SCAN_FAST_PIXEL double product(double a, double b) { return a * b; }
#endif

// PIL's luma in 16.16 fixed point, rounded.
SCAN_FAST_PIXEL int luma(int r, int g, int b) { return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16; }

// PIL's blend of a degenerate value and a pixel value, truncated.
SCAN_FAST_PIXEL int blend(int degenerate, int value, float factor) {
  float mixed = product(static_cast<float>(value - degenerate), factor) + static_cast<float>(degenerate);
  mixed = mixed < 0.0f ? 0.0f : mixed;
  mixed = mixed > 255.0f ? 255.0f : mixed;
  return static_cast<int>(mixed);
}

SCAN_FAST_PIXEL int solarized(int value, float threshold) {
  return static_cast<float>(value) < threshold ? value : 255 - value;
}

// 3x3 kernel of ones with 5 in the middle, divided by 13 and rounded. `sum` adds the nine values. Exact below 2^12 *
// 13.
SCAN_FAST_PIXEL int smoothed(int sum, int middle) { return ((sum + 4 * middle + 6) * 5042) >> 16; }

// round(sum / pixels), halves up.
SCAN_FAST_PIXEL int rounded_mean(int64_t sum, int64_t pixels) {
  return static_cast<int>((2 * sum + pixels) / (2 * pixels));
}

struct Rgb {
  int r, g, b;
};

// Clamps a ramp to 0..255: how far a hue is within 60 degrees of a primary, as a multiple of -saturation.
SCAN_FAST_PIXEL int clamp_ramp(int x) {
  x = x < 0 ? 0 : x;
  return x > 255 ? 255 : x;
}

// Computes a channel from v and s: round(v (1 - s t)), with s and t in units of 1/255. The numerator is exact in
// float32. Multiplying by the reciprocal gives the same integer as dividing, for every numerator.
SCAN_FAST_PIXEL int hsv_channel(int value, int saturation, int t) {
  const int numerator = value * (65025 - saturation * t);
  return static_cast<int>(product(static_cast<float>(numerator), 1.0f / 65025.0f) + 0.5f);
}

// Shifts the hue by step / 256 of the circle, in PIL's 8-bit HSV. PIL computes the hue in sixths of the circle, as an
// integer plus or minus d / chroma in float32. It divides by 6 and truncates 255 times the result in float64. If that
// product is within rounding of an integer, the truncation matters, so it is done exactly here: 256 c - a is exact, and
// 255 c < a if and only if 256 c - a < c.
SCAN_FAST_PIXEL Rgb hue_shifted(Rgb in, int step) {
  const int r = in.r, g = in.g, b = in.b;
  const int high = r > g ? r : g, low = r > g ? g : r;
  const int value = high > b ? high : b, lowest = low < b ? low : b;
  const int chroma = value - lowest, below = 2 * value + lowest - r - g - b;  // value - middle
  const float quotient = static_cast<float>(below) / static_cast<float>(chroma > 0 ? chroma : 1);
  // Integers instead of bool: compilers do not vectorise selections between bools.
  const int g_over_b = g >= b ? 1 : 0, r_over_b = r >= b ? 1 : 0, g_over_r = g >= r ? 1 : 0;
  const int red = r_over_b & (1 - g_over_r), green = g_over_r & g_over_b, blue = 1 - red - green;
  // Red: 1 - q, or q - 1 on blue's side; green: 1 + q or 3 - q; blue: 3 + q or 5 - q.
  const int plus = (red & (1 - g_over_b)) + (green & r_over_b) + (blue & g_over_r);
  const int base = red * (2 * g_over_b - 1) + green * (3 - 2 * r_over_b) + blue * (5 - 2 * g_over_r);
  const float whole = static_cast<float>(base), direction = static_cast<float>(2 * plus - 1);
  const float sixths = whole + product(direction, quotient);
  float circle = sixths / 6.0f;
  circle += circle < 0.0f ? 1.0f : 0.0f;
  int angle = static_cast<int>(product(circle, 255.0f));
  angle -= product(circle, 256.0f) - static_cast<float>(angle) < circle ? 1 : 0;
  // If the chroma is 0, so is the saturation, and the hue does not matter.
  const int divisor = value > 0 ? value : 1;
  const int saturation = static_cast<int>(product(static_cast<float>(chroma) / static_cast<float>(divisor), 255.0f));
  angle = 6 * ((angle + step) & 255);
  const int from_red = angle - 3 * 255, from_green = angle - 2 * 255, from_blue = angle - 4 * 255;
  Rgb out;
  out.r = hsv_channel(value, saturation, clamp_ramp(2 * 255 - (from_red < 0 ? -from_red : from_red)));
  out.g = hsv_channel(value, saturation, clamp_ramp((from_green < 0 ? -from_green : from_green) - 255));
  out.b = hsv_channel(value, saturation, clamp_ramp((from_blue < 0 ? -from_blue : from_blue) - 255));
  return out;
}

SCAN_FAST_PIXEL int hue_step(float shift) { return static_cast<int>(product(static_cast<double>(shift), 255.0)); }

// Stretches a pixel value so that low..high becomes 0..255. Evaluated term by term in float64 as PIL does, because the
// result is truncated.
SCAN_FAST_PIXEL int stretched(int value, int low, int high) {
  const double scale = 255.0 / (high - low);
  const double scaled = product(static_cast<double>(value), scale) + product(-static_cast<double>(low), scale);
  return scaled < 0.0 ? 0 : scaled > 255.0 ? 255 : static_cast<int>(scaled);
}

// PIL's equalisation of one pixel value. `below` counts the pixels of smaller values; `step` is the number of pixels
// without those of the highest value, divided by 255.
SCAN_FAST_PIXEL int equalized(int value, int below, int step) {
  if (step == 0) return value;
  const int result = (below + step / 2) / step;
  return result > 255 ? 255 : result;
}

// Interpolates between four pixel values. x, y: distance of the position from p00, in 0..1.
SCAN_FAST_PIXEL int bilinear(int p00, int p01, int p10, int p11, float x, float y) {
  const float top = product(static_cast<float>(p00), 1.0f - x) + product(static_cast<float>(p01), x);
  const float bottom = product(static_cast<float>(p10), 1.0f - x) + product(static_cast<float>(p11), x);
  return static_cast<int>(product(top, 1.0f - y) + product(bottom, y) + 0.5f);
}

// Returns the input position of output pixel (column, row) along one axis, as a pixel index clamped to -1..side. Both
// ends are outside the image.
SCAN_FAST_PIXEL float bilinear_position(float per_column, float per_row, float start, int column, int row, int side) {
  const float along = product(per_column, static_cast<float>(column) + 0.5f);
  const float across = product(per_row, static_cast<float>(row) + 0.5f);
  const float position = ((along + across) + start) - 0.5f;
  const float last = static_cast<float>(side);
  return position < -1.0f ? -1.0f : position > last ? last : position;
}

// ---- PIL's antialiased bilinear filter, in 22-bit fixed point ------------------------------------------------------

constexpr int kTapBits = 22;

// The source pixels that contribute to output pixel j of `side`, for a box of `length` pixels.
struct TapRange {
  double centre, slope;
  int first, count;
};

SCAN_FAST_PIXEL TapRange tap_range(int j, int length, int side) {
  const double ratio = static_cast<double>(length) / side;
  const double support = ratio < 1.0 ? 1.0 : ratio;
  TapRange range;
  range.centre = product(j + 0.5, ratio);
  range.slope = 1.0 / support;
  range.first = static_cast<int>(range.centre - support + 0.5);
  range.first = range.first < 0 ? 0 : range.first;
  int end = static_cast<int>(range.centre + support + 0.5);
  end = end > length ? length : end;
  range.count = end - range.first;
  return range;
}

SCAN_FAST_PIXEL double tap(const TapRange& range, int t) {
  double distance = product(t + range.first - range.centre + 0.5, range.slope);
  distance = distance < 0.0 ? -distance : distance;
  return distance < 1.0 ? 1.0 - distance : 0.0;
}

SCAN_FAST_PIXEL double tap_sum(const TapRange& range) {
  double sum = 0.0;
  for (int t = 0; t < range.count; ++t) sum += tap(range, t);
  return sum;
}

SCAN_FAST_PIXEL int fixed_tap(const TapRange& range, int t, double sum) {
  return static_cast<int>(0.5 + product(tap(range, t) / sum, static_cast<double>(1 << kTapBits)));
}

// Upper bound on the taps of any output pixel.
SCAN_FAST_PIXEL int most_taps(int length, int side) {
  const int support = length <= side ? 1 : (length + side - 1) / side;
  return 2 * support + 1;
}

SCAN_FAST_PIXEL int from_fixed(int sum) {
  const int value = sum >> kTapBits;  // never negative, because no tap is
  return value > 255 ? 255 : value;
}

}  // namespace scan_fast
