// NT-Xent on the GPU, host side: from a problem to the kernels' parameters, and the layout of the workspace.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

constexpr double kFixedShiftTemperature = 0.03;  // exp(-2 / 0.03) = 1e-29

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// For a launch that handles `local_rows` rows, with the columns divided into `splits` parts.
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

// What one more part of the columns costs in the backward pass, in times that a block needs for a tile of block_rows x
// tile_columns. A part of dZ is `rows` x D numbers that are written and read, 8 bytes each. A tile is two products of
// block_rows x tile_columns x D, 2 flops each and three times that when split, and `room` blocks share the GPU. D
// cancels. 250 flops a byte is what GPUs with matrix units have: 790 TFLOP/s and 3.0 TB/s on an H100. Never less than
// half a tile, for what waits on memory.
inline double part_price(int64_t rows, int64_t room, int64_t block_rows, int64_t tile_columns, bool split) {
  constexpr double kFlopsPerByte = 250;
  const double tile = static_cast<double>(room * block_rows * tile_columns * (split ? 3 : 1));
  return std::max(0.5, 2 * kFlopsPerByte * static_cast<double>(rows) / tile);
}

// How many parts of the columns for `blocks` blocks that walk over `tiles` tiles each, `room` of them at a time: as many
// waves of blocks as there must be, and little to add up afterwards. More parts take memory; they must gain 3 %.
inline int64_t column_splits(int64_t blocks, int64_t tiles, int64_t room, double price) {
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= std::min<int64_t>(16, tiles); ++splits) {
    const double cost = static_cast<double>(ceil_div(blocks * splits, room)) *
                            static_cast<double>(ceil_div(tiles, splits) + 1) + price * static_cast<double>(splits);
    if (splits == 1 || cost < 0.97 * least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

// Hands out parts of the workspace, each aligned to 256 bytes; with a null base it only measures.
struct Carver {
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

// Blocks of kernels with a warp per row.
inline dim3 grid_of_rows(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / 32))); }

}  // namespace
}  // namespace scan_fast
