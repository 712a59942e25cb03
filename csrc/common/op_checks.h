// Checks of the operators' arguments. Operators can be called past the Python layer, with any tensors and numbers. So
// each one checks whatever decides which memory its kernel touches: these functions cost a few comparisons of integers.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace scan_fast {

// Largest number of rows or columns for kernels that count them in 32 bits, with room for one more tile.
constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max() - 1024;

// Raises unless all elements of a tensor lie in its storage, which may have been made smaller.
inline void check_readable(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " must be a dense tensor, got layout ", tensor.layout());
  if (tensor.numel() == 0) return;
  int64_t elements = tensor.storage_offset() + 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  const size_t needed = static_cast<size_t>(elements) * tensor.itemsize(), held = tensor.storage().nbytes();
  TORCH_CHECK_VALUE(needed <= held, name, " must lie within its storage: shape ", tensor.sizes(), " and strides ",
                    tensor.strides(), " need ", needed, " bytes, and the storage has ", held);
}

inline bool has_aligned_elements(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.itemsize() == 0;
}

// Returns the tensor, or a copy with the same strides if its elements are not aligned, as in torch.frombuffer with an
// odd offset: kernels read them as they are.
inline c10::MaybeOwned<at::Tensor> aligned(const at::Tensor& tensor, const char* name) {
  check_readable(tensor, name);
  if (has_aligned_elements(tensor)) return c10::MaybeOwned<at::Tensor>::borrowed(tensor);
  return c10::MaybeOwned<at::Tensor>::owned(tensor.clone());
}

// Returns the tensor, or a copy if it is not contiguous or its elements are not aligned.
inline c10::MaybeOwned<at::Tensor> dense(const at::Tensor& tensor, const char* name) {
  check_readable(tensor, name);
  c10::MaybeOwned<at::Tensor> result = tensor.expect_contiguous();
  if (has_aligned_elements(*result)) return result;
  return c10::MaybeOwned<at::Tensor>::owned(result->clone());
}

// Returns a shape as Python writes it, but for the comma after a single number.
inline std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

inline const char* dtype_text(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kInt ? "int32" : dtype == at::kShort ? "int16" : "?";
}

// Raises unless a tensor has one shape, dtype and device; returns it, or a copy, as the kernels read it.
inline c10::MaybeOwned<at::Tensor> checked_values(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes,
                                                  at::ScalarType dtype, const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.scalar_type() == dtype && tensor.device() == device, name,
                    " must be ", shape_text(sizes), " ", dtype_text(dtype), " on ", device, ", got ", tensor.sizes(),
                    " ", tensor.scalar_type(), " on ", tensor.device());
  return dense(tensor, name);
}

// The same for an upstream gradient of `count` values, of any shape and real dtype; returns it as contiguous float32.
inline at::Tensor checked_gradient(const at::Tensor& tensor, const char* name, int64_t count,
                                   const at::Device& device) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(tensor.numel() == count && at::isFloatingType(tensor.scalar_type()) && tensor.device() == device,
                    name, " must be ", count, " floating-point values on ", device, ", got ", tensor.sizes(), " ",
                    tensor.scalar_type(), " on ", tensor.device());
  check_readable(tensor, name);
  return *dense(tensor.to(at::kFloat), name);
}

// Raises unless a number is finite, also as the float32 that the kernels take.
inline void check_finite(double value, const char* name) {
  TORCH_CHECK_VALUE(std::abs(value) <= std::numeric_limits<float>::max(), name,
                    " must be a finite number within the range of float32, got ", value);
}

}  // namespace scan_fast
