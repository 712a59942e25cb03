// The arithmetic of each operation for one pixel or one grey level: the same source for the GPU, for each of the CPU's
// instruction sets (where the compiler turns loops over it into vectors) and for the emulated GPU. Multiplications and
// additions must not be fused: the host's files are compiled so, and on the GPU every product is rounded by itself.
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

// PIL's blend of a degenerate level and a level, truncated.
SCAN_FAST_PIXEL int blend(int degenerate, int level, float factor) {
  float value = product(static_cast<float>(level - degenerate), factor) + static_cast<float>(degenerate);
  value = value < 0.0f ? 0.0f : value;
  value = value > 255.0f ? 255.0f : value;
  return static_cast<int>(value);
}

SCAN_FAST_PIXEL int solarized(int level, float threshold) {
  return static_cast<float>(level) < threshold ? level : 255 - level;
}

// A 3x3 kernel of ones, 5 in the middle, over 13: `sum` over the nine levels, rounded. Exact below 2^12 * 13.
SCAN_FAST_PIXEL int smoothed(int sum, int middle) { return ((sum + 4 * middle + 6) * 5042) >> 16; }

// round(sum / pixels), halves up.
SCAN_FAST_PIXEL int rounded_mean(int64_t sum, int64_t pixels) {
  return static_cast<int>((2 * sum + pixels) / (2 * pixels));
}

struct Rgb {
  int r, g, b;
};

// How far a hue is within 60 degrees of a primary, as the multiple of -saturation that is added: 0..255.
SCAN_FAST_PIXEL int clamp_ramp(int x) {
  x = x < 0 ? 0 : x;
  return x > 255 ? 255 : x;
}

// A channel from v and s: round(v (1 - s t)) with s and t in units of 1/255. The numerator is exact in float32, and
// multiplying by the reciprocal gives the same whole number as dividing, for every numerator.
SCAN_FAST_PIXEL int hsv_channel(int value, int saturation, int t) {
  const int numerator = value * (65025 - saturation * t);
  return static_cast<int>(product(static_cast<float>(numerator), 1.0f / 65025.0f) + 0.5f);
}

// Shifts the hue by step / 256 of the circle, in PIL's 8-bit HSV. PIL takes the hue in sixths of the circle, a whole
// number plus or minus d / chroma in float32, divides by 6 and truncates 255 times the result, in float64. Where that
// product is a whole number but for rounding, the truncation matters, so it is done exactly: 256 c - a is exact, and
// 255 c < a just where 256 c - a < c.
SCAN_FAST_PIXEL Rgb hue_shifted(Rgb in, int step) {
  const int r = in.r, g = in.g, b = in.b;
  const int high = r > g ? r : g, low = r > g ? g : r;
  const int value = high > b ? high : b, lowest = low < b ? low : b;
  const int chroma = value - lowest, below = 2 * value + lowest - r - g - b;  // value - middle
  const float quotient = static_cast<float>(below) / static_cast<float>(chroma > 0 ? chroma : 1);
  // Numbers rather than truth values, because compilers do not turn selections among those into vectors.
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
  // Where the chroma is 0, so is the saturation, and the hue does not matter.
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

// A level stretched so that low..high becomes 0..255; term by term in float64 as PIL does, because it is truncated.
SCAN_FAST_PIXEL int stretched(int level, int low, int high) {
  const double scale = 255.0 / (high - low);
  const double value = product(static_cast<double>(level), scale) + product(-static_cast<double>(low), scale);
  return value < 0.0 ? 0 : value > 255.0 ? 255 : static_cast<int>(value);
}

// The step of PIL's equalisation: pixels but for those of the highest level, over 255.
SCAN_FAST_PIXEL int equalized(int level, int below, int step) {
  if (step == 0) return level;
  const int value = (below + step / 2) / step;
  return value > 255 ? 255 : value;
}

// A mean of four levels. x, y: the position's distance from the first, in 0..1.
SCAN_FAST_PIXEL int bilinear(int p00, int p01, int p10, int p11, float x, float y) {
  const float top = product(static_cast<float>(p00), 1.0f - x) + product(static_cast<float>(p01), x);
  const float bottom = product(static_cast<float>(p10), 1.0f - x) + product(static_cast<float>(p11), x);
  return static_cast<int>(product(top, 1.0f - y) + product(bottom, y) + 0.5f);
}

// Where output pixel (column, row) lies in the input, along one axis, as a pixel's index: between -1 and side, which
// are outside.
SCAN_FAST_PIXEL float bilinear_position(float per_column, float per_row, float start, int column, int row, int side) {
  const float along = product(per_column, static_cast<float>(column) + 0.5f);
  const float across = product(per_row, static_cast<float>(row) + 0.5f);
  const float position = ((along + across) + start) - 0.5f;
  const float last = static_cast<float>(side);
  return position < -1.0f ? -1.0f : position > last ? last : position;
}

// ---- PIL's antialiased bilinear filter, in 22-bit fixed point ------------------------------------------------------

constexpr int kTapBits = 22;

// The source pixels that make output pixel j of `side`, of a box of `length`.
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

// The most taps that any output pixel has.
SCAN_FAST_PIXEL int most_taps(int length, int side) {
  const int support = length <= side ? 1 : (length + side - 1) / side;
  return 2 * support + 1;
}

SCAN_FAST_PIXEL int from_fixed(int sum) {
  const int level = sum >> kTapBits;  // never negative: the taps are not
  return level > 255 ? 255 : level;
}

}  // namespace scan_fast
