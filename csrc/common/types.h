// Types that all kernel families share. There is no torch header: the kernels see raw pointers only.
#pragma once

#include <cstdint>

namespace scan_fast {

// Element types of the kernels. float64 uses the reference implementation in Python.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A CUDA stream in code without CUDA headers: cudaStream_t is a pointer type.
using StreamHandle = void*;

}  // namespace scan_fast
