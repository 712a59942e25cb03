// Backward kernels of batch normalisation: sums over blocks of rows, their combination, the elements.
#pragma once

#include "batch_norm/cuda_rows.cuh"

namespace scan_fast {
namespace {

// Gate of the ReLU on a gradient: none, by the recomputed sign, or by the mask.
enum class Gate { kNone, kSign, kMask };

template <Gate kGate>
__device__ __forceinline__ void apply_gate(float (&grad)[kVector], const float (&x)[kVector],
                                           const float (&mean)[kVector], const float (&scale)[kVector],
                                           const float (&bias)[kVector], unsigned bits) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if constexpr (kGate == Gate::kSign) grad[i] = normalised(x[i], mean[i], scale[i], bias[i]) > 0.0f ? grad[i] : 0.0f;
    if constexpr (kGate == Gate::kMask) grad[i] = bits >> i & 1 ? grad[i] : 0.0f;
  }
}

struct Gradients {
  const float *weight, *bias, *mean, *inv_std;
  const uint8_t* mask;
};

// Reads rows that are `row_stride` apart and applies the gate, for both backward kernels.
template <typename T, bool kAligned, Gate kGate>
struct GradientRows {
  const T *grad_y, *x;
  const uint8_t* mask;
  Channels<T, kAligned> at;
  int row_stride;
  float mean[kVector], scale[kVector], bias[kVector];

  __device__ __forceinline__ GradientRows(const T* grads, const T* values, const Gradients& p, const Layout& l,
                                          const Thread& me)
      : grad_y(grads), x(values), mask(p.mask), at{l.channels, l.vectors, me.vector}, row_stride(l.thread_rows) {
    at.read(p.weight, bias);
    at.read(p.inv_std, scale);
#pragma unroll
    for (int i = 0; i < kVector; ++i) scale[i] *= bias[i];
    at.read(p.mean, mean);
    at.read(p.bias, bias);
  }

  // Calls use(offset of the row, dz, x) for kCount rows, beginning with `row`.
  template <int kCount, typename Use>
  __device__ __forceinline__ void visit(int64_t row, Use use) const {
    Packed<T, kAligned> packed_grad[kCount], packed_x[kCount];
    unsigned bits[kCount];
    const int64_t first = row * at.channels, step = row_stride * at.channels;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      packed_grad[r].load(grad_y + first + r * step, at);
      packed_x[r].load(x + first + r * step, at);
      bits[r] = kGate == Gate::kMask ? mask[(row + r * row_stride) * at.vectors + at.vector] : 0u;
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      float grad[kVector], value[kVector];
      packed_grad[r].unpack(grad);
      packed_x[r].unpack(value);
      apply_gate<kGate>(grad, value, mean, scale, bias, bits[r]);
      use(first + r * step, grad, value);
    }
  }
};

// partial[block][0] = sum of dz over the block's rows, [1] = sum of dz (x - mean); each (channels).
template <typename T, bool kAligned, Gate kGate>
__global__ void __launch_bounds__(kThreads, kResident<kAligned>)
    gradient_sums_kernel(const T* __restrict__ grad_y, const T* __restrict__ x, Gradients p,
                         float* __restrict__ partial, Layout l) {
  constexpr int kValues = 2 * kVector;
  SCAN_FAST_SHARED(float, scratch, kValues* kThreads / 2);
  const Thread me(l);
  float sums[kValues] = {};
  if (me.count > 0) {
    const GradientRows<T, kAligned, kGate> rows(grad_y, x, p, l, me);
    for_rows<kAtOnce<T, kAligned, 2>, false>(me, l.thread_rows, [&]<int kCount>(int64_t row) {
      rows.template visit<kCount>(row, [&](int64_t, const float (&dz)[kVector], const float (&v)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[i] += dz[i];
          sums[kVector + i] = fmaf(dz[i], v[i] - rows.mean[i], sums[kVector + i]);
        }
      });
    });
  }
  merge_thread_rows(sums, l, me, scratch, [](float (&a)[kValues], const float (&b)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) a[i] += b[i];
  });
  if (me.thread_row == 0 && me.count > 0) {
    const Channels<T, kAligned> at{l.channels, l.vectors, me.vector};
    float* out = partial + 2 * static_cast<int64_t>(blockIdx.x) * l.channels;
    at.write(out, sums);
    at.write(out + l.channels, sums + kVector);
  }
}

// Computes grad_weight and grad_bias, and the factors of grad_x = scale * dz + slope * (x - mean) + offset.
__global__ void __launch_bounds__(kThreads)
    finish_gradients_kernel(const float* __restrict__ partial, const float* __restrict__ weight,
                            const float* __restrict__ inv_std, float* grad_weight, float* grad_bias, float* slope,
                            float* offset, Layout l) {
  SCAN_FAST_SHARED(double, scratch, 2 * kThreads / 32 * kFinishChannels);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinishChannels + threadIdx.x % kFinishChannels;
  double sums[2] = {0.0, 0.0};
  if (c < l.channels) {
#pragma unroll 4
    for (int b = static_cast<int>(threadIdx.x) / kFinishChannels; b < l.blocks; b += kThreads / kFinishChannels) {
      sums[0] += static_cast<double>(partial[2 * static_cast<int64_t>(b) * l.channels + c]);
      sums[1] += static_cast<double>(partial[(2 * static_cast<int64_t>(b) + 1) * l.channels + c]);
    }
  }
  add_slices(sums, scratch);
  if (threadIdx.x >= kFinishChannels || c >= l.channels) return;
  const double inverse = static_cast<double>(inv_std[c]), rows = static_cast<double>(l.rows);
  const double scale = static_cast<double>(weight[c] * inv_std[c]);
  grad_bias[c] = static_cast<float>(sums[0]);
  grad_weight[c] = static_cast<float>(sums[1] * inverse);
  slope[c] = static_cast<float>(-scale * inverse * inverse * sums[1] / rows);
  offset[c] = static_cast<float>(-scale * sums[0] / rows);
}

// Computes grad_x and grad_residual. slopes and offsets are null in evaluation.
template <typename T, bool kAligned, Gate kGate>
__global__ void __launch_bounds__(kThreads, kResident<kAligned>)
    gradients_kernel(const T* __restrict__ grad_y, const T* __restrict__ x, Gradients p,
                     const float* __restrict__ slopes, const float* __restrict__ offsets, T* __restrict__ grad_x,
                     T* __restrict__ grad_residual, Layout l) {
  // slope and offset are read from shared memory for each row: in registers, they would cost one resident block per
  // multiprocessor.
  SCAN_FAST_SHARED(float, factors, 2 * kMaxThreadColumns * kVector);
  const Thread me(l);
  const Shared<float> slope = factors + me.thread_column * kVector, offset = slope + kMaxThreadColumns * kVector;
  if (slopes != nullptr && me.thread_row == 0 && me.count > 0) {
    const Channels<T, kAligned> at{l.channels, l.vectors, me.vector};
    float v[kVector];
    at.read(slopes, v);
    for (int i = 0; i < kVector; ++i) slope[i] = v[i];
    at.read(offsets, v);
    for (int i = 0; i < kVector; ++i) offset[i] = v[i];
  }
  __syncthreads();
  if (me.count == 0) return;
  const GradientRows<T, kAligned, kGate> rows(grad_y, x, p, l, me);
  for_rows<kAtOnce<T, kAligned, 2>, true>(me, l.thread_rows, [&]<int kCount>(int64_t row) {
    rows.template visit<kCount>(row, [&](int64_t first, float (&dz)[kVector], const float (&v)[kVector]) {
      if (grad_residual != nullptr) store(grad_residual + first, rows.at, dz);
      if (slopes == nullptr) {  // a zero slope would not do: times infinity it is NaN
#pragma unroll
        for (int i = 0; i < kVector; ++i) dz[i] *= rows.scale[i];
        return store(grad_x + first, rows.at, dz);
      }
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const float4 by = ld_shared<float4>(slope + i), and_by = ld_shared<float4>(offset + i);
        dz[i] = fmaf(rows.scale[i], dz[i], fmaf(by.x, v[i] - rows.mean[i], and_by.x));
        dz[i + 1] = fmaf(rows.scale[i + 1], dz[i + 1], fmaf(by.y, v[i + 1] - rows.mean[i + 1], and_by.y));
        dz[i + 2] = fmaf(rows.scale[i + 2], dz[i + 2], fmaf(by.z, v[i + 2] - rows.mean[i + 2], and_by.z));
        dz[i + 3] = fmaf(rows.scale[i + 3], dz[i + 3], fmaf(by.w, v[i + 3] - rows.mean[i + 3], and_by.w));
      }
      store(grad_x + first, rows.at, dz);
    });
  });
}

}  // namespace
}  // namespace scan_fast
