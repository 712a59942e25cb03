// Tensor interface of the augment family, bound by bindings.cpp. The dispatcher operator calls the same function.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace scan_fast {

// images: (N, H, W, 3) uint8; indices: (n) int64 on the CPU, or none; recipes: (n, words) int32 on the CPU, see
// augment.h.
// Returns (n, size, size, 3) uint8, or (n, 3, size, size) float32 or bfloat16 in channels_last memory format, on the
// device of `images`.
at::Tensor augment(const at::Tensor& images, const std::optional<at::Tensor>& indices, const at::Tensor& recipes,
                   int64_t size, std::vector<double> scale, std::vector<double> shift, at::ScalarType dtype);

}  // namespace scan_fast
