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
// Work: M^2 D + 4 M^2 D flops (three times that for split operands), M^2 / 2 + M^2 exponentials. Shared memory: up to
// 96 KB, which sm_89 has. Memory besides inputs and results: the operands, 64 sums per row, and 64 MB of W beyond 128
// dimensions.
//
// This file chooses tiles, splits and workspace, and launches the kernels.
#include <algorithm>

#include "nt_xent/cuda_backward.cuh"
#include "nt_xent/cuda_backward_wide.cuh"
#include "nt_xent/cuda_finish.cuh"
#include "nt_xent/cuda_forward.cuh"
#include "nt_xent/cuda_plan.cuh"
#include "nt_xent/cuda_prepare.cuh"

namespace scan_fast {
namespace {

constexpr int64_t kMaxTransposedSlots = 64;    // outer tiles per launch
constexpr int64_t kMaxWeightBytes = 64 << 20;  // bytes of W in the workspace
constexpr int64_t kManyGradients = 4096;       // with more, a separate launch finds the largest

// ---- forward --------------------------------------------------------------------------------------------------------

struct ForwardPlan {
  Params p;
  int64_t anchors, others, outer_tiles, max_blocks;
  int outer_width;

  ForwardPlan(const NTXentProblem& problem, bool reduced)
      : p(make_params(problem, problem.local_anchors(), 1)),
        anchors(problem.local_anchors()),
        others(problem.rows() - anchors),
        max_blocks(2 * multiprocessors()),
        outer_width(2 * kInner) {
    // Wide outer tiles read the inner tiles less often. If there are too few of them, narrow ones occupy every
    // multiprocessor.
    if (!reduced || !p.fixed_shift || schedule(0, ceil_div(anchors, outer_width)).total() < max_blocks) {
      outer_width = kInner;
    }
    outer_tiles = ceil_div(anchors, outer_width);
  }
  ForwardSchedule<kInner> schedule(int64_t begin, int64_t end) const {
    return make_forward_schedule<kInner>(anchors, others, outer_width, begin, end, max_blocks);
  }
  // Calls body(schedule, is_first, is_last) for each launch.
  template <typename Body>
  void for_rounds(Body body) const {
    for (int64_t begin = 0; begin < outer_tiles; begin += kMaxTransposedSlots) {
      const int64_t end = std::min(outer_tiles, begin + kMaxTransposedSlots);
      body(schedule(begin, end), begin == 0, end == outer_tiles);
    }
  }
};

struct ForwardWorkspace {
  half_t* packed;
  float *positive, *partial, *running, *shift;
  ForwardWorkspace(Arena& arena, const NTXentProblem& problem, const ForwardPlan& plan, bool reduced) {
    int64_t slots = 0;
    plan.for_rounds([&](const ForwardSchedule<kInner>& s, bool, bool) { slots = std::max(slots, s.slots()); });
    packed = arena.take_operands(problem, reduced);
    positive = arena.take<float>(problem.samples);
    partial = arena.take<float>(slots * plan.anchors);
    running = arena.take<float>(plan.anchors);
    shift = arena.take<float>(plan.anchors);
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
ForwardLaunch choose_forward(const ForwardPlan& plan, bool reduced) {
  if constexpr (kPass == Pass::kSums) {
    const bool resident = plan.p.padded <= 128;
    if (!reduced) {
      return resident ? forward_launch<true, 64, 128, true, kPass>() : forward_launch<true, 64, 64, false, kPass>();
    }
    if (plan.outer_width == 128) {
      return resident ? forward_launch<false, 128, 128, true, kPass>() : forward_launch<false, 128, 64, false, kPass>();
    }
    if (resident) return forward_launch<false, 64, 128, true, kPass>();
  }
  return reduced ? forward_launch<false, 64, 64, false, kPass>() : forward_launch<true, 64, 64, false, kPass>();
}

template <Pass kPass>
void forward_pass(const ForwardPlan& plan, const ForwardWorkspace& parts, bool reduced, float* losses,
                  float* shifted_lse, StreamHandle stream) {
  const ForwardLaunch chosen = choose_forward<kPass>(plan, reduced);
  plan.for_rounds([&](const ForwardSchedule<kInner>& schedule, bool first, bool last) {
    launch(chosen.kernel, dim3(static_cast<unsigned>(schedule.blocks)), dim3(kThreads), chosen.bytes, stream,
           parts.packed, parts.shift, parts.partial, schedule, plan.p);
    const Collected out{parts.running, parts.shift, losses, shifted_lse, parts.positive, first, last};
    launch(collect_kernel<kPass, ForwardSchedule<kInner>>,
           dim3(static_cast<unsigned>(ceil_div(plan.anchors, kCollectRows))), dim3(kCollectRows * kCollectParts), 0,
           stream, parts.partial, schedule, out, plan.p);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct BackwardPlan {
  Params p;
  int64_t rows, chunk;  // rows of this call; rows of W in the workspace at a time
  bool narrow;

  BackwardPlan(const NTXentProblem& problem, bool reduced)
      : rows(2 * problem.sample_count), narrow(problem.dim <= kNarrow) {
    const int64_t tiles = ceil_div(problem.rows(), kColumns);
    chunk = rows;
    if (!narrow) {
      const int64_t row_bytes = tiles * kColumns * static_cast<int64_t>(sizeof(half_t)) * (reduced ? 1 : 2);
      chunk = std::min(rows, std::max<int64_t>(1, kMaxWeightBytes / row_bytes / kRows) * kRows);
    }
    const int64_t blocks = ceil_div(chunk, kRows) * (narrow ? 1 : ceil_div(problem.dim, kSlice));
    const int64_t room = 2 * multiprocessors();
    p = make_params(problem, rows,
                    column_splits(blocks, tiles, room, split_cost(chunk, room, kRows, kColumns, !reduced)));
  }
  WideRows wide(int64_t begin) const {
    return {begin, std::min(chunk, rows - begin), ceil_div(p.rows(), kColumns) * kColumns};
  }
};

struct BackwardWorkspace {
  half_t *packed, *weights;
  float *weight, *shift, *unscale, *largest, *partial;
  BackwardWorkspace(Arena& arena, const NTXentProblem& problem, const BackwardPlan& plan, bool reduced)
      : packed(arena.take_operands(problem, reduced)),
        weights(plan.narrow ? nullptr : arena.take<half_t>((reduced ? 1 : 2) * plan.wide(0).elements())),
        weight(arena.take<float>(problem.rows())),
        shift(arena.take<float>(problem.rows())),
        unscale(arena.take<float>(1)),
        largest(arena.take<float>(1)),
        partial(arena.take<float>(plan.p.splits * plan.chunk * problem.dim)) {}
};

template <bool kSplit, bool kFixedShift>
void products_backward(const BackwardPlan& plan, const BackwardWorkspace& parts, int64_t begin, StreamHandle stream) {
  const Params& p = plan.p;
  const unsigned splits = static_cast<unsigned>(p.splits);
  if (plan.narrow) {
    launch(backward_kernel<kSplit, kFixedShift>, dim3(static_cast<unsigned>(ceil_div(plan.rows, kRows)), splits),
           dim3(kThreads), backward_bytes<kSplit>(), stream, parts.packed, parts.weight, parts.shift, parts.partial, p);
    return;
  }
  const WideRows wide = plan.wide(begin);
  const int64_t columns = wide.stride / kColumns;
  const int64_t shares = std::clamp<int64_t>(2 * multiprocessors() / columns, 1, wide.row_tiles());
  launch(weights_kernel<kSplit, kFixedShift>, dim3(static_cast<unsigned>(columns), static_cast<unsigned>(shares)),
         dim3(kThreads), inner_tiles_bytes<kSplit, kColumns, kRows, kWideChunk, false>(), stream, parts.packed,
         parts.weight, parts.shift, parts.weights, wide, p);
  launch(gather_kernel<kSplit>,
         dim3(static_cast<unsigned>(wide.row_tiles()), static_cast<unsigned>(ceil_div(p.dim, kSlice)), splits),
         dim3(kThreads), gather_bytes<kSplit>(), stream, parts.weights, parts.packed, parts.partial, wide, p);
}

}  // namespace

int64_t nt_xent_forward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  Arena arena{nullptr};
  ForwardWorkspace(arena, problem, ForwardPlan(problem, reduced), reduced);
  return arena.used;
}

int64_t nt_xent_backward_cuda_workspace(const NTXentProblem& problem, bool reduced) {
  Arena arena{nullptr};
  BackwardWorkspace(arena, problem, BackwardPlan(problem, reduced), reduced);
  return arena.used;
}

void nt_xent_forward_cuda(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream) {
  const ForwardPlan plan(problem, reduced);
  Arena arena{static_cast<unsigned char*>(workspace)};
  const ForwardWorkspace parts(arena, problem, plan, reduced);
  dispatch_dtype(dtype, [&]<typename T>() {
    const auto prepare = [&]<bool kSplit>() {
      launch(prepare_forward_kernel<T, RowMajor<kSplit>>, grid_of_rows(problem.samples), dim3(kRowThreads), 0, stream,
             static_cast<const T*>(z0), static_cast<const T*>(z1), unit, inv_norm,
             RowMajor<kSplit>(parts.packed, plan.p), parts.positive, plan.p);
    };
    reduced ? prepare.template operator()<false>() : prepare.template operator()<true>();
  });
  if (plan.p.fixed_shift) {
    forward_pass<Pass::kSums>(plan, parts, reduced, losses, shifted_lse, stream);
  } else {
    forward_pass<Pass::kMaxima>(plan, parts, reduced, losses, shifted_lse, stream);
    forward_pass<Pass::kShiftedSums>(plan, parts, reduced, losses, shifted_lse, stream);
  }
}

void nt_xent_backward_cuda(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const NTXentUpstream& grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream) {
  const BackwardPlan plan(problem, reduced);
  const Params& p = plan.p;
  Arena arena{static_cast<unsigned char*>(workspace)};
  const BackwardWorkspace parts(arena, problem, plan, reduced);
  const Upstream upstream{grad_losses};
  const float* largest = nullptr;
  if (grad_losses.stride != 0 && problem.anchors() > kManyGradients) {
    launch(largest_gradient_kernel, dim3(1), dim3(kLargestThreads), 0, stream, upstream, parts.largest, p);
    largest = parts.largest;
  }
  const auto prepare = [&]<bool kSplit>() {
    launch(prepare_backward_kernel<RowMajor<kSplit>>, grid_of_rows(problem.rows()), dim3(kRowThreads), 0, stream, unit,
           upstream, shifted_lse, largest, RowMajor<kSplit>(parts.packed, p), parts.weight, parts.shift, parts.unscale,
           p);
  };
  reduced ? prepare.operator()<false>() : prepare.operator()<true>();
  for (int64_t begin = 0; begin < plan.rows; begin += plan.chunk) {
    const auto products = reduced ? (p.fixed_shift ? products_backward<false, true> : products_backward<false, false>)
                                  : (p.fixed_shift ? products_backward<true, true> : products_backward<true, false>);
    products(plan, parts, begin, stream);
    const int64_t rows = std::min(plan.chunk, plan.rows - begin);
    dispatch_dtype(dtype, [&]<typename T>() {
      launch(finish_backward_kernel<T>, grid_of_rows(rows), dim3(kRowThreads), 0, stream, parts.partial, unit, inv_norm,
             losses, upstream, parts.unscale, static_cast<T*>(grad_z0), static_cast<T*>(grad_z1), begin, rows, p);
    });
  }
}

}  // namespace scan_fast
