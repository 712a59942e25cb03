// Inner loops of the batch normalisation CPU kernel: rows of channels in float vectors, 16 channels (one word of the
// mask) at a time.
//
// Sums per channel are kept in memory, that is in the L1 cache. Each update adds the sum of kRows rows: adding single
// rows would accumulate the rounding errors of thousands of additions.
#include "batch_norm/batch_norm_cpu_kernel.h"
#include "common/simd.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

constexpr int kGroup = 16;
constexpr int kVectors = kGroup / kLanes;
constexpr int64_t kRows = 8;

// Calls body.template operator()<whole>(first channel, channels of the group) for every group.
template <typename Body>
inline void for_groups(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kGroup <= channels; c += kGroup) body.template operator()<true>(c, kGroup);
  if (c < channels) body.template operator()<false>(c, static_cast<int>(channels - c));
}

// Loads vector v of a group of `count` channels that begins at p. An incomplete group is padded with zeros.
template <bool kWhole, typename T>
inline Vec group_load(const T* p, int v, int count) {
  if constexpr (kWhole) return load(p + v * kLanes);
  const int lanes = count - v * kLanes;
  return lanes <= 0 ? Vec{} : load_lanes(p + v * kLanes, lanes < kLanes ? lanes : kLanes, 0.0f);
}
template <bool kWhole, typename T>
inline void group_store(T* p, Vec value, int v, int count) {
  if constexpr (kWhole) return store(p + v * kLanes, value);
  const int lanes = count - v * kLanes;
  if (lanes > 0) store_lanes(p + v * kLanes, value, lanes < kLanes ? lanes : kLanes);
}

// Returns the value before the residual and the ReLU. Both passes use it, so that they agree on the sign.
inline Vec normalised(Vec x, Vec mean, Vec scale, Vec bias) { return (x - mean) * scale + bias; }

// Sums distances from the mean of the first rows. That mean is near the mean of all rows, so little cancels.
template <typename T>
void block_moments(const T* x, int64_t rows, int64_t channels, float* moments) {
  float *sums = moments, *squares = moments + channels, *centre = moments + 2 * channels;
  std::memset(moments, 0, static_cast<size_t>(3 * channels) * sizeof(float));
  const int64_t few = rows < kRows ? rows : kRows;
  for (int64_t row = 0; row < few; ++row) {
    for_groups(channels, [&]<bool kWhole>(int64_t c, int count) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec part = group_load<kWhole>(x + row * channels + c, v, count) * (1.0f / static_cast<float>(few));
        group_store<kWhole>(centre + c, group_load<kWhole>(centre + c, v, count) + part, v, count);
      }
    });
  }
  auto add = [&]<int64_t kCount>(const T* from) {
    for_groups(channels, [&]<bool kWhole>(int64_t c, int count) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec shift = group_load<kWhole>(centre + c, v, count);
        Vec sum{}, square{};
        for (int64_t r = 0; r < kCount; ++r) {
          const Vec d = group_load<kWhole>(from + r * channels + c, v, count) - shift;
          sum += d;
          square += d * d;
        }
        group_store<kWhole>(sums + c, group_load<kWhole>(sums + c, v, count) + sum, v, count);
        group_store<kWhole>(squares + c, group_load<kWhole>(squares + c, v, count) + square, v, count);
      }
    });
  };
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) add.template operator()<kRows>(x + row * channels);
  for (; row < rows; ++row) add.template operator()<1>(x + row * channels);
  const float each = 1.0f / static_cast<float>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    const float off = sums[c] * each;
    squares[c] -= sums[c] * off;
    sums[c] = centre[c] + off;
  }
}

template <typename T, bool kResidual>
void normalise_rows(const T* x, const T* residual, const BatchNormChannels& of, bool relu, int64_t rows,
                    int64_t channels, T* y, uint16_t* mask) {
  const Vec floor = splat(relu ? 0.0f : -__builtin_inff());
  const int64_t words = (channels + kGroup - 1) / kGroup;
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
    for_groups(channels, [&]<bool kWhole>(int64_t c, int count) {
      uint32_t bits = 0;
      for (int v = 0; v < kVectors; ++v) {
        Vec value = normalised(group_load<kWhole>(x + c, v, count), group_load<kWhole>(of.mean + c, v, count),
                               group_load<kWhole>(of.scale + c, v, count), group_load<kWhole>(of.bias + c, v, count));
        if constexpr (kResidual) value += group_load<kWhole>(residual + c, v, count);
        if (mask != nullptr) bits |= lane_bits(value > Vec{}) << (v * kLanes);
        // NaN stays NaN, because NaN < floor is false.
        group_store<kWhole>(y + c, value < floor ? floor : value, v, count);
      }
      if (mask != nullptr) mask[row * words + c / kGroup] = static_cast<uint16_t>(bits);
    });
    if constexpr (kResidual) residual += channels;
  }
}

// Gate of the ReLU on a gradient: none, by the recomputed sign, or by the mask.
enum class Gate { kNone, kSign, kMask };

template <Gate kGate>
inline Vec gated(Vec grad, Vec x, Vec mean, Vec scale, Vec bias, uint32_t bits) {
  if constexpr (kGate == Gate::kSign) return normalised(x, mean, scale, bias) > Vec{} ? grad : Vec{};
  if constexpr (kGate == Gate::kMask) return lanes_of_bits(bits) ? grad : Vec{};
  return grad;
}

template <typename T, Gate kGate>
void gradient_sums(const T* grad_y, const T* x, const uint16_t* mask, const BatchNormChannels& of, int64_t rows,
                   int64_t channels, float* sums) {
  const int64_t words = (channels + kGroup - 1) / kGroup;
  std::memset(sums, 0, static_cast<size_t>(2 * channels) * sizeof(float));
  auto add = [&]<int64_t kCount>(int64_t row) {
    for_groups(channels, [&]<bool kWhole>(int64_t c, int count) {
      const T *g = grad_y + row * channels + c, *value = x + row * channels + c;
      for (int v = 0; v < kVectors; ++v) {
        const Vec mean = group_load<kWhole>(of.mean + c, v, count);
        const Vec scale = group_load<kWhole>(of.scale + c, v, count), bias = group_load<kWhole>(of.bias + c, v, count);
        Vec sum{}, product{};
        for (int64_t r = 0; r < kCount; ++r) {
          const uint32_t bits = kGate == Gate::kMask ? mask[(row + r) * words + c / kGroup] >> (v * kLanes) : 0;
          const Vec element = group_load<kWhole>(value + r * channels, v, count);
          const Vec dz = gated<kGate>(group_load<kWhole>(g + r * channels, v, count), element, mean, scale, bias, bits);
          sum += dz;
          product += dz * (element - mean);
        }
        float *to = sums + c, *to_product = sums + channels + c;
        group_store<kWhole>(to, group_load<kWhole>(to, v, count) + sum, v, count);
        group_store<kWhole>(to_product, group_load<kWhole>(to_product, v, count) + product, v, count);
      }
    });
  };
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) add.template operator()<kRows>(row);
  for (; row < rows; ++row) add.template operator()<1>(row);
}

template <typename T, Gate kGate>
void gradient_rows(const T* grad_y, const T* x, const uint16_t* mask, const BatchNormChannels& of,
                   const BatchNormSlopes& slopes, int64_t rows, int64_t channels, T* grad_x, T* grad_residual) {
  const int64_t words = (channels + kGroup - 1) / kGroup;
  for (int64_t row = 0; row < rows; ++row) {
    for_groups(channels, [&]<bool kWhole>(int64_t c, int count) {
      const int64_t at = row * channels + c;
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t bits = kGate == Gate::kMask ? mask[row * words + c / kGroup] >> (v * kLanes) : 0;
        const Vec mean = group_load<kWhole>(of.mean + c, v, count), scale = group_load<kWhole>(of.scale + c, v, count);
        const Vec element = group_load<kWhole>(x + at, v, count);
        const Vec dz = gated<kGate>(group_load<kWhole>(grad_y + at, v, count), element, mean, scale,
                                    group_load<kWhole>(of.bias + c, v, count), bits);
        Vec grad = scale * dz;
        if (slopes.slope != nullptr) {
          grad += group_load<kWhole>(slopes.slope + c, v, count) * (element - mean) +
                  group_load<kWhole>(slopes.offset + c, v, count);
        }
        group_store<kWhole>(grad_x + at, grad, v, count);
        if (grad_residual != nullptr) group_store<kWhole>(grad_residual + at, dz, v, count);
      }
    });
  }
}

template <typename Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16: return body(Bf16{});
    case DType::kFloat16: return body(Fp16{});
    default: return body(0.0f);
  }
}

template <typename Body>
void with_gate(bool relu, const uint16_t* mask, Body body) {
  if (!relu) return body.template operator()<Gate::kNone>();
  mask == nullptr ? body.template operator()<Gate::kSign>() : body.template operator()<Gate::kMask>();
}

}  // namespace

void batch_norm_moments(DType dtype, const void* x, int64_t rows, int64_t channels, float* moments) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    block_moments(static_cast<const T*>(x), rows, channels, moments);
  });
}

void batch_norm_rows(DType dtype, const void* x, const void* residual, const BatchNormChannels& of, bool relu,
                     int64_t rows, int64_t channels, void* y, uint16_t* mask) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const T *from = static_cast<const T*>(x), *other = static_cast<const T*>(residual);
    other == nullptr ? normalise_rows<T, false>(from, other, of, relu, rows, channels, static_cast<T*>(y), mask)
                     : normalise_rows<T, true>(from, other, of, relu, rows, channels, static_cast<T*>(y), mask);
  });
}

void batch_norm_gradient_sums(DType dtype, const void* grad_y, const void* x, const uint16_t* mask,
                              const BatchNormChannels& of, bool relu, int64_t rows, int64_t channels, float* sums) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    with_gate(relu, mask, [&]<Gate kGate>() {
      gradient_sums<T, kGate>(static_cast<const T*>(grad_y), static_cast<const T*>(x), mask, of, rows, channels, sums);
    });
  });
}

void batch_norm_gradient_rows(DType dtype, const void* grad_y, const void* x, const uint16_t* mask,
                              const BatchNormChannels& of, const BatchNormSlopes& slopes, bool relu, int64_t rows,
                              int64_t channels, void* grad_x, void* grad_residual) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    with_gate(relu, mask, [&]<Gate kGate>() {
      gradient_rows<T, kGate>(static_cast<const T*>(grad_y), static_cast<const T*>(x), mask, of, slopes, rows, channels,
                              static_cast<T*>(grad_x), static_cast<T*>(grad_residual));
    });
  });
}

}  // namespace scan_fast::SCAN_FAST_ISA
