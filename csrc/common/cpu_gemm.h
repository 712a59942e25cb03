// Single-threaded float32 matrix products, called by the tasks of common/parallel.h.
//
// They use the MKL in PyTorch (libtorch_cpu exports the symbols, so no dependency is added), limited to the calling
// thread. If PyTorch was built without MKL, they use the portable kernel in cpu_gemm_kernel.cpp.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"

namespace scan_fast {

// Returns "mkl" or "portable". The environment variable SCAN_FAST_CPU_GEMM=portable forces the latter, for tests.
const char* cpu_gemm_name();

// Computes C = alpha * A * B^T + beta * C with A (m, k), B (n, k), C (m, n), all row-major with leading dimensions in
// elements. With beta == 0, C is not read. k == 0 scales C by beta.
void gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
             float beta, float* c, int64_t ldc);

// Computes C = alpha * A * B + beta * C with A (m, k), B (k, n), C (m, n).
void gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
             float beta, float* c, int64_t ldc);

// Computes C = alpha * A^T * B + beta * C with A (k, m), B (k, n), C (m, n).
void gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda, const float* b, int64_t ldb,
             float beta, float* c, int64_t ldc);

// The same three with bfloat16 A and B (as bit patterns) and a float32 C, on AMX tiles through MKL. They may be called
// only if cpu_gemm_has_bf16().
bool cpu_gemm_has_bf16();
void gemm_nt_bf16(int64_t m, int64_t n, int64_t k, float alpha, const uint16_t* a, int64_t lda, const uint16_t* b,
                  int64_t ldb, float beta, float* c, int64_t ldc);
void gemm_nn_bf16(int64_t m, int64_t n, int64_t k, float alpha, const uint16_t* a, int64_t lda, const uint16_t* b,
                  int64_t ldb, float beta, float* c, int64_t ldc);
void gemm_tn_bf16(int64_t m, int64_t n, int64_t k, float alpha, const uint16_t* a, int64_t lda, const uint16_t* b,
                  int64_t ldb, float beta, float* c, int64_t ldc);

// Portable kernel: C = alpha * A * B + beta * C. Element (m, k) of A is a[m * a_row + k * a_column], element (k, n) of
// B is b[k * b_row + n * b_column].
void portable_gemm(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t a_row, int64_t a_column,
                   const float* b, int64_t b_row, int64_t b_column, float beta, float* c, int64_t ldc);

// Size of portable_gemm_with_workspace's workspace in floats.
constexpr int64_t kPortableGemmWorkspace = (96 + 384) * 256;

}  // namespace scan_fast

SCAN_FAST_DECLARE_PER_ISA(void portable_gemm_with_workspace(int64_t m, int64_t n, int64_t k, float alpha,
                                                            const float* a, int64_t a_row, int64_t a_column,
                                                            const float* b, int64_t b_row, int64_t b_column, float beta,
                                                            float* c, int64_t ldc, float* workspace))
