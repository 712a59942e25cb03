// GPU kernels of NT-Xent: parameters and operands that all architectures share.
//
// Operands are unit rows times 2^8 in float16; the factor keeps them away from subnormals. Float32 inputs are split
// into hi + lo (22 bits), and a product is hi*hi + hi*lo + lo*hi, three matrix instructions. `reduced` uses hi alone.
// The portable layout is (parts, 2N, padded): hi of all rows, then lo of all rows, padded with zeros to a multiple of 8
// dimensions.
//
// Rows, tiles and slots are counted in 32 bits (make_params refuses more than 2^30 rows); addresses are 64-bit.
#pragma once

#include "common/row_groups.cuh"
#include "nt_xent/nt_xent.h"

namespace scan_fast {
namespace {

constexpr float kOperandScale = 256.0f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinNorm = 1e-12f;
constexpr int kRowThreads = 128;  // kernels with one warp per row or sample

// Parameters of the kernels, passed by value.
struct Params {
  int samples, sample_begin, sample_count;
  int local_rows;   // rows of this launch: views * sample_count
  int dim, padded;  // D, and D rounded up to a multiple of 8: the row length of the packed operands
  int anchors;      // 2N or N: rows with an upstream gradient
  int splits;       // backward: column splits, each with its own partial result
  float temperature;
  float scale;  // converts a product of operands to log2(exp(s))
  bool fixed_shift;

  __host__ __device__ int rows() const { return 2 * samples; }
  __device__ int global_row(int local) const {
    return local < sample_count ? sample_begin + local : samples + sample_begin + local - sample_count;
  }
  __device__ int positive(int row) const { return row < samples ? row + samples : row - samples; }
};

struct Upstream : NTXentUpstream {
  __device__ __forceinline__ float at(int anchor) const { return gradient[anchor * stride]; }
};

template <typename X, typename Y>
__host__ __device__ constexpr auto ceil_div(X x, Y y) {
  return (x + y - 1) / y;
}

__device__ __forceinline__ int warp_index() {
  return static_cast<int>(blockIdx.x) * (kRowThreads / 32) + static_cast<int>(threadIdx.x) / 32;
}

// Four values as operands: hi, and lo = what hi lacks.
struct PackedFour {
  uint2 hi, lo;
  __device__ __forceinline__ explicit PackedFour(const float (&unit)[4]) {
    float x[4], rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = unit[i] * kOperandScale;
      rest[i] = x[i] - to_float(from_float<half_t>(x[i]));
    }
    hi = make_uint2(pack2<half_t>(x[0], x[1]), pack2<half_t>(x[2], x[3]));
    lo = make_uint2(pack2<half_t>(rest[0], rest[1]), pack2<half_t>(rest[2], rest[3]));
  }
};

// Waits for the previous kernel of the stream if this one was launched with launch_next (cuda_plan.cuh), and allows the
// next one to start as soon as every block of this one has come here. Kernels call it before they access global memory.
// It waits before it allows, so at most two kernels overlap, and what a kernel reads was written by kernels that have
// finished. Without launch_next both instructions do nothing.
__device__ __forceinline__ void follow_previous_kernel() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

// Columns of a tile that are masked for a row: the row itself, its positive, and all from `end` on. Rows and columns are
// numbered so that first views (below `count`) come first, and the positive of one is `offset` behind it. Stored as
// offsets from one column, so that the test of an element compares with constants.
struct Excluded {
  int self, positive, end;

  __device__ __forceinline__ Excluded(int row, int count, int offset, int from, int end_)
      : self(row - from),
        positive((row < count            ? row + offset
                  : row - offset < count ? row - offset
                                         : -1) -
                 from),
        end(end_ - from) {}
  __device__ __forceinline__ bool holds(int column) const {
    return (column == self) | (column == positive) | (column >= end);  // no branches
  }
};

// The exponential of a thread's element number `element`, a constant of unrolled code. Every kEvery-th one is computed by
// the polynomial; kEvery = 0 means none. One in four suits a kernel that is limited by exponentials. In cycles of a
// multiprocessor for 8,192 elements, at 16 exponentials and four warp instructions per cycle, if an element takes one
// FFMA, one exponential and two sums (the polynomial's last product is fused with these), so four instructions, or 13:
//   share   exponentials   instructions
//   none        512             256
//   1/8         448             328
//   1/4         384             400
//   1/3         341             448
// A prediction from these counts, not a measurement.
template <int kEvery>
__device__ __forceinline__ float exp2_element(float x, int element) {
  if constexpr (kEvery > 0) {
    if (element % kEvery == kEvery - 1) return exp2_polynomial(x);
  }
  return exp2_approx(x);
}

// ---- rows in registers ----------------------------------------------------------------------------------------------

// A warp holds a part of a row, 128 kVectors elements: vector v of a lane has the elements 128 v + 4 lane .. + 3.
template <int kVectors>
using RowPart = float[kVectors][4];

// Calls body(v, k) for the vectors of a part that begins at element `from`; k is the vector's first element.
template <int kVectors, typename Body>
__device__ __forceinline__ void for_vectors(int from, Body body) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) body(v, from + 128 * v + 4 * (static_cast<int>(threadIdx.x) % 32));
}

// A kernel handles rows in parts of one vector per lane, which suffice at 128 dimensions, or of kWideVectors. Rows of
// more than 512 elements take several parts. `aligned`: whole vectors can be accessed, i.e. aligned_rows() holds for
// every array; the kernel with one vector requires it.
constexpr int kWideVectors = 4;

// Host side: calls body.operator()<kVectors>() for rows of `width` elements.
template <typename Body>
void with_vectors(int width, bool aligned, Body body) {
  width <= 128 && aligned ? body.template operator()<1>() : body.template operator()<kWideVectors>();
}

// Blocks per multiprocessor, which bounds the registers: 64 or 128 per thread.
template <int kVectors>
constexpr int kRowBlocks = kVectors == 1 ? 8 : 4;

// Calls body.operator()<kAligned>().
template <int kVectors, typename Body>
__device__ __forceinline__ void with_alignment(bool aligned, Body body) {
  if (kVectors == 1 || aligned) {
    body.template operator()<true>();
  } else {
    body.template operator()<false>();
  }
}

// Loads a part of a row of `dim` elements, with zeros behind its end.
template <int kVectors, bool kAligned, typename T>
__device__ __forceinline__ void load_part(RowPart<kVectors>& x, const T* __restrict__ row, int from, int dim) {
  for_vectors<kVectors>(from, [&](int v, int k) {
    if constexpr (kAligned) {
      x[v][0] = x[v][1] = x[v][2] = x[v][3] = 0;
      if (k < dim) load4(row + k, x[v]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[v][i] = k + i < dim ? to_float(row[k + i]) : 0.0f;
    }
  });
}

template <int kVectors, bool kAligned, typename T>
__device__ __forceinline__ void store_part(T* __restrict__ row, const RowPart<kVectors>& x, int from, int dim) {
  for_vectors<kVectors>(from, [&](int v, int k) {
    if constexpr (kAligned) {
      if (k < dim) store4(row + k, x[v]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (k + i < dim) row[k + i] = from_float<T>(x[v][i]);
      }
    }
  });
}

// Calls body(v, i) for every value x[v][i] of a part.
template <int kVectors, typename Body>
__device__ __forceinline__ void for_values(Body body) {
#pragma unroll
  for (int i = 0; i < 4 * kVectors; ++i) body(i / 4, i % 4);
}

template <int kVectors>
__device__ __forceinline__ float dot(const RowPart<kVectors>& x, const RowPart<kVectors>& y) {
  float sum = 0;
  for_values<kVectors>([&](int v, int i) { sum += x[v][i] * y[v][i]; });
  return sum;
}

}  // namespace
}  // namespace scan_fast
