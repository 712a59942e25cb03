// GPU kernels of batch normalisation, residual and ReLU: sums per channel, their combination, then the elements.
//
// batch_norm.h has the formulas, cuda_rows.cuh the assignment of rows and channels to threads. Threads read 16 bytes at
// a time with several rows in flight. If the number of channels is not a multiple of 8, they read single elements,
// about four times slower. Moments are taken of distances from one row of the batch, so a large mean does not cancel
// digits. Threads are merged pairwise (Chan et al. 1979) in float32. A second small kernel merges blocks in double. The
// order is fixed and there are no atomics, so every run on one GPU model gives the same bits.
//
// The limit is memory. In 16 bits, the forward pass moves 6 bytes per element (8 with a residual, plus an eighth for
// the mask) and the backward pass 10 (12). Separate operators move 10 (16) and 16. 1024 x 64 x 32 x 32 forward: 403 MB,
// 94 us at 4.3 TB/s. All blocks are resident at once. They traverse their rows upwards for the sums and downwards for
// the elements, so the rows read last are still in the L2 cache, and layers that fit into it (H200: 60 MB) are read
// from memory once. Three blocks of 256 threads per multiprocessor with 64 bytes in flight per thread make 48 KB; 4.8
// TB/s times 0.8 us need 29 KB. The target is 85% of the bandwidth of a copy in large layers. Small layers (16 MB) are
// bound by three launches of about 2 us each.
//
// Tested on the host with the emulator and compiled for every architecture. docs/gpu-status.md states whether it has
// run on a GPU.
#include "batch_norm/batch_norm.h"
#include "batch_norm/cuda_backward.cuh"
#include "batch_norm/cuda_forward.cuh"

namespace scan_fast {
namespace {

template <typename... Pointers>
bool aligned(const BatchNormShape& shape, Pointers... pointers) {
  return shape.channels % kVector == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

dim3 grid_of(const Layout& l) { return dim3(static_cast<unsigned>(l.blocks), static_cast<unsigned>(l.tiles)); }
dim3 finish_grid_of(const Layout& l) {
  return dim3(static_cast<unsigned>((l.channels + kFinishChannels - 1) / kFinishChannels));
}

// Calls body.template operator()<T, kAligned>().
template <typename Body>
void with_access(DType dtype, bool is_aligned, Body body) {
  dispatch_dtype(dtype, [&]<typename T>() {
    is_aligned ? body.template operator()<T, true>() : body.template operator()<T, false>();
  });
}

}  // namespace

// The workspace holds the partial sums, then the origin of the moments, or slope and offset of the gradients.
size_t batch_norm_cuda_workspace(const BatchNormShape& shape) {
  return static_cast<size_t>(2 * layout_of(shape).blocks + 2) * static_cast<size_t>(shape.channels) * sizeof(float);
}

void batch_norm_forward_cuda(DType dtype, const BatchNormShape& shape, const BatchNormForward& arguments,
                             StreamHandle stream) {
  const Layout l = layout_of(shape);
  float* partial = static_cast<float*>(arguments.workspace);
  float* origin = partial + 2 * static_cast<int64_t>(l.blocks) * l.channels;
  const Normalise parameters{arguments.weight,
                             arguments.bias,
                             arguments.running_mean,
                             arguments.running_var,
                             arguments.mean,
                             arguments.inv_std,
                             reinterpret_cast<uint8_t*>(arguments.mask),
                             arguments.eps,
                             arguments.training,
                             arguments.relu};
  const bool is_aligned =
      aligned(shape, arguments.x, arguments.residual, arguments.y, arguments.weight, arguments.bias, arguments.mean,
              arguments.inv_std, arguments.running_mean, arguments.running_var, partial);
  with_access(dtype, is_aligned, [&]<typename T, bool kAligned>() {
    const T* x = static_cast<const T*>(arguments.x);
    const T* residual = static_cast<const T*>(arguments.residual);
    T* y = static_cast<T*>(arguments.y);
    if (arguments.training) {
      launch(moments_kernel<T, kAligned>, grid_of(l), dim3(kThreads), 0, stream, x, origin, partial, l);
      launch(finish_moments_kernel, finish_grid_of(l), dim3(kThreads), 0, stream, origin, partial, arguments.mean,
             arguments.inv_std, arguments.running_mean, arguments.running_var, arguments.momentum, arguments.eps, l);
    }
    launch(residual == nullptr ? normalise_kernel<T, kAligned, false> : normalise_kernel<T, kAligned, true>, grid_of(l),
           dim3(kThreads), 0, stream, x, residual, y, parameters, l);
  });
}

void batch_norm_backward_cuda(DType dtype, const BatchNormShape& shape, const BatchNormBackward& arguments,
                              StreamHandle stream) {
  const Layout l = layout_of(shape);
  float* partial = static_cast<float*>(arguments.workspace);
  float* slope = partial + 2 * static_cast<int64_t>(l.blocks) * l.channels;
  float* offset = slope + l.channels;
  const Gradients parameters{arguments.weight, arguments.bias, arguments.mean, arguments.inv_std,
                             reinterpret_cast<const uint8_t*>(arguments.mask)};
  const bool is_aligned = aligned(shape, arguments.grad_y, arguments.x, arguments.grad_x, arguments.grad_residual,
                                  arguments.weight, arguments.bias, arguments.mean, arguments.inv_std, partial);
  with_access(dtype, is_aligned, [&]<typename T, bool kAligned>() {
    const T* grad_y = static_cast<const T*>(arguments.grad_y);
    const T* x = static_cast<const T*>(arguments.x);
    auto run = [&]<Gate kGate>() {
      launch(gradient_sums_kernel<T, kAligned, kGate>, grid_of(l), dim3(kThreads), 0, stream, grad_y, x, parameters,
             partial, l);
      launch(finish_gradients_kernel, finish_grid_of(l), dim3(kThreads), 0, stream, partial, arguments.weight,
             arguments.inv_std, arguments.grad_weight, arguments.grad_bias, slope, offset, l);
      launch(gradients_kernel<T, kAligned, kGate>, grid_of(l), dim3(kThreads), 0, stream, grad_y, x, parameters,
             arguments.training ? slope : nullptr, arguments.training ? offset : nullptr,
             static_cast<T*>(arguments.grad_x), static_cast<T*>(arguments.grad_residual), l);
    };
    if (!arguments.relu) {
      run.template operator()<Gate::kNone>();
    } else {
      arguments.mask == nullptr ? run.template operator()<Gate::kSign>() : run.template operator()<Gate::kMask>();
    }
  });
}

}  // namespace scan_fast
