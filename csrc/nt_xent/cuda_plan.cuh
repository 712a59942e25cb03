// NT-Xent on the GPU, host side: kernel parameters of a problem, column splits, layout of the workspace.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

constexpr double kFixedShiftTemperature = 0.03;  // exp(-2 / 0.03) = 1e-29

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Parameters of a launch that handles `local_rows` rows with `splits` column splits.
inline Params make_params(const NTXentProblem& problem, int64_t local_rows, int64_t splits) {
  // Rows are counted in 32 bits inside the tiles; addresses are 64-bit.
  if (problem.rows() > (int64_t{1} << 30)) throw std::runtime_error("nt_xent: more than 2^30 rows");
  Params p{};
  p.samples = problem.samples;
  p.sample_begin = problem.sample_begin;
  p.sample_count = problem.sample_count;
  p.local_rows = local_rows;
  p.dim = problem.dim;
  p.padded = ceil_div(problem.dim, 8) * 8;
  p.anchors = problem.anchors();
  p.splits = splits;
  p.temperature = static_cast<float>(problem.temperature);
  p.scale = static_cast<float>(1.4426950408889634 / problem.temperature / (kOperandScale * kOperandScale));
  p.fixed_shift = problem.temperature >= kFixedShiftTemperature;
  return p;
}

// Cost of one more column split in the backward pass, in units of the time that a block needs for a tile of block_rows
// x tile_columns. A split writes and reads a partial dZ of `rows` x D values, 8 bytes each. A tile is two products of
// block_rows x tile_columns x D with 2 flops each (three times that for split operands), and `room` blocks share the
// GPU. D cancels. GPUs with matrix units do about 250 flops per byte: an H100 has 790 TFLOP/s and 3.0 TB/s. At least
// half a tile, for memory latency.
inline double split_cost(int64_t rows, int64_t room, int64_t block_rows, int64_t tile_columns, bool split) {
  constexpr double kFlopsPerByte = 250;
  const double tile = static_cast<double>(room * block_rows * tile_columns * (split ? 3 : 1));
  return std::max(0.5, 2 * kFlopsPerByte * static_cast<double>(rows) / tile);
}

// Chooses the number of column splits for `blocks` blocks that process `tiles` tiles each, `room` blocks at a time: as
// few waves of blocks as possible, with little to add up afterwards. More splits need memory, so they must gain 3 %.
inline int64_t column_splits(int64_t blocks, int64_t tiles, int64_t room, double price) {
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= std::min<int64_t>(16, tiles); ++splits) {
    const double cost =
        static_cast<double>(ceil_div(blocks * splits, room)) * static_cast<double>(ceil_div(tiles, splits) + 1) +
        price * static_cast<double>(splits);
    if (splits == 1 || cost < 0.97 * least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

// Allocates parts of the workspace, each aligned to 256 bytes. With a null base it only measures the size.
struct Arena {
  unsigned char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return part;
  }
  half_t* take_operands(const NTXentProblem& problem, bool reduced) {
    return take<half_t>((reduced ? 1 : 2) * problem.rows() * (ceil_div(problem.dim, 8) * 8));
  }
};

// Grid of a kernel with one warp per row.
inline dim3 grid_of_rows(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / 32))); }

}  // namespace
}  // namespace scan_fast
