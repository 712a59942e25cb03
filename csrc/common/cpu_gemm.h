// Single-threaded matrix products of MKL, called by the tasks of common/parallel.h.
//
// They use the MKL in PyTorch (libtorch_cpu exports the symbols, so no dependency is added), limited to the calling
// thread. On processors other than Intel's, and without MKL, kernels multiply in register tiles (register_tiles.h): those
// read operands that are packed once per call, while MKL packs its operands in every product.
#pragma once

#include <cstdint>

namespace scan_fast {

// Returns whether float32 kernels should multiply with the functions below: on Intel's processors, if PyTorch has MKL.
// They may be called only then, or if SCAN_FAST_CPU_GEMM=mkl. SCAN_FAST_CPU_GEMM=tiles forbids MKL.
bool cpu_gemm_is_used();

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

}  // namespace scan_fast
