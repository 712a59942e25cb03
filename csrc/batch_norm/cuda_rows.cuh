// Assignment of rows and channels to blocks and threads, for the batch normalisation kernels (batch_norm_cuda.cu).
//
// A thread processes one vector of eight channels. The threads of a block form a grid of thread_rows x thread_columns:
// the columns are the vectors of up to 128 channels (256 bytes in 16 bits), the rows are adjacent rows of x. Each
// thread advances by thread_rows through the block's rows.
#pragma once

#include "batch_norm/batch_norm.h"
#include "common/device.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kVector = 8;             // channels per thread
constexpr int kMaxThreadColumns = 16;  // vectors per block
constexpr int kFinishChannels = 8;     // channels per block in the kernels that combine partial sums

// Assignment of work. Depends only on the shape and the GPU.
struct Layout {
  int64_t rows, channels;
  int64_t rows_per_block;
  int vectors;         // per row
  int thread_columns;  // vectors per block
  int thread_rows;     // rows that a block reads at once
  int blocks;          // along the rows
  int tiles;           // along the channels
};

Layout layout_of(const BatchNormShape& shape) {
  auto split = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  Layout l{};
  l.rows = shape.rows;
  l.channels = shape.channels;
  l.vectors = static_cast<int>(split(shape.channels, kVector));
  l.tiles = static_cast<int>(split(l.vectors, kMaxThreadColumns));
  l.thread_columns = static_cast<int>(split(l.vectors, l.tiles));
  l.thread_rows = kThreads / l.thread_columns;
  int64_t blocks = static_cast<int64_t>(multiprocessors()) * kBlocksPerMultiprocessor / l.tiles;
  const int64_t most = split(shape.rows, l.thread_rows);
  blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
  l.rows_per_block = split(shape.rows, blocks);
  l.blocks = static_cast<int>(split(shape.rows, l.rows_per_block));
  return l;
}

// ---- the eight channels of a thread ---------------------------------------------------------------------------------

// Maps index i of a thread's vector to a channel. If the number of channels is a multiple of 8: in 16 bits, eight
// adjacent channels; in float32, four channels and four more half a row later. So with kAligned (all addresses are
// multiples of 16 bytes) adjacent threads read adjacent 16 bytes. Otherwise: every `vectors`-th channel. kAligned must
// not change the mapping: bit i of a byte of the mask is channel of(i), and the passes that write and read the mask see
// other addresses.
template <typename T, bool kAligned>
struct Channels {
  int64_t channels;
  int vectors, vector;
  int first, next, jump;  // without kAligned: the first channel, the step to the next, the step between fours

  __device__ __forceinline__ Channels(int64_t channels_, int vectors_, int vector_)
      : channels(channels_), vectors(vectors_), vector(vector_) {
    const bool adjacent = channels % kVector == 0, halves = sizeof(T) == 4;
    first = !adjacent ? vector : halves ? 4 * vector : kVector * vector;
    next = adjacent ? 1 : vectors;
    jump = !adjacent ? 4 * vectors : halves ? static_cast<int>(channels / 2) : 4;
  }
  __device__ __forceinline__ int64_t of(int i) const {
    if constexpr (!kAligned) return first + i / 4 * jump + i % 4 * next;
    if constexpr (sizeof(T) == 4) return (i < 4 ? 0 : channels / 2) + 4 * static_cast<int64_t>(vector) + i % 4;
    return kVector * static_cast<int64_t>(vector) + i;
  }
  __device__ __forceinline__ bool has(int i) const { return kAligned || of(i) < channels; }

  // Reads one float32 value per channel.
  __device__ __forceinline__ void read(const float* p, float (&v)[kVector]) const {
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const float4 four = ld_global<float4>(p + of(i));
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = has(i) ? p[of(i)] : 0.0f;
    }
  }
  __device__ __forceinline__ void write(float* p, const float* v) const {
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) st_global(p + of(i), make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (has(i)) p[of(i)] = v[i];
      }
    }
  }
};

// Part of a row in its storage dtype, unpacked when it is used: in 16 bits this needs half the registers.
template <typename T, bool kAligned>
struct Packed {
  uint4 part[sizeof(T) / 2];
  __device__ __forceinline__ void load(const T* row, const Channels<T, true>& at) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) part[i] = ld_global<uint4>(row + at.of(4 * i));
  }
  __device__ __forceinline__ void unpack(float (&v)[kVector]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        v[4 * i] = __uint_as_float(part[i].x), v[4 * i + 1] = __uint_as_float(part[i].y);
        v[4 * i + 2] = __uint_as_float(part[i].z), v[4 * i + 3] = __uint_as_float(part[i].w);
      }
    } else {
      const uint32_t words[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = unpack2<T>(words[i]);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
      }
    }
  }
};

template <typename T>
struct Packed<T, false> {
  T element[kVector];
  __device__ __forceinline__ void load(const T* row, const Channels<T, false>& at) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) element[i] = at.has(i) ? row[at.of(i)] : from_float<T>(0.0f);
  }
  __device__ __forceinline__ void unpack(float (&v)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(element[i]);
  }
};

template <typename T, bool kAligned>
__device__ __forceinline__ void store(T* row, const Channels<T, kAligned>& at, const float (&v)[kVector]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (at.has(i)) row[at.of(i)] = from_float<T>(v[i]);
    }
  } else if constexpr (sizeof(T) == 4) {
    at.write(row, v);
  } else {
    st_global(row + at.of(0),
              make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7])));
  }
}

// ---- the rows of a thread -------------------------------------------------------------------------------------------

// kResident: blocks that share a multiprocessor. kAtOnce: rows that a thread reads at once, at most kMost. Unaligned
// vectors need more registers than three resident blocks leave.
template <bool kAligned>
constexpr int kResident = kAligned ? kBlocksPerMultiprocessor : 1;
template <typename T, bool kAligned, int kMax>
constexpr int kAtOnce = !kAligned        ? 1
                        : sizeof(T) == 4 ? kMax / 2
                                         : kMax;

struct Thread {
  int thread_row, thread_column, vector;
  int count;      // number of rows
  int64_t first;  // first row

  __device__ __forceinline__ explicit Thread(const Layout& l)
      : thread_row(static_cast<int>(threadIdx.x) / l.thread_columns),
        thread_column(static_cast<int>(threadIdx.x) % l.thread_columns),
        vector(static_cast<int>(blockIdx.y) * l.thread_columns + thread_column),
        count(0),
        first(static_cast<int64_t>(blockIdx.x) * l.rows_per_block + thread_row) {
    int64_t end = (static_cast<int64_t>(blockIdx.x) + 1) * l.rows_per_block;
    if (end > l.rows) end = l.rows;
    // The last threads of a block may have no row, and the last tile may have fewer columns.
    if (thread_row < l.thread_rows && vector < l.vectors && first < end) {
      count = static_cast<int>((end - first - 1) / l.thread_rows) + 1;
    }
  }
};

// Calls body.template operator()<n>(first of n rows, `stride` apart) for all rows of the thread, in descending order
// with kBackwards.
template <int kRows, bool kBackwards, typename Body>
__device__ __forceinline__ void for_rows(const Thread& me, int stride, Body body) {
  auto row = [&](int k) { return me.first + static_cast<int64_t>(k) * stride; };
  if constexpr (kBackwards) {
    int k = me.count;
    for (; k >= kRows; k -= kRows) body.template operator()<kRows>(row(k - kRows));
    if constexpr (kRows > 1) {
      for (; k > 0; --k) body.template operator()<1>(row(k - 1));
    }
  } else {
    int k = 0;
    for (; k + kRows <= me.count; k += kRows) body.template operator()<kRows>(row(k));
    if constexpr (kRows > 1) {
      for (; k < me.count; ++k) body.template operator()<1>(row(k));
    }
  }
}

// Merges the values of all thread rows of a column pairwise into thread row 0. All threads of the block must call it.
// scratch: kValues * kThreads / 2 elements.
template <int kValues, typename Merge>
__device__ __forceinline__ void merge_thread_rows(float (&v)[kValues], const Layout& l, const Thread& me,
                                                  const Shared<float>& scratch, Merge merge) {
  for (int count = l.thread_rows; count > 1;) {
    const int half = (count + 1) / 2;
    if (me.thread_row >= half && me.thread_row < count) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        scratch[i * (kThreads / 2) + (me.thread_row - half) * l.thread_columns + me.thread_column] = v[i];
      }
    }
    __syncthreads();
    if (me.thread_row + half < count) {
      float other[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        other[i] = scratch[i * (kThreads / 2) + me.thread_row * l.thread_columns + me.thread_column];
      }
      merge(v, other);
    }
    __syncthreads();
    count = half;
  }
}

// ---- channels -------------------------------------------------------------------------------------------------------

// Adds v over the threads of one channel, threadIdx.x % kFinishChannels. The first of them receives the sum.
__device__ __forceinline__ void add_slices(double (&v)[2], const Shared<double>& scratch) {
  constexpr int kWarps = kThreads / 32;
#pragma unroll
  for (int offset = kFinishChannels; offset < 32; offset *= 2) {
    for (double& value : v) value += __shfl_xor_sync(kFullMask, value, offset);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < kFinishChannels) {
    for (int k = 0; k < 2; ++k) scratch[(k * kWarps + warp) * kFinishChannels + lane] = v[k];
  }
  __syncthreads();
  if (warp == 0 && lane < kFinishChannels) {
    for (int k = 0; k < 2; ++k) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) {
        const double next = scratch[(k * kWarps + w) * kFinishChannels + lane];
        sum += next;
      }
      v[k] = sum;
    }
  }
}

// Returns the value before the residual and the ReLU. Both passes use it, so that they agree on the sign.
__device__ __forceinline__ float normalised(float x, float mean, float scale, float bias) {
  return fmaf(x - mean, scale, bias);
}

}  // namespace
}  // namespace scan_fast
