// Logits in any element type for the tests of the losses, with the values the kernel sees as doubles.
#pragma once

#include <limits>
#include <vector>

#include "check.h"
#include "common/device.h"

namespace check {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr scan_fast::DType kDTypes[] = {scan_fast::DType::kFloat32, scan_fast::DType::kBFloat16,
                                        scan_fast::DType::kFloat16};

// Storage of exactly n elements of a type named at run time; every access goes through doubles.
class Elements {
 public:
  Elements(scan_fast::DType dtype, size_t n) : dtype_(dtype), size_(n), bytes_(n * width(), 0xff) {}
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  size_t size() const { return size_; }
  void set(size_t i, double value) {
    scan_fast::dispatch_dtype(dtype_, [&]<typename T>() {
      const T element = scan_fast::from_float<T>(static_cast<float>(value));
      std::memcpy(bytes_.data() + i * width(), &element, width());
    });
  }
  double get(size_t i) const {
    double result = 0;
    scan_fast::dispatch_dtype(dtype_, [&]<typename T>() {
      T element;
      std::memcpy(&element, bytes_.data() + i * width(), width());
      result = static_cast<double>(scan_fast::to_float(element));
    });
    return result;
  }
  bool operator==(const Elements& other) const { return bytes_ == other.bytes_; }

 private:
  size_t width() const { return dtype_ == scan_fast::DType::kFloat32 ? 4 : 2; }
  scan_fast::DType dtype_;
  size_t size_;
  std::vector<unsigned char> bytes_;
};

inline Elements normal_logits(scan_fast::DType dtype, size_t n, double scale, uint64_t seed) {
  Random random{seed};
  Elements elements(dtype, n);
  for (size_t i = 0; i < n; ++i) elements.set(i, scale * random.normal());
  return elements;
}

// The relative error of one rounding to the type.
inline double rounding(scan_fast::DType dtype) {
  return dtype == scan_fast::DType::kFloat32 ? 4e-6 : dtype == scan_fast::DType::kBFloat16 ? 0x1p-8 : 0x1p-10;
}
// Half the distance of its smallest numbers.
inline double smallest(scan_fast::DType dtype) { return dtype == scan_fast::DType::kFloat16 ? 6e-8 : 0.0; }

// log sum exp over x(0..n), in double; -infinity if all are -infinity.
template <typename X>
double log_sum_exp(size_t n, X x) {
  double max = -kInfinity, sum = 0;
  for (size_t c = 0; c < n; ++c) max = std::fmax(max, x(c));
  if (max == -kInfinity) return max;
  for (size_t c = 0; c < n; ++c) sum += std::exp(x(c) - max);
  return max + std::log(sum);
}

}  // namespace check
