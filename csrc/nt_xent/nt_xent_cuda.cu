// NT-Xent on the GPU, portable form: mma.sync m16n8k16 with cp.async, one source for every architecture from sm_80.
//
// Maths and what is saved: nt_xent.h. As in the CPU kernel the positive pair is left out of every tile and added in
// float32 at the end, where its terms would nearly cancel.
//
// Operands: see cuda_common.cuh. The weights W of the backward pass are scaled by a power of two so that the largest
// upstream gradient is at most 2^14, and split likewise: |W_ij| <= |g_i| + |g_j|, and what falls below float16's range
// is below 2^-38 of the largest.
//
// Tiling. A block of 4 warps owns 64 rows (16 per warp) and walks over tiles of 64 columns. The similarities of a tile
// stay in registers. Forward: a running maximum and sum per row. Backward: W is repacked in registers from the layout
// of a result to that of a left operand, and dZ (64 x 128) += W Z reads the same shared tile of Z transposed.
// Up to D = 128 the block's own rows are resident and the column tiles double-buffered. A larger D is walked over in
// chunks of 128, single-buffered, and the backward pass has one block per slice of 128 dimensions of dZ, which makes
// the similarities anew: correct for every D, meant for projection heads of 128.
//
// Parallelism and determinism. Where the row blocks are too few, the columns are divided over grid.y; each part writes
// its own partial result and a last kernel adds them in order. No atomics.
// Work: 2 M^2 D + 4 M^2 D flops (three times that when split), M^2 + M^2 exponentials; shared memory 48 KB reduced,
// 96 KB split (within sm_89's 99; two blocks per multiprocessor on sm_90). The symmetric half of the forward pass is not yet used.
//
// This file chooses splits and memory, and launches.
#include <algorithm>

#include "nt_xent/cuda_backward.cuh"
#include "nt_xent/cuda_finish.cuh"
#include "nt_xent/cuda_forward.cuh"
#include "nt_xent/cuda_plan.cuh"
#include "nt_xent/cuda_prepare.cuh"

namespace scan_fast {
namespace {

// Enough parts of the columns to give each multiprocessor two blocks.
int64_t column_splits(int64_t local_rows, int64_t columns, int64_t slices) {
  const int64_t blocks = ceil_div(local_rows, kRows) * slices;
  return std::clamp<int64_t>(ceil_div(2 * multiprocessors(), blocks), 1,
                             std::min<int64_t>(16, ceil_div(columns, kColumns)));
}

Params forward_params(const NTXentProblem& problem) {
  const int64_t rows = problem.local_anchors();
  return make_params(problem, rows, column_splits(rows, problem.rows(), 1));
}

Params backward_params(const NTXentProblem& problem) {
  const int64_t rows = 2 * problem.sample_count;
  return make_params(problem, rows, column_splits(rows, problem.rows(), ceil_div(problem.dim, kChunk)));
}

// The block's own rows and the column tiles: two of these where the rows are resident, one where chunks follow.
size_t tile_bytes(const Params& p, bool reduced) {
  return static_cast<size_t>(p.dim <= kChunk ? 3 : 2) * (reduced ? 1 : 2) * kTile * sizeof(half_t);
}

void pack(const float* unit, half_t* packed, const Params& p, bool reduced, StreamHandle stream) {
  launch(reduced ? pack_kernel<false> : pack_kernel<true>, grid_of_rows(2 * p.samples), dim3(kRowThreads), 0, stream,
         unit, packed, p);
}

}  // namespace

int64_t nt_xent_forward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  Carver carver{nullptr};
  ForwardWorkspace(carver, forward_params(problem), reduced);
  return carver.used;
}

int64_t nt_xent_backward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  Carver carver{nullptr};
  BackwardWorkspace(carver, backward_params(problem), reduced);
  return carver.used;
}

void nt_xent_forward_cuda(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream) {
  const Params p = forward_params(problem);
  Carver carver{static_cast<unsigned char*>(workspace)};
  const ForwardWorkspace parts(carver, p, reduced);
  dispatch_dtype(dtype, [&]<typename T>() {
    launch(normalize_kernel<T>, grid_of_rows(problem.rows()), dim3(kRowThreads), 0, stream, static_cast<const T*>(z0),
           static_cast<const T*>(z1), unit, inv_norm, p);
  });
  pack(unit, parts.packed, p, reduced, stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.local_rows, kRows)), static_cast<unsigned>(p.splits));
  launch(reduced ? forward_kernel<false> : forward_kernel<true>, grid, dim3(kThreads), tile_bytes(p, reduced), stream,
         parts.packed, parts.partial_max, parts.partial_sum, p);
  launch(finish_forward_kernel, grid_of_rows(p.local_rows), dim3(kRowThreads), 0, stream, parts.partial_max,
         parts.partial_sum, unit, losses, shifted_lse, p);
}

void nt_xent_backward_cuda(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const float* grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream) {
  const Params p = backward_params(problem);
  Carver carver{static_cast<unsigned char*>(workspace)};
  const BackwardWorkspace parts(carver, p, reduced);
  pack(unit, parts.packed, p, reduced, stream);
  launch(weights_kernel, dim3(1), dim3(1024), 0, stream, grad_losses, shifted_lse, parts.weight, parts.shift,
         parts.unscale, p);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.local_rows, kRows)), static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(ceil_div(p.dim, kChunk)));
  const auto kernel = reduced ? (p.fixed_shift ? backward_kernel<false, true> : backward_kernel<false, false>)
                              : (p.fixed_shift ? backward_kernel<true, true> : backward_kernel<true, false>);
  launch(kernel, grid, dim3(kThreads), tile_bytes(p, reduced), stream, parts.packed, parts.weight, parts.shift,
         parts.partial, p);
  dispatch_dtype(dtype, [&]<typename T>() {
    launch(finish_backward_kernel<T>, grid_of_rows(p.local_rows), dim3(kRowThreads), 0, stream, parts.partial, unit,
           inv_norm, losses, grad_losses, parts.unscale, static_cast<T*>(grad_z0), static_cast<T*>(grad_z1), p);
  });
}

}  // namespace scan_fast