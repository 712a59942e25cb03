// NT-Xent on the GPU: what every kernel of the family knows, whichever architecture it is written for.
//
// Operands. Unit rows times 2^8 in float16, which keeps them away from its subnormals. Float32 inputs are split into
// hi + lo (22 bits) and a product is hi*hi + hi*lo + lo*hi, three matrix instructions; `reduced` uses hi alone. They lie
// as (parts, 2N, padded), all rows' hi before all rows' lo, padded with zeros to a multiple of 8.
#pragma once

#include "common/device.h"
#include "nt_xent/nt_xent.h"

namespace scan_fast {
namespace {

constexpr float kOperandScale = 256.0f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinNorm = 1e-12f;
constexpr int kRowThreads = 128;  // kernels with one warp per row or sample

// What the kernels need to know, by value.
struct Params {
  int64_t samples, sample_begin, sample_count;
  int64_t local_rows;   // rows that this launch handles: views * sample_count
  int64_t dim, padded;  // D, and D rounded up to a multiple of 8: the row length of the packed operands
  int64_t anchors;      // 2N or N: rows with a weight
  int64_t splits;       // backward: parts of the columns, each with a partial result of its own
  float temperature;
  float scale;  // from a product of operands to log2(exp(s))
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
