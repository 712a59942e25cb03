// NT-Xent on the GPU, host side: kernel parameters of a problem, column splits, allocation of the workspace.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "nt_xent/cuda_common.cuh"

namespace scan_fast {
namespace {

constexpr double kFixedShiftTemperature = 0.03;  // exp(-2 / 0.03) = 1e-29

// Parameters of a launch that handles `local_rows` rows with `splits` column splits.
inline Params make_params(const NTXentProblem& problem, int64_t local_rows, int64_t splits) {
  // The kernels count rows and dimensions in 32 bits; addresses are 64-bit.
  if (problem.rows() > (int64_t{1} << 30)) throw std::runtime_error("nt_xent: more than 2^30 rows");
  if (problem.dim > (int64_t{1} << 24)) throw std::runtime_error("nt_xent: more than 2^24 dimensions");
  Params p{};
  p.samples = static_cast<int>(problem.samples);
  p.sample_begin = static_cast<int>(problem.sample_begin);
  p.sample_count = static_cast<int>(problem.sample_count);
  p.local_rows = static_cast<int>(local_rows);
  p.dim = static_cast<int>(problem.dim);
  p.padded = static_cast<int>(ceil_div(problem.dim, 8) * 8);
  p.anchors = static_cast<int>(problem.anchors());
  p.splits = static_cast<int>(splits);
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
// `equal`: all splits must have the same number of tiles.
inline int64_t column_splits(int64_t blocks, int64_t tiles, int64_t room, double price, bool equal = false) {
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= std::min<int64_t>(16, tiles); ++splits) {
    if (equal && tiles % splits != 0) continue;
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

// Launches a kernel that calls follow_previous_kernel, with launch_after if kOverlap is set. Kernels that are compiled
// for compute capability 9.0 alone overlap; the first kernel of a host function is always started by launch().
template <bool kOverlap, typename... Parameters, typename... Arguments>
void launch_next(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, StreamHandle stream,
                 Arguments&&... arguments) {
  if constexpr (kOverlap) {
    launch_after(kernel, grid, block, smem, stream, arguments...);
  } else {
    launch(kernel, grid, block, smem, stream, arguments...);
  }
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
};

}  // namespace
}  // namespace scan_fast
