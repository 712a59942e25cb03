// Portable matrix product, compiled once per instruction set.
//
// Blocking is threefold: a (kDepth x kColumns) block of B is packed into panels of kPanel columns, a (kRows x
// kDepth) block of A into panels of kTall rows, and a kTall x kPanel accumulator stays in registers over the whole
// depth. The packed copies are padded with zeros at the edges; the padding is left out when C is updated.
#include "common/cpu_gemm.h"

namespace scan_fast::SCAN_FAST_ISA {
namespace {

#if defined(SCAN_FAST_ISA_avx512)
constexpr int kLanes = 16, kTall = 12, kVectors = 2;  // 24 of 32 registers accumulate
#elif defined(SCAN_FAST_ISA_avx2)
constexpr int kLanes = 8, kTall = 6, kVectors = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTall = 6, kVectors = 3;  // 18 of 32 (NEON); with 24 the compiler spills
#else
constexpr int kLanes = 4, kTall = 4, kVectors = 2;  // 8 of 16 (SSE)
#endif
constexpr int kPanel = kLanes * kVectors;
constexpr int64_t kRows = 96, kColumns = 384, kDepth = 256;
static_assert(kRows % kTall == 0 && kColumns % kPanel == 0);
static_assert((kRows + kColumns) * kDepth == kPortableGemmWorkspace);

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// Packs `count` <= width lines into panel[depth][width]; element (line, k) is source[line * line_step + k *
// depth_step].
void pack_panel(const float* source, int64_t line_step, int64_t depth_step, int64_t count, int64_t depth, int width,
                float* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = source + k * depth_step;
    float* to = panel + k * width;
    for (int64_t line = 0; line < count; ++line) to[line] = from[line * line_step];
    for (int64_t line = count; line < width; ++line) to[line] = 0.0f;
  }
}

void multiply_panels(int64_t depth, const float* a_panel, const float* b_panel, float alpha, float beta, float* c,
                     int64_t ldc, int64_t rows, int64_t columns) {
  Vector sum[kTall][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = *reinterpret_cast<const Vector*>(b_panel + k * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTall; ++r) {
      const float a = a_panel[k * kTall + r];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a * b[v];
    }
  }
  if (rows == kTall && columns == kPanel) {
#pragma GCC unroll 16
    for (int r = 0; r < kTall; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Vector* out = reinterpret_cast<Vector*>(c + r * ldc + v * kLanes);
        *out = beta == 0.0f ? alpha * sum[r][v] : alpha * sum[r][v] + beta * *out;
      }
    }
    return;
  }
  float edge[kTall * kPanel];
#pragma GCC unroll 16
  for (int r = 0; r < kTall; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(edge + r * kPanel + v * kLanes) = sum[r][v];
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t column = 0; column < columns; ++column) {
      float& out = c[r * ldc + column];
      out = beta == 0.0f ? alpha * edge[r * kPanel + column] : alpha * edge[r * kPanel + column] + beta * out;
    }
  }
}

}  // namespace

void portable_gemm_with_workspace(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t a_row,
                                  int64_t a_column, const float* b, int64_t b_row, int64_t b_column, float beta,
                                  float* c, int64_t ldc, float* workspace) {
  float* a_packed = workspace;
  float* b_packed = workspace + kRows * kDepth;
  // k == 0 still makes one pass, over an empty depth, that scales C.
  for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kDepth) {
    const int64_t depth = smaller(kDepth, k - k0);
    const float scale = k0 == 0 ? beta : 1.0f;
    for (int64_t n0 = 0; n0 < n; n0 += kColumns) {
      const int64_t columns = smaller(kColumns, n - n0);
      for (int64_t j = 0; j < columns; j += kPanel) {
        pack_panel(b + k0 * b_row + (n0 + j) * b_column, b_column, b_row, smaller(kPanel, columns - j), depth, kPanel,
                   b_packed + j * depth);
      }
      for (int64_t m0 = 0; m0 < m; m0 += kRows) {
        const int64_t rows = smaller(kRows, m - m0);
        for (int64_t i = 0; i < rows; i += kTall) {
          pack_panel(a + (m0 + i) * a_row + k0 * a_column, a_row, a_column, smaller(kTall, rows - i), depth, kTall,
                     a_packed + i * depth);
        }
        for (int64_t j = 0; j < columns; j += kPanel) {
          for (int64_t i = 0; i < rows; i += kTall) {
            multiply_panels(depth, a_packed + i * depth, b_packed + j * depth, alpha, scale,
                            c + (m0 + i) * ldc + n0 + j, ldc, smaller(kTall, rows - i), smaller(kPanel, columns - j));
          }
        }
      }
    }
  }
}

}  // namespace scan_fast::SCAN_FAST_ISA
