// NT-Xent on Hopper: bulk copies, warpgroup products (WGMMA), ping-pong warpgroups. Compiled for sm_90a only.
//
// nt_xent.h has the formulas and what is saved. The kernels before and after the products are those of nt_xent_cuda.cu.
// The portable kernels also run what this file does not cover: temperatures below 0.03, D > 256, and D > 128 for
// float32 accuracy (split operands).
//   sm90_packing.cuh     operands in swizzled panels of 128 rows x 64 dimensions
//   sm90_forward.cuh     128 x 128 tiles of one triangle, in equal runs for persistent blocks
//   sm90_backward.cuh    128 rows and a column split per block: similarities, weights and W Z in one pass
//   sm90_plan.cuh        kernel variants, blocks and splits; how large a problem must be to fill the rings
// Both use one block of 3 warpgroups per multiprocessor: one thread issues copies, two warpgroups multiply alternately.
//
// Launches: forward prepare, products, collect (one more products and collect for every 16,384 anchors after the first
// 16,384); backward prepare, products, finish (one more if more than 4,096 anchors have separate gradients). No host
// synchronisation, no atomics: the same input gives the same bits.
//
// Compiled by nvcc 13.0 without spills, stack frames or serialised products; the multiplying warpgroups use up to 225
// of 240 registers. Steady state of a backward tile at D = 128, per warpgroup: 16 HGMMA back to back, then about 380
// instructions for 64 elements per thread, of which 64 are EX2. Predictions, not measurements:
//   tile of 128 x 128 x 128, two warpgroups, 790 TFLOP/s over 132 multiprocessors, 16 EX2 per cycle at 1.8 GHz:
//     forward   0.70 us of products, 0.57 us of EX2, 32 KB from L2: 6.2 TB/s if nothing else limited it, about the
//               bandwidth of L2, so expect 70 % of the products' limit
//     backward  1.40 us of products, 0.57 us of EX2, 32 KB: 3.1 TB/s
//   forward and backward of 2N = M rows, without prepare and finish (2 to 4 us each, and their memory traffic):
//     8192 x 128     16 tiles per block 16 us, 32 per block 45 us       65536 x 128    1.0 ms, 2.9 ms
//   The backward pass of 65536 rows has 512 blocks (column_splits chooses a single split), 3.9 times 132.
// Possible next: a cluster that shares the inner tiles by multicast, which would halve the L2 traffic of the forward
// pass; the backward of the normalisation in the products' kernel if there is a single split.
#include <algorithm>

#include "nt_xent/cuda_finish.cuh"
#include "nt_xent/cuda_prepare.cuh"
#include "nt_xent/sm90_plan.cuh"

namespace scan_fast {
namespace {

constexpr int64_t kManyGradients = 4096;  // with more, a separate launch finds the largest

// ---- forward --------------------------------------------------------------------------------------------------------

struct ForwardWorkspace {
  half_t* packed;
  float *positive, *partial, *running;
  ForwardWorkspace(Arena& arena, const ForwardPlan& plan, bool reduced) {
    int64_t slots = 0;
    plan.for_rounds([&](const PanelSchedule& s, bool, bool) { slots = std::max(slots, s.slots()); });
    packed = arena.take<half_t>(packed_size(plan.positions.total(), plan.panels * (reduced ? 1 : 2)));
    positive = arena.take<float>(plan.p.samples);
    partial = arena.take<float>(slots * plan.positions.anchors());
    running = arena.take<float>(plan.positions.anchors());
  }
};

template <typename P>
void forward_products(const ForwardPlan& plan, const ForwardWorkspace& parts, const PanelSchedule& schedule,
                      StreamHandle stream) {
  launch(forward_sm90_kernel<P>, dim3(static_cast<unsigned>(schedule.blocks)), dim3(kProductThreads),
         P::kSharedBytes + kForwardPartBytes + 1024, stream, parts.packed, plan.panels, parts.partial, schedule,
         plan.positions, plan.p);
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct BackwardWorkspace {
  half_t* packed;
  float *weight, *shift, *unscale, *largest, *partial;
  BackwardWorkspace(Arena& arena, const BackwardPlan& plan, bool reduced)
      : packed(arena.take<half_t>(packed_size(plan.positions.total(), plan.panels * (reduced ? 1 : 2)))),
        weight(arena.take<float>(plan.positions.total())),
        shift(arena.take<float>(plan.positions.total())),
        unscale(arena.take<float>(1)),
        largest(arena.take<float>(1)),
        partial(arena.take<float>(plan.p.splits * plan.p.local_rows * plan.p.dim)) {}
};

template <typename B>
void backward_products(const BackwardPlan& plan, const BackwardWorkspace& parts, StreamHandle stream) {
  launch(backward_sm90_kernel<B>,
         dim3(static_cast<unsigned>(row_tiles(plan.p.local_rows)), static_cast<unsigned>(plan.p.splits)),
         dim3(kProductThreads), B::kSharedBytes + 1024, stream, parts.packed, parts.weight, parts.partial,
         plan.column_tiles, static_cast<int>(plan.positions.count), plan.p);
}

}  // namespace

bool nt_xent_sm90_covers(const NTXentProblem& problem, bool reduced) {
  return compute_capability() == 90 && problem.temperature >= kFixedShiftTemperature &&
         problem.dim <= (reduced ? 256 : 128);
}

int64_t nt_xent_forward_sm90_workspace(const NTXentProblem& problem, bool reduced) {
  Arena arena{nullptr};
  ForwardWorkspace(arena, ForwardPlan(problem), reduced);
  return arena.used;
}

int64_t nt_xent_backward_sm90_workspace(const NTXentProblem& problem, bool reduced) {
  Arena arena{nullptr};
  BackwardWorkspace(arena, BackwardPlan(problem, reduced), reduced);
  return arena.used;
}

void nt_xent_forward_sm90(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream) {
  const ForwardPlan plan(problem);
  Arena arena{static_cast<unsigned char*>(workspace)};
  const ForwardWorkspace parts(arena, plan, reduced);
  dispatch_dtype(dtype, [&]<typename T>() {
    const auto prepare = [&]<bool kSplit>() {
      const Panels<kSplit> packing(parts.packed, plan.panels, plan.positions);
      launch(prepare_forward_kernel<T, Panels<kSplit>>, grid_of_rows(problem.samples + packing.fillers()),
             dim3(kRowThreads), 0, stream, static_cast<const T*>(z0), static_cast<const T*>(z1), unit, inv_norm,
             packing, parts.positive, plan.p);
    };
    reduced ? prepare.template operator()<false>() : prepare.template operator()<true>();
  });
  plan.for_rounds([&](const PanelSchedule& schedule, bool first, bool last) {
    plan.with_products(reduced, [&]<typename P>() { forward_products<P>(plan, parts, schedule, stream); });
    const Collected out{parts.running, nullptr, losses, shifted_lse, parts.positive, first, last};
    launch(collect_kernel<Pass::kSums, PanelSchedule>,
           dim3(static_cast<unsigned>(ceil_div(schedule.anchors, kCollectRows))), dim3(kCollectRows * kCollectParts), 0,
           stream, parts.partial, schedule, out, plan.p);
  });
}

void nt_xent_backward_sm90(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const NTXentUpstream& grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream) {
  const BackwardPlan plan(problem, reduced);
  const Params& p = plan.p;
  Arena arena{static_cast<unsigned char*>(workspace)};
  const BackwardWorkspace parts(arena, plan, reduced);
  const Upstream upstream{grad_losses};
  const float* largest = nullptr;
  if (grad_losses.stride != 0 && problem.anchors() > kManyGradients) {
    launch(largest_gradient_kernel, dim3(1), dim3(kLargestThreads), 0, stream, upstream, parts.largest, p);
    largest = parts.largest;
  }
  const auto prepare = [&]<bool kSplit>() {
    const Panels<kSplit> packing(parts.packed, plan.panels, plan.positions);
    launch(prepare_backward_kernel<Panels<kSplit>>, grid_of_rows(problem.rows() + packing.fillers()), dim3(kRowThreads),
           0, stream, unit, upstream, shifted_lse, largest, packing, parts.weight, parts.shift, parts.unscale, p);
  };
  reduced ? prepare.operator()<false>() : prepare.operator()<true>();
  plan.with_tiles(reduced, [&]<typename B>() { backward_products<B>(plan, parts, stream); });
  dispatch_dtype(dtype, [&]<typename T>() {
    launch(finish_backward_kernel<T>, grid_of_rows(p.local_rows), dim3(kRowThreads), 0, stream, parts.partial, unit,
           inv_norm, losses, upstream, parts.unscale, static_cast<T*>(grad_z0), static_cast<T*>(grad_z1), int64_t{0},
           p.local_rows, p);
  });
}

}  // namespace scan_fast
