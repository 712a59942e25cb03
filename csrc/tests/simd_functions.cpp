#include "simd_functions.h"

#include "common/simd_rows.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

inline int lanes_left(int64_t n, int64_t i) { return static_cast<int>(n - i < kLanes ? n - i : kLanes); }

template <typename T>
void widen_as(const void* in, int64_t n, float* out) {
  const T* p = static_cast<const T*>(in);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_lanes(out + i, load_lanes(p + i, lanes_left(n, i), 0.0f), lanes_left(n, i));
  }
}
void widen_values(bool half, const uint16_t* in, int64_t n, float* out) {
  half ? widen_as<Fp16>(in, n, out) : widen_as<Bf16>(in, n, out);
}

template <typename T>
void narrow_as(const float* in, int64_t n, void* out) {
  T* p = static_cast<T*>(out);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_lanes(p + i, load_lanes(in + i, lanes_left(n, i), 0.0f), lanes_left(n, i));
  }
}
void narrow_values(bool half, const float* in, int64_t n, uint16_t* out) {
  half ? narrow_as<Fp16>(in, n, out) : narrow_as<Bf16>(in, n, out);
}

void exp_values(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_lanes(out + i, exp(load_lanes(in + i, lanes_left(n, i), 0.0f)), lanes_left(n, i));
  }
}
void log_values(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_lanes(out + i, log(load_lanes(in + i, lanes_left(n, i), 1.0f)), lanes_left(n, i));
  }
}

void reduce(const float* in, float* sum, float* largest, uint32_t* positive, bool* some) {
  const Vec v = load(in);
  *sum = reduce_add(v);
  *largest = reduce_max(v);
  *positive = lane_bits(v > Vec{});
  *some = any(v > Vec{});
}

void expand(uint32_t bits, int n, float* of_bits, float* first) {
  store(of_bits, lanes_of_bits(bits) ? splat(1.0f) : Vec{});
  store(first, first_lanes(n) ? splat(1.0f) : Vec{});
}

void transpose(float* rows, int64_t count, int64_t left, float* out) {
  Vec columns[kMaxColumns];
  load_columns(rows, count, left, columns);
  for (int64_t c = 0; c < count; ++c) {
    store(out + c * kLanes, columns[c]);
    columns[c] += columns[c];
  }
  store_columns(rows, count, left, columns);
}

}  // namespace

const SimdFunctions& simd_functions() {
  static constexpr SimdFunctions functions = {kLanes,      &widen_values, &narrow_values, &exp_values,
                                              &log_values, &reduce,       &expand,        &transpose};
  return functions;
}

}  // namespace scan_fast::SCAN_FAST_ISA
