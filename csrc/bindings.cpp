// The pybind11 module scan_fast._C: bindings and build facts, no logic.
//
// Loading this shared object also registers the dispatcher operators torch.ops.scan_fast.* (each family's _op.cpp has
// a TORCH_LIBRARY_FRAGMENT). Python calls those, because raw pybind functions would break graphs under torch.compile;
// the pybind functions here are the same C++ entry points for direct use and for tests.
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>

#include "augment/augment_op.h"
#include "common/amx.h"
#include "common/cpu_features.h"
#include "common/cpu_gemm.h"
#include "common/large_buffers.h"
#include "common/variants.h"
#include "scan_loss/scan_loss_op.h"
#include "self_label/self_label_op.h"

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
#ifdef SCAN_FAST_WITH_SM90
  info["sm90_kernels"] = true;
#else
  info["sm90_kernels"] = false;
#endif
  info["cpu_isa"] = scan_fast::cpu_isa_name(scan_fast::cpu_isa());
  info["cpu_amx_bf16"] = scan_fast::cpu_has_amx_bf16();
  info["cpu_gemm"] = scan_fast::cpu_gemm_name();
  info["cpu_gemm_bf16"] = scan_fast::cpu_gemm_has_bf16();
  return info;
}

// c = alpha * op(a) * op(b) + beta * c in place, for the tests of the tile products: CPU, rows of contiguous elements,
// float32 or (a and b, where there is a kernel) bfloat16. layout is "nn", "nt" or "tn".
void gemm(const torch::Tensor& a, const torch::Tensor& b, torch::Tensor c, const std::string& layout, double alpha,
          double beta, bool portable) {
  TORCH_CHECK(a.stride(1) == 1 && b.stride(1) == 1 && c.stride(1) == 1, "rows must be contiguous");
  const bool tn = layout == "tn", nt = layout == "nt";
  const int64_t m = c.size(0), n = c.size(1), k = a.size(tn ? 0 : 1);
  const int64_t lda = a.stride(0), ldb = b.stride(0), ldc = c.stride(0);
  float* out = c.data_ptr<float>();
  if (a.scalar_type() == torch::kBFloat16) {
    TORCH_CHECK(scan_fast::cpu_gemm_has_bf16(), "no bfloat16 products on this processor");
    const auto* pa = static_cast<const uint16_t*>(a.data_ptr());
    const auto* pb = static_cast<const uint16_t*>(b.data_ptr());
    (nt ? scan_fast::gemm_nt_bf16 : tn ? scan_fast::gemm_tn_bf16 : scan_fast::gemm_nn_bf16)(m, n, k, alpha, pa, lda, pb,
                                                                                            ldb, beta, out, ldc);
    return;
  }
  const float *pa = a.data_ptr<float>(), *pb = b.data_ptr<float>();
  if (portable) {
    scan_fast::portable_gemm(m, n, k, alpha, pa, tn ? 1 : lda, tn ? lda : 1, pb, nt ? 1 : ldb, nt ? ldb : 1, beta, out,
                             ldc);
    return;
  }
  (nt ? scan_fast::gemm_nt : tn ? scan_fast::gemm_tn : scan_fast::gemm_nn)(m, n, k, alpha, pa, lda, pb, ldb, beta, out,
                                                                           ldc);
}

// Whether operators take the kernels for sm_90a where the device and the problem allow it.
void prefer_sm90(const std::string& family, bool on) {
  TORCH_CHECK(family == "nt_xent" || family == "neighbors", "no kernels for sm_90a in family ", family);
  scan_fast::prefers_sm90(family == "nt_xent" ? scan_fast::Family::kNTXent : scan_fast::Family::kNeighbors) = on;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of scan-fast.";
  module.def("pooled_bytes", &scan_fast::pooled_bytes, "Bytes of large CPU results that wait for reuse.");
  module.def(
      "empty_large",
      [](const std::vector<int64_t>& sizes, at::ScalarType dtype) {
        return scan_fast::empty_large(sizes, at::TensorOptions().dtype(dtype));
      },
      "As torch.empty on the CPU, see csrc/common/large_buffers.h.", py::arg("sizes"), py::arg("dtype"));
  module.def("release_pooled", &scan_fast::release_pooled, "Gives them back to the system.");
  module.def("amx_peak_rate", &scan_fast::amx_peak_rate, "See csrc/common/amx.h.");
  module.def("gemm", &gemm, "One tile product, in place on c.", py::arg("a"), py::arg("b"), py::arg("c"),
             py::arg("layout"), py::arg("alpha"), py::arg("beta"), py::arg("portable"));
  module.def("augment", &scan_fast::augment, "See csrc/augment/augment_op.h.", py::arg("images"), py::arg("indices"),
             py::arg("recipes"), py::arg("size"), py::arg("scale"), py::arg("shift"), py::arg("dtype"));
  module.def("scan_loss_forward", &scan_fast::scan_loss_forward, "See csrc/scan_loss/scan_loss_op.h.",
             py::arg("anchors"), py::arg("neighbors"), py::arg("entropy_weight"));
  module.def("scan_loss_backward", &scan_fast::scan_loss_backward, "See csrc/scan_loss/scan_loss_op.h.",
             py::arg("grad_total"), py::arg("grad_consistency"), py::arg("grad_entropy"), py::arg("anchors"),
             py::arg("neighbors"), py::arg("mean_prob"), py::arg("row_stats"), py::arg("entropy_weight"));
  module.def("self_label_forward", &scan_fast::self_label_forward, "See csrc/self_label/self_label_op.h.",
             py::arg("weak"), py::arg("strong"), py::arg("threshold"), py::arg("balance"));
  module.def("self_label_backward", &scan_fast::self_label_backward, "See csrc/self_label/self_label_op.h.",
             py::arg("grad_loss"), py::arg("strong"), py::arg("target"), py::arg("row_weight"), py::arg("row_stats"));
  module.def("prefer_sm90", &prefer_sm90, "See csrc/common/variants.h.", py::arg("family"), py::arg("on"));
  module.def("build_info", &build_info, "What was compiled, and what this processor has.");
}
