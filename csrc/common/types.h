// Plain types shared by every kernel family. No torch header: the kernels see raw pointers only.
#pragma once

#include <cstdint>

namespace scan_fast {

// Element types that the losses accept. float64 goes through the reference implementation in Python.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A CUDA stream as the torch-free layer sees it: cudaStream_t is a pointer type, so this converts without a cast
// through an integer. CPU launchers take none.
using StreamHandle = void*;

}  // namespace scan_fast
