// Interface of the bfloat16 convolutions, forward and both gradients, on CPUs with AMX or AVX-512-BF16. On other CPUs and
// on GPUs, PyTorch's convolutions are used.
//
// Images are channels-last: x (batch, in_height, in_width, in_channels), y (batch, out_height, out_width,
// out_channels), both bfloat16. Weights and their gradient are float32, (out_channels, kernel, kernel, in_channels);
// weights are rounded to bfloat16 when they are packed. Sums are float32.
//   y[n, p, q, o] = sum over kh, kw, c of x[n, p stride + kh - padding, q stride + kw - padding, c] w[o, kh, kw, c]
#pragma once

#include <cstddef>
#include <cstdint>

namespace scan_fast {

struct ConvolutionShape {
  int64_t batch, in_height, in_width, in_channels, out_height, out_width, out_channels, kernel, stride, padding;
};

// Returns whether the kernel supports this shape on this CPU: AMX or AVX-512-BF16, channels that are multiples of 32,
// kernels up to kConvolutionKernel.
bool convolution_is_usable(const ConvolutionShape& shape);
constexpr int64_t kConvolutionKernel = 7;

enum class ConvolutionPass { kForward, kGradInput, kGradWeight };

// Returns the size of the workspace in bytes; it must be aligned to 64 and may have any content.
size_t convolution_workspace(const ConvolutionShape& shape, ConvolutionPass pass);

void convolution_forward(const ConvolutionShape& shape, const uint16_t* x, const float* weight, uint16_t* y,
                         void* workspace);
// `addend`, like grad_x or null, is added before rounding: the gradient that reaches x on another path.
void convolution_grad_input(const ConvolutionShape& shape, const uint16_t* grad_y, const float* weight,
                            const uint16_t* addend, uint16_t* grad_x, void* workspace);
void convolution_grad_weight(const ConvolutionShape& shape, const uint16_t* grad_y, const uint16_t* x,
                             float* grad_weight, void* workspace);

// The weight gradient of float32 images, for any processor and shape (weight_gradient.cpp).
void convolution_grad_weight_float32(const ConvolutionShape& shape, const float* grad_y, const float* x,
                                     float* grad_weight);

}  // namespace scan_fast
