// GPU kernels of NT-Xent: parameters and operands that all architectures share.
//
// Operands are unit rows times 2^8 in float16; the factor keeps them away from subnormals. Float32 inputs are split
// into hi + lo (22 bits), and a product is hi*hi + hi*lo + lo*hi, three matrix instructions. `reduced` uses hi alone.
// The portable layout is (parts, 2N, padded): hi of all rows, then lo of all rows, padded with zeros to a multiple of 8
// dimensions.
#pragma once

#include "common/device.h"
#include "nt_xent/nt_xent.h"

namespace scan_fast {
namespace {

constexpr float kOperandScale = 256.0f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinNorm = 1e-12f;
constexpr int kRowThreads = 128;  // kernels with one warp per row or sample

// Parameters of the kernels, passed by value.
struct Params {
  int64_t samples, sample_begin, sample_count;
  int64_t local_rows;   // rows of this launch: views * sample_count
  int64_t dim, padded;  // D, and D rounded up to a multiple of 8: the row length of the packed operands
  int64_t anchors;      // 2N or N: rows with an upstream gradient
  int64_t splits;       // backward: column splits, each with its own partial result
  float temperature;
  float scale;  // converts a product of operands to log2(exp(s))
  bool fixed_shift;

  __host__ __device__ int64_t rows() const { return 2 * samples; }
  __device__ int64_t global_row(int64_t local) const {
    return local < sample_count ? sample_begin + local : samples + sample_begin + local - sample_count;
  }
  __device__ int64_t positive(int64_t row) const { return row < samples ? row + samples : row - samples; }
};

struct Upstream : NTXentUpstream {
  __device__ __forceinline__ float at(int64_t anchor) const { return gradient[anchor * stride]; }
};

__device__ inline int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + static_cast<int>(threadIdx.x) / 32;
}

}  // namespace
}  // namespace scan_fast
