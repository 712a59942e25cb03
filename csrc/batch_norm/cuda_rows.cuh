// How the kernels of batch normalisation (batch_norm_cuda.cu) spread rows of channels over blocks and threads.
//
// A thread owns eight channels, a vector, of every `lanes`-th row of its block's rows. The threads of a block that stand
// side by side are the vectors of up to 128 channels (256 bytes in 16 bits), the columns; the others are further rows,
// the lanes.
#pragma once

#include "batch_norm/batch_norm.h"
#include "common/device.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kVector = 8;        // channels of a thread
constexpr int kMostColumns = 16;  // vectors of a block
constexpr int kFinishChannels = 8;  // of a block that adds up what the others found

// Who does what. It depends on the shape and the GPU alone.
struct Layout {
  int64_t rows, channels;
  int64_t rows_per_block;
  int vectors;  // of a row
  int columns;  // vectors of a block
  int lanes;    // rows that a block reads at once
  int blocks;   // along the rows
  int tiles;    // along the channels
};

Layout layout_of(const BatchNormShape& shape) {
  auto split = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  Layout l{};
  l.rows = shape.rows;
  l.channels = shape.channels;
  l.vectors = static_cast<int>(split(shape.channels, kVector));
  l.tiles = static_cast<int>(split(l.vectors, kMostColumns));
  l.columns = static_cast<int>(split(l.vectors, l.tiles));
  l.lanes = kThreads / l.columns;
  int64_t blocks = static_cast<int64_t>(multiprocessors()) * kBlocksPerMultiprocessor / l.tiles;
  const int64_t most = split(shape.rows, l.lanes);
  blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
  l.rows_per_block = split(shape.rows, blocks);
  l.blocks = static_cast<int>(split(shape.rows, l.rows_per_block));
  return l;
}

// ---- the eight channels of a thread ---------------------------------------------------------------------------------

// Where channels are a multiple of 8: in 16 bits eight adjacent channels, in float32 four and four half a row later, so
// that with kAligned (and all addresses of 16 bytes) neighbours read adjacent 16 bytes. Otherwise every `vectors`-th
// channel. kAligned has no say in it: bit i of a byte of the mask is channel of(i), and the passes that write and read
// the mask see other addresses.
template <typename T, bool kAligned>
struct Channels {
  int64_t channels;
  int vectors, vector;
  int first, next, jump;  // without kAligned: channel 0, from one to the next, from the first four to the others

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

  // One float32 number per channel.
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

// A thread's part of a row as it lies in memory, until it is needed: in 16 bits half the registers.
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
    st_global(row + at.of(0), make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]),
                                         pack2<T>(v[6], v[7])));
  }
}

// ---- the rows of a thread -------------------------------------------------------------------------------------------

// How many blocks share a multiprocessor, and how many rows a thread reads at once, of the most that a kernel takes.
// Unaligned vectors need more registers than that leaves.
template <bool kAligned>
constexpr int kResident = kAligned ? kBlocksPerMultiprocessor : 1;
template <typename T, bool kAligned, int kMost>
constexpr int kAtOnce = !kAligned ? 1 : sizeof(T) == 4 ? kMost / 2 : kMost;

struct Thread {
  int lane, column, vector;
  int count;      // rows
  int64_t first;  // row

  __device__ __forceinline__ explicit Thread(const Layout& l)
      : lane(static_cast<int>(threadIdx.x) / l.columns),
        column(static_cast<int>(threadIdx.x) % l.columns),
        vector(static_cast<int>(blockIdx.y) * l.columns + column),
        count(0),
        first(static_cast<int64_t>(blockIdx.x) * l.rows_per_block + lane) {
    int64_t end = (static_cast<int64_t>(blockIdx.x) + 1) * l.rows_per_block;
    if (end > l.rows) end = l.rows;
    // The last threads of a block may be left over, and so may columns of the last tile.
    if (lane < l.lanes && vector < l.vectors && first < end) count = static_cast<int>((end - first - 1) / l.lanes) + 1;
  }
};

// Calls body.template operator()<n>(first of n rows, `lanes` apart) until all rows of the thread are done: upwards, or
// with kBackwards downwards.
template <int kRows, bool kBackwards, typename Body>
__device__ __forceinline__ void for_rows(const Thread& me, int lanes, Body body) {
  auto row = [&](int k) { return me.first + static_cast<int64_t>(k) * lanes; };
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

// Merges the values of all lanes of a column into those of lane 0, pairwise. Every thread of the block takes part.
// scratch: kValues * kThreads / 2 elements.
template <int kValues, typename Merge>
__device__ __forceinline__ void merge_lanes(float (&v)[kValues], const Layout& l, const Thread& me,
                                            const Shared<float>& scratch, Merge merge) {
  for (int count = l.lanes; count > 1;) {
    const int half = (count + 1) / 2;
    if (me.lane >= half && me.lane < count) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) scratch[i * (kThreads / 2) + (me.lane - half) * l.columns + me.column] = v[i];
    }
    __syncthreads();
    if (me.lane + half < count) {
      float other[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) other[i] = scratch[i * (kThreads / 2) + me.lane * l.columns + me.column];
      merge(v, other);
    }
    __syncthreads();
    count = half;
  }
}

// ---- channels ---------------------------------------------------------------------------------------------------------

// Adds v over the threads that share a channel, which is threadIdx.x % kFinishChannels; complete in the first of them.
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

// The value before the ReLU, but for the residual. Both passes use this, so that they agree on its sign.
__device__ __forceinline__ float normalised(float x, float mean, float scale, float bias) {
  return fmaf(x - mean, scale, bias);
}

}  // namespace
}  // namespace scan_fast
