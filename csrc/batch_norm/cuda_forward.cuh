// Forward kernels of batch normalisation: moments of blocks of rows, their combination, the elements.
#pragma once

#include "batch_norm/cuda_rows.cuh"

namespace scan_fast {
namespace {

// origin = the first row of x. partial[block][0] = mean of the block's rows minus the origin, so that it is near zero
// even if the mean is large. partial[block][1] = sum of the rows' squared distances from their mean. Each has
// (channels) values.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResident<kAligned>)
    moments_kernel(const T* __restrict__ x, float* __restrict__ origin, float* __restrict__ partial, Layout l) {
  constexpr int kValues = 2 * kVector + 1, kRows = kAtOnce<T, kAligned, 4>;
  SCAN_FAST_SHARED(float, scratch, kValues* kThreads / 2);
  const Thread me(l);
  const Channels<T, kAligned> at{l.channels, l.vectors, me.vector};
  const int64_t step = l.thread_rows * l.channels;
  float shift[kVector] = {}, sum[kVector] = {}, square[kVector] = {};
  if (me.count > 0) {
    Packed<T, kAligned> packed;
    packed.load(x + me.first * l.channels, at);
    packed.unpack(shift);
  }
  for_rows<kRows, false>(me, l.thread_rows, [&]<int kCount>(int64_t row) {
    Packed<T, kAligned> packed[kCount];
    const T* from = x + row * l.channels;
#pragma unroll
    for (int r = 0; r < kCount; ++r) packed[r].load(from + r * step, at);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      float v[kVector];
      packed[r].unpack(v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float d = v[i] - shift[i];
        sum[i] += d;
        square[i] = fmaf(d, d, square[i]);
      }
    }
  });
  float moments[kValues] = {};  // means, sums of squared distances, number of rows
  if (me.count > 0) {
    Packed<T, kAligned> packed;
    packed.load(x, at);
    float zero[kVector];
    packed.unpack(zero);
    if (blockIdx.x == 0 && me.thread_row == 0) at.write(origin, zero);
    const float each = 1.0f / static_cast<float>(me.count);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float off = sum[i] * each;
      moments[i] = shift[i] - zero[i] + off;
      moments[kVector + i] = square[i] - sum[i] * off;
    }
    moments[2 * kVector] = static_cast<float>(me.count);
  }
  merge_thread_rows(moments, l, me, scratch, [](float (&a)[kValues], const float (&b)[kValues]) {
    const float count = a[2 * kVector] + b[2 * kVector];
    if (b[2 * kVector] == 0.0f) return;  // b has no rows
    const float share = b[2 * kVector] / count, weight = a[2 * kVector] * share;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float d = b[i] - a[i];
      a[i] = fmaf(d, share, a[i]);
      a[kVector + i] += fmaf(d * d, weight, b[kVector + i]);
    }
    a[2 * kVector] = count;
  });
  if (me.thread_row == 0 && me.count > 0) {
    float* out = partial + 2 * static_cast<int64_t>(blockIdx.x) * l.channels;
    at.write(out, moments);
    at.write(out + l.channels, moments + kVector);
  }
}

// Computes mean and inv_std of the batch and updates the running statistics.
__global__ void __launch_bounds__(kThreads)
    finish_moments_kernel(const float* __restrict__ origin, const float* __restrict__ partial, float* mean_out,
                          float* inv_std_out, float* running_mean, float* running_var, float momentum, float eps,
                          Layout l) {
  SCAN_FAST_SHARED(double, scratch, 2 * kThreads / 32 * kFinishChannels);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x % kFinishChannels;
  const bool inside = c < l.channels;
  double sums[2] = {0.0, 0.0};
  if (inside) {
#pragma unroll 4
    for (int b = static_cast<int>(threadIdx.x) / kFinishChannels; b < l.blocks; b += kThreads / kFinishChannels) {
      const int64_t left = l.rows - b * l.rows_per_block;
      const double count = static_cast<double>(left < l.rows_per_block ? left : l.rows_per_block);
      const double mean = static_cast<double>(partial[2 * static_cast<int64_t>(b) * l.channels + c]);
      sums[0] += count * mean;
      sums[1] += count * mean * mean + static_cast<double>(partial[(2 * static_cast<int64_t>(b) + 1) * l.channels + c]);
    }
  }
  add_slices(sums, scratch);
  if (threadIdx.x >= kFinishChannels || !inside) return;
  const double rows = static_cast<double>(l.rows), off = sums[0] / rows;
  const double mean = static_cast<double>(origin[c]) + off;
  double var = (sums[1] - sums[0] * off) / rows;
  if (var < 0) var = 0;  // by rounding; NaN stays NaN
  mean_out[c] = static_cast<float>(mean);
  inv_std_out[c] = static_cast<float>(1.0 / sqrt(var + static_cast<double>(eps)));
  if (running_mean == nullptr) return;
  const double share = static_cast<double>(momentum);
  const float old_mean = running_mean[c], old_var = running_var[c];
  running_mean[c] = old_mean + static_cast<float>(share * (mean - static_cast<double>(old_mean)));
  running_var[c] = old_var + static_cast<float>(share * (var * (rows / (rows - 1)) - static_cast<double>(old_var)));
}

struct Normalise {
  const float *weight, *bias, *running_mean, *running_var;
  float *mean, *inv_std;
  uint8_t* mask;
  float eps;
  bool training, relu;
};

template <typename T, bool kAligned, bool kResidual>
__global__ void __launch_bounds__(kThreads, kResident<kAligned>)
    normalise_kernel(const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y, Normalise p,
                     Layout l) {
  const Thread me(l);
  if (me.count == 0) return;
  const Channels<T, kAligned> at{l.channels, l.vectors, me.vector};
  float mean[kVector], scale[kVector], bias[kVector];
  if (p.training) {
    at.read(p.mean, mean);
    at.read(p.inv_std, scale);
  } else {
    at.read(p.running_mean, mean);
    at.read(p.running_var, scale);
#pragma unroll
    for (int i = 0; i < kVector; ++i) scale[i] = 1.0f / sqrtf(scale[i] + p.eps);
    if (blockIdx.x == 0 && me.thread_row == 0) {
      at.write(p.mean, mean);
      at.write(p.inv_std, scale);
    }
  }
  at.read(p.weight, bias);
#pragma unroll
  for (int i = 0; i < kVector; ++i) scale[i] *= bias[i];
  at.read(p.bias, bias);
  const int64_t step = l.thread_rows * l.channels;
  for_rows<kAtOnce<T, kAligned, kResidual ? 2 : 4>, true>(me, l.thread_rows, [&]<int kCount>(int64_t row) {
    Packed<T, kAligned> packed[kCount];
    [[maybe_unused]] Packed<T, kAligned> other[kCount];
    const int64_t first = row * l.channels;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      packed[r].load(x + first + r * step, at);
      if constexpr (kResidual) other[r].load(residual + first + r * step, at);
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      float v[kVector];
      packed[r].unpack(v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = normalised(v[i], mean[i], scale[i], bias[i]);
      if constexpr (kResidual) {
        float more[kVector];
        other[r].unpack(more);
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] += more[i];
      }
      if (p.mask != nullptr) {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < kVector; ++i) bits |= v[i] > 0.0f ? 1u << i : 0u;
        p.mask[(row + r * l.thread_rows) * l.vectors + me.vector] = static_cast<uint8_t>(bits);
      }
      if (p.relu) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // NaN stays NaN
      }
      store(y + first + r * step, at, v);
    }
  });
}

}  // namespace
}  // namespace scan_fast
