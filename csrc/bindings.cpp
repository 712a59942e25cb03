// The pybind11 module scan_fast._C: bindings and build facts, no logic.
//
// Loading this shared object also registers the dispatcher operators torch.ops.scan_fast.* (each family's _op.cpp has
// a TORCH_LIBRARY_FRAGMENT). Python calls those, because raw pybind functions would break graphs under torch.compile;
// the pybind functions here are the same C++ entry points for direct use and for tests.
#include <torch/csrc/utils/pybind.h>

#include "common/cpu_features.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = SCAN_FAST_TORCH_VERSION;
  info["cpp"] = __VERSION__;
#ifdef SCAN_FAST_WITH_CUDA
  info["cuda"] = SCAN_FAST_CUDA_COMPILER;
  info["cuda_architectures"] = SCAN_FAST_CUDA_ARCHS_TEXT;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  info["cpu_isa"] = scan_fast::cpu_isa_name(scan_fast::cpu_isa());
  info["cpu_amx_bf16"] = scan_fast::cpu_has_amx_bf16();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of scan-fast.";
  module.def("build_info", &build_info, "What was compiled, and what this processor has.");
}
