// The pybind11 module scan_fast._C: bindings and build facts, no logic.
//
// Loading this shared object also registers the dispatcher operators torch.ops.scan_fast.* (each family's _op.cpp has
// a TORCH_LIBRARY_FRAGMENT). Python calls those, because raw pybind functions would break graphs under torch.compile;
// the pybind functions here are the same C++ entry points for direct use and for tests.
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>

#include "common/cpu_features.h"
#include "common/cpu_gemm.h"

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
  info["cpu_gemm"] = scan_fast::cpu_gemm_name();
  info["cpu_gemm_bf16"] = scan_fast::cpu_gemm_has_bf16();
  return info;
}

// alpha * a * op(b) + beta * c in place, for the tests of the tile products: contiguous rows, CPU, float32.
void gemm(const torch::Tensor& a, const torch::Tensor& b, torch::Tensor c, bool transpose_b, double alpha, double beta,
          bool portable) {
  TORCH_CHECK(a.stride(1) == 1 && b.stride(1) == 1 && c.stride(1) == 1, "rows must be contiguous");
  const int64_t m = c.size(0), n = c.size(1), k = a.size(1);
  const float *pa = a.data_ptr<float>(), *pb = b.data_ptr<float>();
  float* pc = c.data_ptr<float>();
  if (portable) {
    scan_fast::portable_gemm(m, n, k, alpha, pa, a.stride(0), pb, transpose_b ? 1 : b.stride(0),
                             transpose_b ? b.stride(0) : 1, beta, pc, c.stride(0));
  } else {
    (transpose_b ? scan_fast::gemm_nt : scan_fast::gemm_nn)(m, n, k, alpha, pa, a.stride(0), pb, b.stride(0), beta, pc,
                                                            c.stride(0));
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of scan-fast.";
  module.def("gemm", &gemm, "One tile product, in place on c.", py::arg("a"), py::arg("b"), py::arg("c"),
             py::arg("transpose_b"), py::arg("alpha"), py::arg("beta"), py::arg("portable"));
  module.def("build_info", &build_info, "What was compiled, and what this processor has.");
}
