// Forward kernel of NT-Xent for sm_90a: sums of exponentials over the columns, an epilogue of common/tile_products.cuh.
//
// The 128 columns of an outer tile stay in shared memory while the rows of the inner tiles stream through
// (cuda_schedule.cuh). A thread has 2 rows and 32 columns of a tile. It keeps the sums of its columns in registers over
// a whole segment. The sums of its rows are completed by four lanes and stored after each tile. So a tile costs, per
// element, one FFMA, one exponential and two additions. The two warpgroups take turns (ping-pong): one multiplies while
// the other one computes exponentials. Beyond 512 dimensions (256 split) the outer tile does not fit, and both tiles
// stream (StreamedRuns).
//
// In cycles of a multiprocessor, a tile of 128 x 128 takes at least 8 D of products (2,048 multiply-adds per cycle; three
// times that if split) and 1,024 of exponentials (16 per cycle). One warpgroup's tile takes the products and then the
// exponentials of its half, so a tile takes
//   max(8 D, 1024, 4 D + 512 + x) with x for the latencies between the two, about 100 to 200.
// Up to D = 128 the exponentials limit this. So every fourth one is a polynomial there, which makes it
//   max(8 D, 800, 4 D + 400 + x):   D = 64: 1,024 -> 800;  D = 128: about 1,170 -> 1,060.
// Beyond, and for split operands, the products alone take longer. Predictions, not measurements.
#pragma once

#include "common/tile_products.cuh"
#include "nt_xent/cuda_schedule.cuh"
#include "nt_xent/sm90_packing.cuh"

namespace scan_fast {
namespace {

using PanelSchedule = ForwardSchedule<kPanelRows>;

// A block's segments of the schedule, as runs of the main loop. Tiles are numbered by packed position.
struct ForwardRuns {
  struct Run {
    int fixed, begin, end;
  };
  PanelSchedule schedule;
  int at, last, outer;

  __device__ __forceinline__ explicit ForwardRuns(const PanelSchedule& schedule_)
      : schedule(schedule_),
        at(schedule_.block_begin(static_cast<int>(blockIdx.x))),
        last(schedule_.block_begin(static_cast<int>(blockIdx.x) + 1)),
        outer(schedule_.outer_of(at)) {}
  __device__ __forceinline__ bool next(Run& run) {
    if (at >= last) return false;
    const int from = at - schedule.prefix(outer), rest = schedule.length(outer) - from;
    const int tiles = min(last - at, rest);
    run.fixed = outer;
    run.begin = schedule.first_inner(outer) + from;
    run.end = run.begin + tiles;
    at += tiles;
    ++outer;
    return true;
  }
};

constexpr int kForwardPartBytes = kMultipliers / 32 * kPanelRows * static_cast<int>(sizeof(float));

// See exp2_element.
template <typename P>
constexpr int kPolynomialEvery = P::kResident == Resident::kColumns && P::kMaxPanels == 2 && !P::kSplit ? 4 : 0;

template <bool kTurns, int kPolynomialEvery>
struct ForwardSums {
  static constexpr int kColumnGroups = kPanelRows / 8;  // groups of 8 columns, 2 of which belong to this thread
  float* partial;                                       // (slots, anchors)
  Shared<float> part;                                   // (8 warps, 128 columns)
  const PanelSchedule& schedule;
  float scale, limit;
  int anchors, anchor_tiles, rows, count, offset;  // positions (see PackedPositions); rows: their end
  float column_sum[kColumnGroups][2];

  __device__ __forceinline__ ForwardSums(float* partial_, const Shared<float>& part_, const PanelSchedule& schedule_,
                                         const PackedPositions& at, const Params& p)
      : partial(partial_),
        part(part_),
        schedule(schedule_),
        scale(p.scale),
        limit(kOperandScale * kOperandScale * p.scale),
        anchors(schedule_.anchors),
        anchor_tiles(schedule_.anchor_tiles),
        rows(at.first_other() + at.others()),
        count(at.count),
        offset(at.positive_offset()) {}

  __device__ __forceinline__ void begin(const ForwardRuns::Run&) {
#pragma unroll
    for (int t = 0; t < kColumnGroups; ++t) column_sum[t][0] = column_sum[t][1] = 0;
  }

  __device__ __forceinline__ void tile(float (&s)[kPanelRows / 2], const ForwardRuns::Run& run, int inner) {
    const int first_row = inner * kPanelRows, first_column = run.fixed * kPanelRows;
    const bool of_anchors = inner < anchor_tiles, transposed = of_anchors && inner != run.fixed;
    const int row_end = of_anchors ? anchors : rows;
    const int distance = first_row - first_column;
    const bool positives = (distance > offset - kPanelRows && distance < offset + kPanelRows) ||
                           (distance > -offset - kPanelRows && distance < kPanelRows - offset);
    if (inner == run.fixed || positives || first_row + kPanelRows > row_end || first_column + kPanelRows > anchors) {
      exclude_pairs<kPanelRows>(s, first_row, first_column, count, offset, row_end, anchors);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = 0;
#pragma unroll
      for (int t = 0; t < kColumnGroups; ++t) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float e = exp2_element<kPolynomialEvery>(s[4 * t + 2 * h + c] * scale - limit, 2 * t + c);
          column_sum[t][c] += e;
          sum += e;
        }
      }
      if (!transposed) continue;
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      const int i = first_row + tile_row(2 * h);
      if (threadIdx.x % 4 == 0 && i < anchors) {
        partial[slot_at(schedule.transposed_slot(run.fixed), anchors, i)] = sum;
      }
    }
  }

  // Eight lanes and eight warps share a column: lanes are added by a butterfly, warps in order.
  __device__ __forceinline__ void end(const ForwardRuns::Run& run) {
    const int thread = static_cast<int>(threadIdx.x) - 128, lane = thread % 32;
#pragma unroll
    for (int t = 0; t < kColumnGroups; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = column_sum[t][c];
#pragma unroll
        for (int with = 4; with < 32; with *= 2) sum += __shfl_xor_sync(kFullMask, sum, with);
        if (lane < 4) part[thread / 32 * kPanelRows + 8 * t + 2 * lane + c] = sum;
      }
    }
    named_barrier_sync(kFreeBarrier, kMultipliers);
    const int column = run.fixed * kPanelRows + thread;
    float sum = 0;
    if (thread < kPanelRows) {
      sum = part[thread];
#pragma unroll
      for (int warp = 1; warp < kMultipliers / 32; ++warp) {
        const float other = part[warp * kPanelRows + thread];
        sum += other;
      }
    }
    // The second warpgroup writes `part` again only after its next turn, which the first grants after this point.
    // Without turns it must wait until the first has read `part`.
    if constexpr (!kTurns) named_barrier_sync(kFreeBarrier, kMultipliers);
    if (thread >= kPanelRows || column >= anchors) return;
    const int slot = schedule.segment_slot(run.fixed, static_cast<int>(blockIdx.x));
    partial[slot_at(slot, anchors, column)] = sum;
  }
};

// The same for a main loop without a resident operand, whose runs have one row tile and several column tiles: a run is
// a single tile, `fixed` its inner and `begin` its outer tile.
struct StreamedRuns {
  struct Run {
    int fixed, begin, end;
    bool last;  // tile of its segment
  };
  ForwardRuns tiles;  // `at` advances by one tile; nothing else is kept, because the copying thread has 24 registers

  __device__ __forceinline__ bool next(Run& run) {
    if (tiles.at >= tiles.last) return false;
    const int outer = tiles.outer, from = tiles.at - tiles.schedule.prefix(outer);
    const bool complete = from + 1 == tiles.schedule.length(outer);
    ++tiles.at;
    tiles.outer += complete ? 1 : 0;
    run.fixed = tiles.schedule.first_inner(outer) + from;
    run.begin = outer;
    run.end = outer + 1;
    run.last = complete || tiles.at == tiles.last;
    return true;
  }
};

struct StreamedSums {
  ForwardSums<false, 0>& sums;

  __device__ __forceinline__ static ForwardRuns::Run of_columns(const StreamedRuns::Run& run) {
    return {run.begin, run.fixed, run.fixed + 1};
  }
  __device__ __forceinline__ explicit StreamedSums(ForwardSums<false, 0>& sums_) : sums(sums_) { sums.begin({}); }
  __device__ __forceinline__ void begin(const StreamedRuns::Run&) {}
  __device__ __forceinline__ void tile(float (&s)[kPanelRows / 2], const StreamedRuns::Run& run, int) {
    sums.tile(s, of_columns(run), run.fixed);
  }
  __device__ __forceinline__ void end(const StreamedRuns::Run& run) {
    if (!run.last) return;
    sums.end(of_columns(run));
    sums.begin({});
  }
};

// partial: (slots, anchors) of the schedule, whose outer and inner tiles are 128 wide.
template <typename P>
__global__ void __launch_bounds__(kProductThreads, 1)
    forward_sm90_kernel(const half_t* __restrict__ packed, int panels, float* __restrict__ partial,
                        const PanelSchedule schedule, PackedPositions positions, Params p) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  const Shared<unsigned char> memory = aligned_to_panels(dynamic);
  ForwardSums<P::kTurns, kPolynomialEvery<P>> sums(partial, (memory + P::kSharedBytes).template as<float>(), schedule,
                                                   positions, p);
  const PackedOperand<half_t> operand{packed, panels};
  const ForwardRuns runs(schedule);
  follow_previous_kernel();
  if constexpr (P::kResident == Resident::kNone) {
    StreamedSums streamed{sums};
    multiply_tiles<P>(memory, operand, operand, StreamedRuns{runs}, streamed);
  } else {
    multiply_tiles<P>(memory, operand, operand, runs, sums);
  }
}

}  // namespace
}  // namespace scan_fast
