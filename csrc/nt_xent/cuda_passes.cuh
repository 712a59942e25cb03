// NT-Xent on the GPU, host side: workspace and launches of a pass. The portable and the sm_90a path share them.
//
// A path is a class with
//   using Forward, Backward;          plans, made from a problem and `reduced`
//   kLowTemperatures                  whether it handles temperatures below kFixedShiftTemperature
//   kOverlap                          of launch_next; the first kernel of a pass is launched with launch()
//   forward_products<kPass>(plan, workspace, schedule, stream), backward_products(plan, workspace, begin, stream)
//                                     launch the kernels that multiply
// Both plans have
//   p, reduced                        parameters of the kernels
//   operands(), packing<kSplit>(packed)     size of the packed operands in elements, and their layout
// and a forward plan
//   anchors, for_rounds(body)         body(schedule, is_first, is_last) for each launch of the products
// and a backward plan
//   rows, chunk                       rows of the call, and how many of them backward_products handles at a time
//   positions()                       rows of the packed operands, padding included
//   weight_elements(), transposed_elements()    of W and of Z transposed in memory, if the path stores them
#pragma once

#include <algorithm>

#include "nt_xent/cuda_finish.cuh"
#include "nt_xent/cuda_plan.cuh"
#include "nt_xent/cuda_prepare.cuh"

namespace scan_fast {
namespace {

constexpr int64_t kManyGradients = 4096;  // with more, a separate launch finds the largest

struct ForwardWorkspace {
  half_t* packed;
  float *positive, *partial, *running, *shift;

  template <typename Plan>
  ForwardWorkspace(Arena& arena, const Plan& plan) {
    int64_t slots = 0;
    plan.for_rounds([&](const auto& schedule, bool, bool) { slots = std::max<int64_t>(slots, schedule.slots()); });
    packed = arena.take<half_t>(plan.operands());
    positive = arena.take<float>(plan.p.samples);
    partial = arena.take<float>(slots * plan.anchors);
    running = arena.take<float>(plan.anchors);
    shift = arena.take<float>(plan.p.fixed_shift ? 0 : plan.anchors);
  }
};

struct BackwardWorkspace {
  half_t *packed, *transposed, *weights;
  float *weight, *shift, *unscale, *largest, *partial;

  template <typename Plan>
  BackwardWorkspace(Arena& arena, const Plan& plan)
      : packed(arena.take<half_t>(plan.operands())),
        transposed(arena.take<half_t>(plan.transposed_elements())),
        weights(arena.take<half_t>(plan.weight_elements())),
        weight(arena.take<float>(plan.positions())),
        shift(arena.take<float>(plan.positions())),
        unscale(arena.take<float>(1)),
        largest(arena.take<float>(1)),
        partial(arena.take<float>(int64_t{plan.p.splits} * plan.chunk * plan.p.dim)) {}
};

template <typename Workspace, typename Plan>
int64_t workspace_bytes(const Plan& plan) {
  Arena arena{nullptr};
  Workspace(arena, plan);
  return arena.used;
}

// Grid of a kernel with one warp per row.
inline dim3 grid_of_rows(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / 32))); }

template <typename Path, Pass kPass>
void forward_rounds(const typename Path::Forward& plan, const ForwardWorkspace& parts, float* losses,
                    float* shifted_lse, StreamHandle stream) {
  plan.for_rounds([&](const auto& schedule, bool first, bool last) {
    Path::template forward_products<kPass>(plan, parts, schedule, stream);
    const Collected out{parts.running, parts.shift, losses, shifted_lse, parts.positive, first, last};
    launch_next<Path::kOverlap>(collect_kernel<kPass, std::decay_t<decltype(schedule)>>,
                                dim3(static_cast<unsigned>(ceil_div(plan.anchors, kCollectRows))),
                                dim3(kCollectRows * kCollectParts), 0, stream, parts.partial, schedule, out, plan.p);
  });
}

template <typename Path>
void forward_pass(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                  float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                  StreamHandle stream) {
  const typename Path::Forward plan(problem, reduced);
  Arena arena{static_cast<unsigned char*>(workspace)};
  const ForwardWorkspace parts(arena, plan);
  dispatch_dtype(dtype, [&]<typename T>() {
    const bool aligned =
        aligned_rows<T>(z0, problem.dim) && aligned_rows<T>(z1, problem.dim) && aligned_rows<float>(unit, problem.dim);
    const auto prepare = [&](const auto& packing) {
      with_vectors(packing.width, aligned, [&]<int kVectors>() {
        launch(prepare_forward_kernel<T, std::decay_t<decltype(packing)>, kVectors>,
               grid_of_rows(problem.samples + packing.fillers()), dim3(kRowThreads), 0, stream,
               static_cast<const T*>(z0), static_cast<const T*>(z1), unit, inv_norm, packing, parts.positive, aligned,
               plan.p);
      });
    };
    reduced ? prepare(plan.template packing<false>(parts.packed)) : prepare(plan.template packing<true>(parts.packed));
  });
  if (plan.p.fixed_shift) {
    forward_rounds<Path, Pass::kSums>(plan, parts, losses, shifted_lse, stream);
  } else if constexpr (Path::kLowTemperatures) {
    forward_rounds<Path, Pass::kMaxima>(plan, parts, losses, shifted_lse, stream);
    forward_rounds<Path, Pass::kShiftedSums>(plan, parts, losses, shifted_lse, stream);
  }
}

template <typename Path>
void backward_pass(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                   const float* shifted_lse, const NTXentUpstream& grad_losses, DType dtype, bool reduced,
                   void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream) {
  const typename Path::Backward plan(problem, reduced);
  const Params& p = plan.p;
  Arena arena{static_cast<unsigned char*>(workspace)};
  const BackwardWorkspace parts(arena, plan);
  const Upstream upstream{grad_losses};
  const float* largest = nullptr;
  if (grad_losses.stride != 0 && problem.anchors() > kManyGradients) {
    launch(largest_gradient_kernel, dim3(1), dim3(kLargestThreads), 0, stream, upstream, parts.largest, p);
    largest = parts.largest;
  }
  const bool unit_aligned = aligned_rows<float>(unit, problem.dim);
  const auto prepare = [&](const auto& packing) {
    with_vectors(packing.width, unit_aligned, [&]<int kVectors>() {
      launch(prepare_backward_kernel<std::decay_t<decltype(packing)>, kVectors>,
             grid_of_rows(problem.rows() + packing.fillers()), dim3(kRowThreads), 0, stream, unit, upstream,
             shifted_lse, largest, packing, parts.weight, parts.shift, parts.unscale, unit_aligned, p);
    });
  };
  reduced ? prepare(plan.template packing<false>(parts.packed)) : prepare(plan.template packing<true>(parts.packed));
  for (int begin = 0; begin < plan.rows; begin += plan.chunk) {
    Path::backward_products(plan, parts, begin, stream);
    const FinishedRows finished{begin, std::min(plan.chunk, plan.rows - begin)};
    dispatch_dtype(dtype, [&]<typename T>() {
      const bool aligned =
          unit_aligned && aligned_rows<T>(grad_z0, problem.dim) && aligned_rows<T>(grad_z1, problem.dim);
      with_vectors(p.dim, aligned, [&]<int kVectors>() {
        launch_next<Path::kOverlap>(finish_backward_kernel<T, kVectors>, grid_of_rows(finished.rows), dim3(kRowThreads),
                                    0, stream, parts.partial, unit, inv_norm, losses, upstream, parts.unscale,
                                    static_cast<T*>(grad_z0), static_cast<T*>(grad_z1), finished, aligned, p);
      });
    });
  }
}

}  // namespace
}  // namespace scan_fast
