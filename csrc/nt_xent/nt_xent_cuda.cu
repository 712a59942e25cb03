// NT-Xent on the GPU, portable kernels: mma.sync m16n8k16 with cp.async, one source for all architectures from sm_80.
//
// nt_xent.h has the formulas and what is saved. As in the CPU kernel, positive pairs are excluded from every tile and
// added in float32 at the end, because their terms nearly cancel. Kernels in launch order; no host synchronisation, no
// atomics:
//   cuda_prepare.cuh         prepare_forward    one warp per sample: unit rows, operands, products of positive pairs
//   cuda_forward.cuh         forward_kernel     equal runs of tiles of one triangle: sums of exponentials
//   cuda_finish.cuh          collect_kernel     8 threads per row: add the sums in order, compute the losses
//   cuda_prepare.cuh         prepare_backward   one warp per row: operands, weights
//   cuda_backward.cuh        backward_kernel    one block per 64 rows and column split: dZ = W Z, up to 128 dimensions
//   cuda_backward_wide.cuh   weights_kernel, gather_kernel    W for some rows in memory, then W Z
//   cuda_finish.cuh          finish_backward    one warp per row: add the splits in order, backward of the
//                            normalisation
//
// Operands: see cuda_common.cuh. The weights W are scaled by a power of two so that the largest upstream gradient is at
// most 2^14, and are split like the operands. |W_ij| <= |g_i| + |g_j|, and values below float16's range are below 2^-38
// of the largest.
//
// Work: M^2 D + 4 M^2 D flops (three times that for split operands), M^2 / 2 + M^2 exponentials. In 16 bits, a quarter of
// the forward exponentials are polynomials up to 64 dimensions and at low temperatures (exp2_element). In the backward
// pass the products take longer: for 64 x 64 elements, 8 D cycles of an A100's multiprocessor, and 256 of exponentials.
// Shared memory: up to 96 KB, which sm_89 has. Memory besides inputs and results: the operands, 64 sums per row, and
// 64 MB of W beyond 128 dimensions.
//
// Rows of up to 512 dimensions are read once by the first and last kernels, in vectors of 16 bytes, and stay in
// registers (cuda_common.cuh).
//
// This file chooses tiles and splits. cuda_passes.cuh allocates the workspace and launches the kernels.
#include <algorithm>

#include "nt_xent/cuda_backward.cuh"
#include "nt_xent/cuda_backward_wide.cuh"
#include "nt_xent/cuda_forward.cuh"
#include "nt_xent/cuda_passes.cuh"

namespace scan_fast {
namespace {

constexpr int kMaxTransposedSlots = 64;        // outer tiles per launch
constexpr int64_t kMaxWeightBytes = 64 << 20;  // bytes of W in the workspace

struct PortablePlan {
  Params p;
  bool reduced;

  int64_t operands() const { return (reduced ? 1 : 2) * int64_t{p.rows()} * p.padded; }
  template <bool kSplit>
  RowMajor<kSplit> packing(half_t* packed) const {
    return {packed, p};
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

struct ForwardPlan : PortablePlan {
  int anchors, others, outer_tiles, max_blocks, outer_width;

  ForwardPlan(const NTXentProblem& problem, bool reduced_)
      : PortablePlan{make_params(problem, problem.local_anchors(), 1), reduced_},
        anchors(p.local_rows),
        others(p.rows() - anchors),
        max_blocks(2 * multiprocessors()),
        outer_width(2 * kInner) {
    // Wide outer tiles read the inner tiles less often. If there are too few of them, narrow ones occupy every
    // multiprocessor.
    outer_tiles = ceil_div(anchors, outer_width);
    if (!reduced || !p.fixed_shift || schedule(0, std::min(outer_tiles, kMaxTransposedSlots)).total() < max_blocks) {
      outer_width = kInner;
      outer_tiles = ceil_div(anchors, outer_width);
    }
  }
  ForwardSchedule<kInner> schedule(int begin, int end) const {
    return make_forward_schedule<kInner>(anchors, others, outer_width, begin, end, max_blocks);
  }
  template <typename Body>
  void for_rounds(Body body) const {
    for (int begin = 0; begin < outer_tiles; begin += kMaxTransposedSlots) {
      const int end = std::min(outer_tiles, begin + kMaxTransposedSlots);
      body(schedule(begin, end), begin == 0, end == outer_tiles);
    }
  }
};

using ForwardKernel = void (*)(const half_t*, const float*, float*, ForwardSchedule<kInner>, Params);
struct ForwardLaunch {
  ForwardKernel kernel;
  size_t bytes;
};

template <bool kSplit, int kOuter, int kChunk, bool kResident, Pass kPass>
ForwardLaunch forward_launch() {
  return {forward_kernel<kSplit, kOuter, kChunk, kResident, kPass>,
          inner_tiles_bytes<kSplit, kOuter, kInner, kChunk, kResident>()};
}

template <Pass kPass>
ForwardLaunch choose_forward(const ForwardPlan& plan) {
  if constexpr (kPass == Pass::kSums) {
    const bool resident = plan.p.padded <= 128, narrow = plan.p.padded <= 64;
    if (!plan.reduced) {
      return resident ? forward_launch<true, 64, 128, true, kPass>() : forward_launch<true, 64, 64, false, kPass>();
    }
    if (plan.outer_width == 128) {
      if (narrow) return forward_launch<false, 128, 64, true, kPass>();
      return resident ? forward_launch<false, 128, 128, true, kPass>() : forward_launch<false, 128, 64, false, kPass>();
    }
    if (narrow) return forward_launch<false, 64, 64, true, kPass>();
    if (resident) return forward_launch<false, 64, 128, true, kPass>();
  }
  return plan.reduced ? forward_launch<false, 64, 64, false, kPass>() : forward_launch<true, 64, 64, false, kPass>();
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct BackwardPlan : PortablePlan {
  int rows, chunk;
  bool narrow;

  BackwardPlan(const NTXentProblem& problem, bool reduced_)
      : PortablePlan{make_params(problem, 2 * problem.sample_count, 1), reduced_},
        rows(p.local_rows),
        chunk(rows),
        narrow(p.dim <= kNarrow) {
    const int64_t tiles = ceil_div(p.rows(), kColumns);
    if (!narrow) {
      const int64_t row_bytes = tiles * kColumns * static_cast<int64_t>(sizeof(half_t)) * (reduced ? 1 : 2);
      const int64_t most = std::max<int64_t>(1, kMaxWeightBytes / row_bytes / kRows) * kRows;
      chunk = static_cast<int>(std::min<int64_t>(rows, most));
    }
    const int64_t blocks = ceil_div(int64_t{chunk}, kRows) * (narrow ? 1 : ceil_div(p.dim, kSlice));
    const int64_t room = 2 * multiprocessors();
    p.splits = column_splits(blocks, tiles, room, split_cost(chunk, room, kRows, kColumns, !reduced));
  }
  WideRows wide(int begin) const {
    return {begin, std::min(chunk, rows - begin), ceil_div(p.rows(), kColumns) * kColumns};
  }
  int positions() const { return p.rows(); }
  int64_t transposed_elements() const { return 0; }
  int64_t weight_elements() const { return narrow ? 0 : (reduced ? 1 : 2) * wide(0).elements(); }
};

template <bool kSplit, bool kFixedShift>
void products_backward(const BackwardPlan& plan, const BackwardWorkspace& parts, int begin, StreamHandle stream) {
  const Params& p = plan.p;
  const unsigned splits = static_cast<unsigned>(p.splits);
  if (plan.narrow) {
    launch(backward_kernel<kSplit, kFixedShift>, dim3(static_cast<unsigned>(ceil_div(plan.rows, kRows)), splits),
           dim3(kThreads), backward_bytes<kSplit>(), stream, parts.packed, parts.weight, parts.shift, parts.partial, p);
    return;
  }
  const WideRows wide = plan.wide(begin);
  const int columns = wide.stride / kColumns;
  const int shares = std::clamp(2 * multiprocessors() / columns, 1, wide.row_tiles());
  launch(weights_kernel<kSplit, kFixedShift>, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(shares)),
         dim3(kThreads), inner_tiles_bytes<kSplit, kColumns, kRows, kWideChunk, false>(), stream, parts.packed,
         parts.weight, parts.shift, parts.weights, wide, p);
  launch(gather_kernel<kSplit>,
         dim3(static_cast<unsigned>(wide.row_tiles()), static_cast<unsigned>(ceil_div(p.dim, kSlice)), splits),
         dim3(kThreads), gather_bytes<kSplit>(), stream, parts.weights, parts.packed, parts.partial, wide, p);
}

struct Portable {
  using Forward = ForwardPlan;
  using Backward = BackwardPlan;
  static constexpr bool kLowTemperatures = true, kOverlap = false;

  template <Pass kPass>
  static void forward_products(const ForwardPlan& plan, const ForwardWorkspace& parts,
                               const ForwardSchedule<kInner>& schedule, StreamHandle stream) {
    const ForwardLaunch chosen = choose_forward<kPass>(plan);
    launch(chosen.kernel, dim3(static_cast<unsigned>(schedule.blocks)), dim3(kThreads), chosen.bytes, stream,
           parts.packed, parts.shift, parts.partial, schedule, plan.p);
  }
  static void backward_products(const BackwardPlan& plan, const BackwardWorkspace& parts, int begin,
                                StreamHandle stream) {
    const bool fixed = plan.p.fixed_shift;
    const auto products = plan.reduced ? (fixed ? products_backward<false, true> : products_backward<false, false>)
                                       : (fixed ? products_backward<true, true> : products_backward<true, false>);
    products(plan, parts, begin, stream);
  }
};

}  // namespace

int64_t nt_xent_forward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  return workspace_bytes<ForwardWorkspace>(ForwardPlan(problem, reduced));
}

int64_t nt_xent_backward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  return workspace_bytes<BackwardWorkspace>(BackwardPlan(problem, reduced));
}

void nt_xent_forward_cuda(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream) {
  forward_pass<Portable>(problem, z0, z1, dtype, reduced, losses, shifted_lse, unit, inv_norm, workspace, stream);
}

void nt_xent_backward_cuda(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const NTXentUpstream& grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream) {
  backward_pass<Portable>(problem, unit, inv_norm, losses, shifted_lse, grad_losses, dtype, reduced, grad_z0, grad_z1,
                          workspace, stream);
}

}  // namespace scan_fast
