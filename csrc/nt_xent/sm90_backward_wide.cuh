// Backward kernels of NT-Xent for sm_90a, if dZ has too many dimensions for registers: more than 256, or more than 128
// split. For some rows at a time, W is stored, and a second kernel multiplies it with Z. Both are epilogues of
// common/tile_products.cuh.
//   transpose_kernel            Z transposed: its rows are dimensions, its dimensions are positions
//   store_weights_sm90_kernel   128 x 128 tiles of similarities -> W, as a packed operand (rows x positions)
//   gather_sm90_kernel          dZ = W Z = W (Z^T)^T: 128 rows x 256 dimensions per tile, summed over the positions
//
// Column splits. W and Z^T of a split are packed on their own, one split after the other, so a split is a tile like any
// other: row tile r of split s is tile s * (row tiles) + r. All splits have the same number of positions.
#pragma once

#include "common/tile_products.cuh"
#include "nt_xent/sm90_packing.cuh"

namespace scan_fast {
namespace {

// W of the rows [begin, begin + rows) of a call: (splits, row tiles) packed tiles of hi and lo.
struct StoredWeights {
  int begin, rows, column_tiles, splits;

  __host__ __device__ int row_tiles() const { return ceil_div(rows, kPanelRows); }
  __host__ __device__ int split_tiles() const { return column_tiles / splits; }
  __host__ __device__ int split_panels() const { return split_tiles() * (kPanelRows / kPanelDims); }
  __host__ __device__ int64_t elements() const { return int64_t{row_tiles()} * kPanelRows * column_tiles * kPanelRows; }
};

// Transposes 64 positions x 64 dimensions per block. Grid: 64 positions each, panels, hi and lo. `slices` of 256
// dimensions, of which the last may be filled in part: what is behind the last panel stays unwritten, and only reaches
// columns of dZ that nobody reads.
constexpr int kTransposeThreads = 128, kTransposeStride = kPanelDims + 8;
template <typename T>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_kernel(const T* __restrict__ packed, T* __restrict__ transposed, int split_panels, int slices) {
  follow_previous_kernel();
  SCAN_FAST_SHARED(T, tile, kPanelDims * kTransposeStride);
  const int from = static_cast<int>(blockIdx.x) * kPanelDims, panel = static_cast<int>(blockIdx.y);
  const int panels = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.z);
  const int parts = static_cast<int>(gridDim.z), thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kPanelDims * 8 / kTransposeThreads; ++i) {
    const int row = (thread + i * kTransposeThreads) / 8, vector = thread % 8;
    const int64_t at = panel_at(from + row, (part * panels + panel) * kPanelDims + 8 * vector, parts * panels);
    st_shared(tile + (row * kTransposeStride + 8 * vector), ld_global<uint4>(packed + at));
  }
  __syncthreads();
  const int split = from / kPanelDims / split_panels, panel_of_split = from / kPanelDims % split_panels;
#pragma unroll
  for (int i = 0; i < kPanelDims * 8 / kTransposeThreads; ++i) {
    const int dim = thread % kPanelDims, vector = thread / kPanelDims + i * (kTransposeThreads / kPanelDims);
    uint32_t pairs[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const T x = tile[(8 * vector + 2 * q) * kTransposeStride + dim];
      const T y = tile[(8 * vector + 2 * q + 1) * kTransposeStride + dim];
      pairs[q] = pack2<T>(to_float(x), to_float(y));
    }
    const int row = split * slices * 4 * kPanelDims + panel * kPanelDims + dim;
    const int k = (part * split_panels + panel_of_split) * kPanelDims + 8 * vector;
    st_global(transposed + panel_at(row, k, parts * split_panels), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
}

// Equal runs of the tiles of `rows` x `columns` tiles, row by row. Row tile r is tile first + r of its operand.
struct GridRuns {
  struct Run {
    int fixed, begin, end;
  };
  int first, columns, at, last;

  __device__ __forceinline__ GridRuns(int first_, int rows, int columns_) : first(first_), columns(columns_) {
    const int64_t total = int64_t{rows} * columns;
    at = static_cast<int>(total * blockIdx.x / gridDim.x);
    last = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
  }
  __device__ __forceinline__ bool next(Run& run) {
    if (at >= last) return false;
    const int row = at / columns;
    run.fixed = first + row;
    run.begin = at - row * columns;
    run.end = min(columns, run.begin + last - at);
    at += run.end - run.begin;
    return true;
  }
};

template <bool kSplit>
struct WeightsEpilogue {
  const float* __restrict__ weight;
  half_t* __restrict__ weights;
  const StoredWeights& stored;
  float scale, limit;
  int count;
  float row_weight[2];

  __device__ __forceinline__ void begin(const GridRuns::Run& run) {
#pragma unroll
    for (int h = 0; h < 2; ++h) row_weight[h] = weight[run.fixed * kPanelRows + tile_row(2 * h)];
  }
  __device__ __forceinline__ void tile(float (&s)[kPanelRows / 2], const GridRuns::Run& run, int column_tile) {
    const int first_row = run.fixed * kPanelRows, first_column = column_tile * kPanelRows;
    exclude_handled_pairs<kPanelRows>(s, first_row, first_column, count);
    const int split = column_tile / stored.split_tiles(), panels = stored.split_panels();
    const int panel = (column_tile - split * stored.split_tiles()) * (kPanelRows / kPanelDims);
    const int row_tile = split * stored.row_tiles() + run.fixed - stored.begin / kPanelRows;
    half_t* const to = weights + (int64_t{row_tile} * (kSplit ? 2 : 1) * panels + panel) * kPanelElements;
#pragma unroll
    for (int t = 0; t < kPanelRows / 8; ++t) {
      const float2 of_column = ld_global<float2>(weight + first_column + accumulator_column(4 * t));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = exp2_approx(s[4 * t + 2 * h] * scale - limit) * (row_weight[h] + of_column.x);
        const float y = exp2_approx(s[4 * t + 2 * h + 1] * scale - limit) * (row_weight[h] + of_column.y);
        const int row = tile_row(2 * h);
        half_t* const at =
            to + t / 8 * kPanelElements + row * kPanelDims + ((t % 8) ^ (row % 8)) * 8 + accumulator_column(0);
        const uint32_t hi = pack2<half_t>(x, y);
        st_global(at, hi);
        if constexpr (kSplit) {
          const float2 high = unpack2<half_t>(hi);
          st_global(at + int64_t{panels} * kPanelElements, pack2<half_t>(x - high.x, y - high.y));
        }
      }
    }
  }
  __device__ __forceinline__ void end(const GridRuns::Run&) {}
};

// weight: by position. The handled rows are the positions [0, 2 count).
template <typename P>
__global__ void __launch_bounds__(kProductThreads, 1)
    store_weights_sm90_kernel(const half_t* __restrict__ packed, int panels, const float* __restrict__ weight,
                              half_t* __restrict__ weights, const StoredWeights stored, int count, Params p) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  const Shared<unsigned char> memory = aligned_to_panels(dynamic);
  WeightsEpilogue<P::kSplit> epilogue{weight, weights, stored, p.scale, kOperandScale * kOperandScale * p.scale,
                                      count,  {}};
  const PackedOperand<half_t> operand{packed, panels};
  const GridRuns runs(stored.begin / kPanelRows, stored.row_tiles(), stored.column_tiles);
  follow_previous_kernel();
  multiply_tiles<P>(memory, operand, operand, runs, epilogue);
}

// One tile of 128 rows x 256 dimensions per run; all row tiles of a slice and a split come one after the other.
struct GatherRuns {
  struct Run {
    int fixed, begin, end, row_tile, slice, split;
  };
  int row_tiles, slices, at, last;

  __device__ __forceinline__ GatherRuns(int row_tiles_, int slices_, int splits)
      : row_tiles(row_tiles_), slices(slices_), at(static_cast<int>(blockIdx.x)), last(row_tiles_ * slices_ * splits) {}
  __device__ __forceinline__ bool next(Run& run) {
    if (at >= last) return false;
    const int outer = at / row_tiles;
    run.row_tile = at - outer * row_tiles;
    run.split = outer / slices;
    run.slice = outer - run.split * slices;
    run.fixed = run.split * row_tiles + run.row_tile;
    run.begin = outer;
    run.end = outer + 1;
    at += static_cast<int>(gridDim.x);
    return true;
  }
};

struct GatherEpilogue {
  float* __restrict__ partial;
  int rows, dim;

  __device__ __forceinline__ void begin(const GatherRuns::Run&) {}
  __device__ __forceinline__ void tile(float (&dz)[kPanelRows], const GatherRuns::Run& run, int) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = run.row_tile * kPanelRows + tile_row(2 * h);
      if (row >= rows) continue;
      float* const to = partial + (int64_t{run.split} * rows + row) * dim;
      const int first = run.slice * 4 * kPanelDims;
      store_accumulators<4 * kPanelDims>(to + first, dz, h, dim - first, dim % 2 == 0);
    }
  }
  __device__ __forceinline__ void end(const GatherRuns::Run&) {}
};

// partial (splits, stored.rows, D) = W Z.
template <typename P>
__global__ void __launch_bounds__(kProductThreads, 1)
    gather_sm90_kernel(const half_t* __restrict__ weights, const half_t* __restrict__ transposed,
                       float* __restrict__ partial, const StoredWeights stored, int slices, Params p) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  const Shared<unsigned char> memory = aligned_to_panels(dynamic);
  GatherEpilogue epilogue{partial, stored.rows, p.dim};
  const PackedOperand<half_t> rows{weights, stored.split_panels()}, columns{transposed, stored.split_panels()};
  const GatherRuns runs(stored.row_tiles(), slices, stored.splits);
  follow_previous_kernel();
  multiply_tiles<P>(memory, rows, columns, runs, epilogue);
}

}  // namespace
}  // namespace scan_fast
