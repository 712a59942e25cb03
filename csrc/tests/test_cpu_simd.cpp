// common/simd.h: conversions of all 16-bit values, exp and log, reductions, masks and transpositions.
#include <algorithm>

#include "cpu_check.h"
#include "simd_functions.h"

namespace {

using namespace scan_fast;

const SimdFunctions& simd() { return SCAN_FAST_BEST_ISA(simd_functions)(); }

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The value of a float16 by its definition.
double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}
double value_of(bool half, uint16_t bits) {
  return half ? half_value(bits) : static_cast<double>(float_of(static_cast<uint32_t>(bits) << 16));
}

void all_16_bit_values() {
  std::vector<uint16_t> in(65536);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i);
  for (const bool half : {true, false}) {
    // Odd starts and lengths: whole vectors, and every remainder.
    for (const size_t start : {size_t{0}, size_t{1}, size_t{65536 - 37}}) {
      const size_t n = in.size() - start;
      std::vector<float> wide(n, -1.0f);
      std::vector<uint16_t> back(n);
      simd().widen(half, in.data() + start, static_cast<int64_t>(n), wide.data());
      simd().narrow(half, wide.data(), static_cast<int64_t>(n), back.data());
      for (size_t i = 0; i < n; ++i) {
        const double exact = value_of(half, in[start + i]);
        if (std::isnan(exact)) {
          CHECK(std::isnan(wide[i]) && std::isnan(value_of(half, back[i])));
        } else {
          CHECK(static_cast<double>(wide[i]) == exact && std::signbit(wide[i]) == std::signbit(exact));
          CHECK(back[i] == in[start + i]);
        }
      }
    }
  }
}

// Between two neighbours: to the nearer one, in the middle to the even one.
void narrowing_rounds_to_nearest_even() {
  for (const bool half : {true, false}) {
    const uint16_t infinity = half ? 0x7c00 : 0x7f80;
    std::vector<float> in;
    std::vector<uint16_t> expected;
    for (uint16_t low = 0; low + 1 < infinity; ++low) {
      const double from = value_of(half, low), to = value_of(half, static_cast<uint16_t>(low + 1));
      const float middle = static_cast<float>(0.5 * (from + to));
      const uint16_t even = low & 1 ? static_cast<uint16_t>(low + 1) : low;
      for (const float sign : {1.0f, -1.0f}) {
        const uint16_t minus = sign < 0 ? 0x8000 : 0;
        in.insert(in.end(),
                  {sign * middle, sign * float_of(bits_of(middle) - 1), sign * float_of(bits_of(middle) + 1)});
        for (const uint16_t want : {even, low, static_cast<uint16_t>(low + 1)}) expected.push_back(minus | want);
      }
    }
    for (const float large : {half ? 65520.0f : float_of(0x7f7f8000u), INFINITY}) {
      in.push_back(large);
      expected.push_back(infinity);
    }
    std::vector<uint16_t> out(in.size());
    simd().narrow(half, in.data(), static_cast<int64_t>(in.size()), out.data());
    CHECK(out == expected);
  }
}

void exponentials_and_logarithms() {
  std::vector<float> x, positive;
  check::Random random{3};
  for (int i = 0; i < 20011; ++i) {
    x.push_back(static_cast<float>(175 * random.uniform() - 87));
    positive.push_back(static_cast<float>(std::exp(170 * random.uniform() - 85)));
  }
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<float> e(x.size()), l(x.size());
  simd().exp(x.data(), n, e.data());
  simd().log(positive.data(), n, l.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i])), log = std::log(static_cast<double>(positive[i]));
    CHECK_NEAR(e[i] / exact, 1.0, 2.5e-7);
    CHECK_NEAR(l[i], log, 2.5e-7 * std::fmax(std::fabs(log), 1e-3));
  }
  const std::vector<float> special = {-INFINITY, -1000.0f, -87.4f, 0.0f, NAN};
  simd().exp(special.data(), 5, e.data());
  CHECK(e[0] == 0 && e[1] == 0 && e[2] == 0 && e[3] == 1 && std::isnan(e[4]));
  const std::vector<float> ends = {0.0f, 1.0f, INFINITY, NAN};
  simd().log(ends.data(), 4, l.data());
  CHECK(l[0] == -INFINITY && l[1] == 0 && l[2] == INFINITY && std::isnan(l[3]));
  // Negative numbers have no logarithm, and any result will do. But their bits must not overflow an integer.
  const std::vector<float> negative = {-0.5f, -1e-3f, -1e-8f, -1e30f};
  simd().log(negative.data(), 4, l.data());
}

void reductions_and_masks() {
  const int lanes = static_cast<int>(simd().lanes);
  check::Random random{4};
  for (int trial = 0; trial < 300; ++trial) {
    float x[16], of_bits[16], first[16], sum, largest;
    uint32_t positive, expected_bits = 0;
    bool some;
    double exact = 0, best = -INFINITY;
    for (int i = 0; i < lanes; ++i) {
      // Whole numbers: their sums are exact in any order. Few are positive.
      x[i] = static_cast<float>(static_cast<int>(random.bits() % 41) - (trial % 2 ? 20 : 39));
      exact += static_cast<double>(x[i]);
      best = std::fmax(best, static_cast<double>(x[i]));
      expected_bits |= static_cast<uint32_t>(x[i] > 0) << i;
    }
    simd().reduce(x, &sum, &largest, &positive, &some);
    CHECK(sum == exact && largest == best && positive == expected_bits && some == (expected_bits != 0));
    const int count = trial % (lanes + 1);
    simd().expand(expected_bits, count, of_bits, first);
    for (int i = 0; i < lanes; ++i) {
      CHECK(of_bits[i] == static_cast<float>(expected_bits >> i & 1) && first[i] == (i < count ? 1.0f : 0.0f));
    }
  }
}

void transpositions() {
  const int64_t lanes = simd().lanes;
  for (int64_t count = 1; count <= 32; ++count) {
    for (const int64_t left : {lanes * count + 7, lanes * count, (lanes - 1) * count, int64_t{1}}) {
      std::vector<float> rows(left), out(count * lanes, NAN);
      for (int64_t i = 0; i < left; ++i) rows[i] = static_cast<float>(i + 1);
      simd().transpose(rows.data(), count, left, out.data());
      for (int64_t i = 0; i < std::min(left, lanes * count); ++i) {
        CHECK(out[i % count * lanes + i / count] == static_cast<float>(i + 1));
        CHECK(rows[i] == static_cast<float>(2 * (i + 1)));
      }
    }
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(all_16_bit_values);
  RUN(narrowing_rounds_to_nearest_even);
  RUN(exponentials_and_logarithms);
  RUN(reductions_and_masks);
  RUN(transpositions);
  return check::finish();
}
