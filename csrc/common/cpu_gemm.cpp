#include "common/cpu_gemm.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "common/cpu_features.h"

namespace scan_fast {
namespace {

// Fortran and C interfaces of MKL with 32-bit integers, as PyTorch links it.
using Sgemm = void (*)(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc);
using GemmBf16 = void (*)(int layout, int transa, int transb, int m, int n, int k, float alpha, const uint16_t* a,
                          int lda, const uint16_t* b, int ldb, float beta, float* c, int ldc);
using SetThreadsLocal = int (*)(int threads);

bool wants(const char* products) {
  const char* wanted = std::getenv("SCAN_FAST_CPU_GEMM");
  return wanted != nullptr && std::strcmp(wanted, products) == 0;
}

struct Mkl {
  Sgemm sgemm = nullptr;
  GemmBf16 gemm_bf16 = nullptr;
  SetThreadsLocal set_threads = [](int) { return 0; };

  Mkl() {
    if (wants("tiles")) return;
    // Symbols are looked up in PyTorch's library only: another BLAS in the process may use 64-bit integers or other
    // threads.
    void* torch_cpu = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch_cpu == nullptr) return;
    const auto found = reinterpret_cast<SetThreadsLocal>(dlsym(torch_cpu, "MKL_Set_Num_Threads_Local"));
    if (found == nullptr) return;  // not MKL: it could not be limited to one thread
    set_threads = found;
    sgemm = reinterpret_cast<Sgemm>(dlsym(torch_cpu, "sgemm_"));
    gemm_bf16 = reinterpret_cast<GemmBf16>(dlsym(torch_cpu, "cblas_gemm_bf16bf16f32"));
  }
};

const Mkl& mkl() {
  static const Mkl instance;
  return instance;
}

// Limits MKL to the calling thread during its lifetime.
class OneThread {
 public:
  OneThread() : before_(mkl().set_threads(1)) {}
  ~OneThread() { mkl().set_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// A row-major C = op(A) * op(B) is a column-major C^T = op(B)^T * op(A)^T.
void mkl_sgemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
               int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (mkl().sgemm == nullptr) throw std::logic_error("float32 products of MKL need cpu_gemm_is_used()");
  const OneThread pinned;
  const int rows = static_cast<int>(m), columns = static_cast<int>(n), depth = static_cast<int>(k);
  const int a_step = static_cast<int>(lda), b_step = static_cast<int>(ldb), c_step = static_cast<int>(ldc);
  mkl().sgemm(transpose_b ? "T" : "N", transpose_a ? "T" : "N", &columns, &rows, &depth, &alpha, b, &b_step, a, &a_step,
              &beta, c, &c_step);
}

constexpr int kRowMajor = 101, kNoTranspose = 111, kTranspose = 112;  // the CBLAS enumerators

void mkl_gemm_bf16(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const uint16_t* a,
                   int64_t lda, const uint16_t* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (mkl().gemm_bf16 == nullptr) throw std::logic_error("bfloat16 products need cpu_gemm_has_bf16()");
  const OneThread pinned;
  mkl().gemm_bf16(kRowMajor, transpose_a ? kTranspose : kNoTranspose, transpose_b ? kTranspose : kNoTranspose,
                  static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), alpha, a, static_cast<int>(lda), b,
                  static_cast<int>(ldb), beta, c, static_cast<int>(ldc));
}

}  // namespace

bool cpu_gemm_is_used() {
  static const bool used = mkl().sgemm != nullptr && (wants("mkl") || cpu_is_from_intel());
  return used;
}

bool cpu_gemm_has_bf16() { return mkl().gemm_bf16 != nullptr && cpu_has_amx_bf16(); }

void gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
             float beta, float* c, int64_t ldc) {
  mkl_sgemm(false, true, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
             float beta, float* c, int64_t ldc) {
  mkl_sgemm(false, false, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
             float beta, float* c, int64_t ldc) {
  mkl_sgemm(true, false, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_nt_bf16(int64_t m, int64_t n, int64_t k, float alpha, const uint16_t* a, int64_t lda, const uint16_t* b,
                  int64_t ldb, float beta, float* c, int64_t ldc) {
  mkl_gemm_bf16(false, true, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_nn_bf16(int64_t m, int64_t n, int64_t k, float alpha, const uint16_t* a, int64_t lda, const uint16_t* b,
                  int64_t ldb, float beta, float* c, int64_t ldc) {
  mkl_gemm_bf16(false, false, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_tn_bf16(int64_t m, int64_t n, int64_t k, float alpha, const uint16_t* a, int64_t lda, const uint16_t* b,
                  int64_t ldb, float beta, float* c, int64_t ldc) {
  mkl_gemm_bf16(true, false, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

}  // namespace scan_fast
