// How often the rings of NT-Xent's sm_90a kernels wrap for a problem, from the plan and the schedule that they use.
#pragma once

#include <algorithm>
#include <cstdint>

#include "nt_xent/sm90_plan.cuh"

namespace scan_fast::nt_xent_test {
namespace {

// Of the blocks of all launches of a pass: tiles of a block, steps of a block in the ring of `stages`, and for the
// forward pass how many operands stay in one of the two buffers one after the other (runs).
struct Rings {
  int64_t stages = 0, blocks = 0, splits = 1, launches = 0;
  int64_t least_tiles = INT64_MAX, least_steps = INT64_MAX, least_runs = INT64_MAX, most_runs = 0;

  void add(int64_t tiles, int64_t steps, int64_t runs) {
    ++blocks;
    least_tiles = std::min(least_tiles, tiles);
    least_steps = std::min(least_steps, steps);
    least_runs = std::min(least_runs, runs);
    most_runs = std::max(most_runs, runs);
  }
  // Every block uses each stage at least three times.
  bool wrap_twice() const { return least_steps >= 2 * stages + 1; }
};

inline Rings forward_rings(const NTXentProblem& problem, bool reduced) {
  const ForwardPlan plan(problem, reduced);
  Rings rings;
  int64_t steps = 0;  // of a tile
  plan.with_products([&]<typename P>() {
    rings.stages = P::kStages;
    steps = plan.panels * (reduced ? 1 : P::kResident == Resident::kNone ? 3 : 2);
  });
  plan.for_rounds([&](const PanelSchedule& schedule, bool, bool) {
    ++rings.launches;
    for (blockIdx = {}; static_cast<int>(blockIdx.x) < schedule.blocks; ++blockIdx.x) {
      ForwardRuns runs(schedule);
      int64_t tiles = 0, count = 0;
      for (ForwardRuns::Run run; runs.next(run); ++count) tiles += run.end - run.begin;
      rings.add(tiles, tiles * steps, count);
    }
  });
  return rings;
}

inline Rings backward_rings(const NTXentProblem& problem, bool reduced) {
  const BackwardPlan plan(problem, reduced);
  Rings rings;
  plan.with_tiles([&]<typename B>() { rings.stages = B::kStages; });
  rings.launches = 1;
  rings.splits = plan.p.splits;
  for (int64_t part = 0; part < row_tiles(plan.p.local_rows) * plan.p.splits; ++part) {
    const int64_t split = part % plan.p.splits;
    const int64_t tiles = plan.column_tiles * (split + 1) / plan.p.splits - plan.column_tiles * split / plan.p.splits;
    rings.add(tiles, tiles, 1);
  }
  return rings;
}

}  // namespace
}  // namespace scan_fast::nt_xent_test
