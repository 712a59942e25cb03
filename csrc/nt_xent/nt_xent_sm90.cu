// NT-Xent on Hopper: bulk copies, warpgroup products (WGMMA), ping-pong warpgroups. Compiled for sm_90a only.
//
// nt_xent.h has the formulas and what is saved. The kernels before and after the products are those of nt_xent_cuda.cu.
// The portable kernels also run what this file does not cover: temperatures below 0.03 and D > 1024.
//   sm90_packing.cuh         operands in swizzled panels of 128 rows x 64 dimensions
//   sm90_forward.cuh         128 x 128 tiles of one triangle, in equal runs for persistent blocks
//   sm90_backward.cuh        up to 256 dimensions (128 split): 128 rows and a column split per block; similarities,
//                            weights and W Z in one pass
//   sm90_backward_wide.cuh   beyond: W of some rows in memory, up to 64 MB, then W Z
//   sm90_plan.cuh            kernel variants, blocks and splits; how large a problem must be to fill the rings
//   cuda_passes.cuh          workspace and launches
// All products use one block of 3 warpgroups per multiprocessor: one thread issues copies, two warpgroups multiply.
//
// Launches: forward prepare, products, collect (one more products and collect for every 16,384 anchors after the first
// 16,384); backward prepare, products, finish (one more if more than 4,096 anchors have separate gradients; beyond 256
// or 128 dimensions transpose, and for each piece of W store, gather, finish). Every kernel but the first of a pass may
// start while the previous one ends (launch_next). No host synchronisation, no atomics: the same input gives the same
// bits.
//
// Compiled by nvcc 13.0 without spills, stack frames or serialised products; the multiplying warpgroups use up to 225
// of 240 registers. Steady state of a backward tile at D = 128, per warpgroup: 16 HGMMA back to back, then about 380
// instructions for 64 elements per thread, of which 64 are EX2. Predictions, not measurements:
//   tile of 128 x 128 x 128, two warpgroups, 790 TFLOP/s over 132 multiprocessors, 16 EX2 per cycle at 1.8 GHz:
//     forward   0.70 us of products, 0.43 us of EX2 (0.57 us without polynomials), 0.44 us of instructions, 32 KB from
//               L2: 6.2 TB/s if nothing else limited it, about the bandwidth of L2, so expect 75 % of the products'
//               limit. At D = 64: 0.35 us of products, 16 KB; expect 80 % of the limit by instructions
//     backward  1.40 us of products, 0.57 us of EX2, 32 KB: 3.1 TB/s
//   beyond 256 dimensions, per 64 dimensions of a tile: forward and W read 16 KB (32 KB if both operands stream) for
//   2.1 MFLOP, W Z 48 KB for 4.2 MFLOP. At 6 TB/s of L2 both operands streaming allow 390 TFLOP/s, W Z 520.
//   forward and backward of 2N = M rows on 132 multiprocessors, in us; waves of blocks in brackets:
//                     prepare  forward    collect  prepare  backward           finish   sum   share of the limit
//     1024 x 128         2     3 (0.27)      2        2     4 (0.24)             2       18 (with two launches that
//                                                                                        do not overlap)   5 %
//     8192 x 64          3      9 (1)        3        2     25 (0.97)            3       45    60 %
//     8192 x 128         4     16 (1)        3        3     66 (0.97)            4       96    59 %
//     65536 x 128       25     940 (1)      15       20     3000 (3.9)          25     4000    85 %
//     8192 x 512         8     50 (1)        3       10     W 109, W Z 136      12      330    67 %
//   float32: 1024 x 128 23 us; 8192 x 128 200 us; 65536 x 128 12.5 ms; 8192 x 512 1.25 ms (53 %).
//   The backward pass of 65536 rows has 512 blocks (column_splits chooses a single split), 3.9 times 132.
//   Of an earlier version, with other kernels before and after the products and without overlap, 1024 x 128 took 36 us
//   on an H200 (float32 42), and 8192 x 128 took 122 us (float32 223).
// Possible next: a cluster that shares the inner tiles by multicast, which would halve the L2 traffic of the forward
// pass; the backward of the normalisation in the products' kernel if there is a single split.
#include <algorithm>

#include "nt_xent/cuda_passes.cuh"
#include "nt_xent/sm90_plan.cuh"

namespace scan_fast {
namespace {

constexpr bool kOverlapLaunches = true;

inline dim3 persistent(int64_t tiles) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors())));
}

void wide_backward_products(const BackwardPlan& plan, const BackwardWorkspace& parts, const StoredWeights& stored,
                            StreamHandle stream) {
  if (stored.begin == 0) {
    const dim3 grid(static_cast<unsigned>(plan.at.total() / kPanelDims), static_cast<unsigned>(plan.panels),
                    static_cast<unsigned>(plan.parts()));
    launch_next<kOverlapLaunches>(transpose_kernel<half_t>, grid, dim3(kTransposeThreads), 0, stream, parts.packed,
                                  parts.transposed, stored.split_panels(), plan.slices());
  }
  with_large_products<Resident::kRows>(plan.panels, plan.reduced, [&]<typename P>() {
    launch_next<kOverlapLaunches>(store_weights_sm90_kernel<P>,
                                  persistent(int64_t{stored.row_tiles()} * stored.column_tiles), dim3(kProductThreads),
                                  P::kSharedBytes + 1024, stream, parts.packed, plan.panels, parts.weight,
                                  parts.weights, stored, plan.at.count, plan.p);
  });
  const auto gather = [&]<typename P>() {
    launch_next<kOverlapLaunches>(gather_sm90_kernel<P>,
                                  persistent(int64_t{stored.row_tiles()} * plan.slices() * stored.splits),
                                  dim3(kProductThreads), P::kSharedBytes + 1024, stream, parts.weights,
                                  parts.transposed, parts.partial, stored, plan.slices(), plan.p);
  };
  plan.reduced ? gather.operator()<GatherProducts<false>>() : gather.operator()<GatherProducts<true>>();
}

struct Sm90 {
  using Forward = ForwardPlan;
  using Backward = BackwardPlan;
  static constexpr bool kLowTemperatures = false, kOverlap = kOverlapLaunches;

  template <Pass>
  static void forward_products(const ForwardPlan& plan, const ForwardWorkspace& parts, const PanelSchedule& schedule,
                               StreamHandle stream) {
    plan.with_products([&]<typename P>() {
      launch_next<kOverlap>(forward_sm90_kernel<P>, dim3(static_cast<unsigned>(schedule.blocks)), dim3(kProductThreads),
                            P::kSharedBytes + kForwardPartBytes + 1024, stream, parts.packed, plan.panels,
                            parts.partial, schedule, plan.at, plan.p);
    });
  }
  static void backward_products(const BackwardPlan& plan, const BackwardWorkspace& parts, int begin,
                                StreamHandle stream) {
    if (!plan.narrow) return wide_backward_products(plan, parts, plan.stored(begin), stream);
    plan.with_tiles([&]<typename B>() {
      launch_next<kOverlap>(backward_sm90_kernel<B>,
                            dim3(static_cast<unsigned>(row_tiles(plan.rows)), static_cast<unsigned>(plan.p.splits)),
                            dim3(kProductThreads), B::kSharedBytes + 1024, stream, parts.packed, parts.weight,
                            parts.partial, plan.column_tiles, plan.at.count, plan.p);
    });
  }
};

}  // namespace

bool nt_xent_sm90_covers(const NTXentProblem& problem, bool) {
  return compute_capability() == 90 && problem.temperature >= kFixedShiftTemperature && problem.dim <= kMaxDim;
}

int64_t nt_xent_forward_sm90_workspace(const NTXentProblem& problem, bool reduced) {
  return workspace_bytes<ForwardWorkspace>(ForwardPlan(problem, reduced));
}

int64_t nt_xent_backward_sm90_workspace(const NTXentProblem& problem, bool reduced) {
  return workspace_bytes<BackwardWorkspace>(BackwardPlan(problem, reduced));
}

void nt_xent_forward_sm90(const NTXentProblem& problem, const void* z0, const void* z1, DType dtype, bool reduced,
                          float* losses, float* shifted_lse, float* unit, float* inv_norm, void* workspace,
                          StreamHandle stream) {
  forward_pass<Sm90>(problem, z0, z1, dtype, reduced, losses, shifted_lse, unit, inv_norm, workspace, stream);
}

void nt_xent_backward_sm90(const NTXentProblem& problem, const float* unit, const float* inv_norm, const float* losses,
                           const float* shifted_lse, const NTXentUpstream& grad_losses, DType dtype, bool reduced,
                           void* grad_z0, void* grad_z1, void* workspace, StreamHandle stream) {
  backward_pass<Sm90>(problem, unit, inv_norm, losses, shifted_lse, grad_losses, dtype, reduced, grad_z0, grad_z1,
                      workspace, stream);
}

}  // namespace scan_fast
