// The portable matrix product of the CPU kernels against products in double precision.
#include "common/cpu_gemm.h"

#include <array>

#include "cpu_check.h"

namespace {

using namespace scan_fast;

enum class Layout { kNN, kNT, kTN };

// Values outside of the matrices, between their rows, must stay as they are.
void compare(int64_t m, int64_t n, int64_t k, float alpha, float beta, Layout layout) {
  check::Random random{static_cast<uint64_t>(m * 10007 + n * 101 + k)};
  const bool tn = layout == Layout::kTN, nt = layout == Layout::kNT;
  const int64_t lda = (tn ? m : k) + 3, ldb = (nt ? k : n) + 1, ldc = n + 2;
  std::vector<float> a((tn ? k : m) * lda), b((nt ? n : k) * ldb), c(m * ldc, NAN);
  for (float& value : a) value = static_cast<float>(random.normal());
  for (float& value : b) value = static_cast<float>(random.normal());
  if (beta != 0) {
    for (int64_t i = 0; i < m * n; ++i) c[i / n * ldc + i % n] = static_cast<float>(random.normal());
  }
  const std::vector<float> before = c;
  (tn ? gemm_tn : nt ? gemm_nt : gemm_nn)(m, n, k, alpha, a.data(), lda, b.data(), ldb, beta, c.data(), ldc);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t d = 0; d < k; ++d) {
        sum += static_cast<double>(tn ? a[d * lda + i] : a[i * lda + d]) *
               static_cast<double>(nt ? b[j * ldb + d] : b[d * ldb + j]);
      }
      const double old = beta == 0 ? 0.0 : static_cast<double>(beta) * static_cast<double>(before[i * ldc + j]);
      CHECK_NEAR(c[i * ldc + j], static_cast<double>(alpha) * sum + old,
                 3e-6 * (1 + std::sqrt(static_cast<double>(k))));
    }
    for (int64_t j = n; j < ldc; ++j) CHECK(std::isnan(c[i * ldc + j]));
  }
}

void odd_sizes_and_layouts() {
  for (const Layout layout : {Layout::kNN, Layout::kNT, Layout::kTN}) {
    for (const auto& [m, n, k] :
         {std::array<int64_t, 3>{1, 1, 1}, {5, 7, 3}, {13, 25, 31}, {12, 48, 64}, {50, 49, 17}, {7, 33, 0}}) {
      compare(m, n, k, 1.0f, 0.0f, layout);
      compare(m, n, k, -0.5f, 0.25f, layout);
    }
  }
}

// More than one block in each direction.
void several_blocks() {
  compare(200, 30, 20, 1.0f, 1.0f, Layout::kNT);
  compare(20, 800, 10, 2.0f, 0.0f, Layout::kNN);
  compare(20, 30, 600, 1.0f, 0.5f, Layout::kTN);
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(odd_sizes_and_layouts);
  RUN(several_blocks);
  return check::finish();
}
