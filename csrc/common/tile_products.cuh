// Main loop of the sm_90a kernels: multiplies row tiles with column tiles and passes the products, in registers, to an
// epilogue.
//
// There is one block per multiprocessor, with three warpgroups. Warpgroup 0 releases its registers, and one of its
// threads issues the copies. Warpgroups 1 and 2 multiply, 64 of a tile's 128 rows each, with 240 registers per thread.
// If all streamed panels of a tile fit into the ring they take turns (ping-pong, by two named barriers): while one uses
// the matrix units, the other runs its epilogue. Otherwise they multiply side by side, because no stage could be
// refilled while one warpgroup waits for its turn.
//
//   C (128 x kColumns) = A (128 x dims) B^T,   A: row tile, B: column tile of packed operands (panels.h)
//
// One operand may be resident, i.e. stay in shared memory, while the other streams through a ring of stages in panels
// of 64 dimensions. With kNone both stream, for any number of dimensions. The resident operand is double-buffered, so
// that the next one is loaded in time, unless two buffers do not fit beside the ring. A schedule chooses the pairs of
// tiles, an epilogue uses the products:
//
//   struct Schedule {              // producer and consumers each have a copy and must see the same runs
//     struct Run { int fixed, begin, end; ... };     // may hold more, for the epilogue
//     __device__ bool next(Run& run);                // this block's next run, false at the end
//   };
//     kRows, kNone: row tile `fixed` times the column tiles [begin, end); kColumns: column tile `fixed` times the row
//     tiles [begin, end). Column tiles have kColumns columns. begin < end.
//   struct Epilogue {              // one per thread of the two warpgroups
//     __device__ void begin(const Run& run);
//     __device__ void tile(float (&c)[kColumns / 2], const Run& run, int moving);   // moving in [begin, end)
//     __device__ void end(const Run& run);
//   };
//     Element r of c is row kPanelRows * row_tile + tile_row(r), column kColumns * column_tile + accumulator_column(r).
//     The epilogue may use named barriers from kFreeBarrier on (over kMultipliers threads, or within a warpgroup), but
//     no __syncthreads.
//
//   __global__ void __launch_bounds__(kProductThreads, 1) kernel(...) {
//     SCAN_FAST_DYNAMIC_SHARED(dynamic);
//     const auto memory = aligned_to_panels(dynamic);    // Products::kSharedBytes + your own bytes + 1024
//     multiply_tiles<Products>(memory, rows, columns, schedule, epilogue);
//   }
//
// Operands must be packed to a whole number of tiles (for kColumns = 256, an even number of 128-row tiles), because
// tiles are copied as a whole. With kSplit each value is hi + lo: a tile has `panels` panels of hi, then as many of lo,
// and a product is hi hi + hi lo + lo hi.
//
// Invariants. A stage is filled after all eight multiplying warps have released it. It is released after the wait that
// completes the last product that reads it. The products of a tile are accumulated in one chain in the order of
// dimensions, so that results do not depend on timing.
#pragma once

#include "common/hopper.cuh"

namespace scan_fast {

constexpr int kProductThreads = 384, kMultipliers = 256;
constexpr int kOrderBarrier = 1, kFreeBarrier = 3;

// A packed operand: tile t begins at values + t * panels * kPanelElements, with twice as many panels if it is split.
template <typename T>
struct PackedOperand {
  const T* values;
  int panels;
};

// Position of a producer or consumer in a ring of stages.
template <int kStages>
struct RingPosition {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Barriers of a ring, in shared memory: kStages `full` ones, then kStages `empty` ones.
template <int kStages>
struct Ring {
  MBarrier* barriers;
  __device__ __forceinline__ MBarrier* full(int stage) const { return barriers + stage; }
  __device__ __forceinline__ MBarrier* empty(int stage) const { return barriers + kStages + stage; }
  // Called by one thread; mbarrier_init_fence and __syncthreads must follow.
  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), kMultipliers / 32);
    }
  }
  // Called by the producer: waits until the stage is free, and announces the bytes of the copies to full(stage).
  __device__ __forceinline__ void claim(const RingPosition<kStages>& at, int bytes) const {
    mbarrier_wait(empty(at.stage), at.parity ^ 1);
    mbarrier_expect(full(at.stage), bytes);
  }
  __device__ __forceinline__ void wait(const RingPosition<kStages>& at) const {
    mbarrier_wait(full(at.stage), at.parity);
  }
  // Called by whole warps, after the wait that completes their last product from this stage.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty(stage));
  }
};

// Lets the two multiplying warpgroups take turns at the matrix units. Without kTurns it does nothing.
template <bool kTurns>
struct Turns {
  int group;  // 0 or 1
  __device__ __forceinline__ explicit Turns(int group_) : group(group_) {
    if (group == 1) named_barrier_arrive_if(kOrderBarrier);  // group 0 begins
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (kTurns) named_barrier_sync(kOrderBarrier + group, kMultipliers);
  }
  __device__ __forceinline__ void pass() const { named_barrier_arrive_if(kOrderBarrier + 1 - group); }
  // Called after the last tile: takes the remaining turn.
  __device__ __forceinline__ void finish() const {
    if (group == 0) wait();
  }

 private:
  __device__ __forceinline__ static void named_barrier_arrive_if(int id) {
    if constexpr (kTurns) named_barrier_arrive(id, kMultipliers);
  }
};

enum class Resident { kNone, kRows, kColumns };

// kMaxPanels: panels of the resident operand, lo included; 0 for kNone. kStages: stages of the ring.
template <typename T_, int kColumns_, Resident kResident_, int kMaxPanels_, int kStages_, bool kSplit_ = false>
struct Products {
  using T = T_;
  static constexpr int kColumns = kColumns_, kMaxPanels = kMaxPanels_, kStages = kStages_;
  static constexpr Resident kResident = kResident_;
  static constexpr bool kSplit = kSplit_;
  static_assert(kColumns == 128 || kColumns == 256, "column tiles have 128 or 256 columns");
  // Warpgroups that take turns need a whole tile in the ring.
  static constexpr bool kTurns = kResident != Resident::kNone && kMaxPanels <= kStages;
  static constexpr int kColumnPanelBytes = kColumns / kPanelRows * kPanelBytes;
  static constexpr int kFixedPanelBytes = kResident == Resident::kNone   ? 0
                                          : kResident == Resident::kRows ? kPanelBytes
                                                                         : kColumnPanelBytes;
  static constexpr int kFixedBytes = kMaxPanels * kFixedPanelBytes;
  static constexpr int kStageBytes =
      (kResident == Resident::kRows ? 0 : kPanelBytes) + (kResident == Resident::kColumns ? 0 : kColumnPanelBytes);
  static constexpr int kBuffers = 2 * kFixedBytes + kStages * kStageBytes <= 224 * 1024 ? 2 : 1;
  static constexpr int kBarrierBytes = 2 * (kBuffers + kStages) * static_cast<int>(sizeof(MBarrier));
  static constexpr int kSharedBytes =
      kBuffers * kFixedBytes + kStages * kStageBytes + (kBarrierBytes + 127) / 128 * 128;
  static_assert(kSharedBytes + 1024 <= 227 * 1024, "more shared memory than a block can have");
};

// Returns the row of accumulator r in a tile of 128 rows, for a thread of the multiplying warpgroups.
__device__ __forceinline__ int tile_row(int r) {
  return (static_cast<int>(threadIdx.x) / 128 - 1) * 64 + accumulator_row(r);
}

namespace tile_products_detail {

// Copies panel `panel` of a tile of `tiles` times 128 rows.
template <int kTiles, typename T>
__device__ __forceinline__ void copy_panel(unsigned char* to, const PackedOperand<T>& operand, int stored_panels,
                                           int tile, int panel, MBarrier* full) {
#pragma unroll
  for (int part = 0; part < kTiles; ++part) {
    const int64_t from = (static_cast<int64_t>(tile) * kTiles + part) * stored_panels + panel;
    bulk_copy(to + part * kPanelBytes, operand.values + from * kPanelElements, kPanelBytes, full);
  }
}

template <typename P, typename Schedule>
__device__ __forceinline__ void produce(unsigned char* memory, const Ring<P::kBuffers>& fixed_ring,
                                        const Ring<P::kStages>& ring, const PackedOperand<typename P::T>& rows,
                                        const PackedOperand<typename P::T>& columns, Schedule schedule) {
  constexpr int kColumnTiles = P::kColumns / kPanelRows;
  const int panels = rows.panels * (P::kSplit ? 2 : 1);
  unsigned char* const stages = memory + P::kBuffers * P::kFixedBytes;
  RingPosition<P::kBuffers> fixed_at;
  RingPosition<P::kStages> at;
  typename Schedule::Run run;
  while (schedule.next(run)) {
    if constexpr (P::kResident != Resident::kNone) {
      fixed_ring.claim(fixed_at, panels * P::kFixedPanelBytes);
      unsigned char* to = memory + fixed_at.stage * P::kFixedBytes;
      for (int panel = 0; panel < panels; ++panel, to += P::kFixedPanelBytes) {
        if constexpr (P::kResident == Resident::kRows) {
          copy_panel<1>(to, rows, panels, run.fixed, panel, fixed_ring.full(fixed_at.stage));
        } else {
          copy_panel<kColumnTiles>(to, columns, panels, run.fixed, panel, fixed_ring.full(fixed_at.stage));
        }
      }
      fixed_at.advance();
    }
    for (int moving = run.begin; moving < run.end; ++moving) {
      // If both operands stream and are split, the products hi hi, hi lo and lo hi take three passes over them.
      constexpr bool kThrice = P::kSplit && P::kResident == Resident::kNone;
      // Not unrolled: this thread has 24 registers.
#pragma unroll 1
      for (int step = 0; step < (kThrice ? 3 * rows.panels : panels); ++step) {
        const int of_row = kThrice && step >= rows.panels ? step - rows.panels : step;
        const int of_column = kThrice && step >= 2 * rows.panels ? step - 2 * rows.panels : step;
        ring.claim(at, P::kStageBytes);
        unsigned char* to = stages + at.stage * P::kStageBytes;
        MBarrier* const full = ring.full(at.stage);
        if constexpr (P::kResident == Resident::kColumns) {
          copy_panel<1>(to, rows, panels, moving, of_row, full);
        } else {
          if constexpr (P::kResident == Resident::kNone) {
            copy_panel<1>(to, rows, panels, run.fixed, of_row, full);
            to += kPanelBytes;
          }
          copy_panel<kColumnTiles>(to, columns, panels, moving, of_column, full);
        }
        at.advance();
      }
    }
  }
}

// c (+)= the products of 64 dimensions.
template <typename P>
__device__ __forceinline__ void multiply_panel(float (&c)[P::kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kPanelDims / 16; ++k) {
    wgmma<typename P::T, P::kColumns>(c, advance(a, 32 * k), advance(b, 32 * k), accumulate || k > 0);
  }
}

struct NoPanel {};
template <typename Panel>
constexpr bool kHasSecond = true;
template <>
inline constexpr bool kHasSecond<NoPanel> = false;

template <typename P, typename Schedule, typename Epilogue>
__device__ __forceinline__ void consume(unsigned char* memory, const Ring<P::kBuffers>& fixed_ring,
                                        const Ring<P::kStages>& ring, int panels, Schedule schedule,
                                        Epilogue& epilogue) {
  const int group = warpgroup_index() - 1;
  constexpr int kHalf = 64 * 128;  // bytes of 64 rows of a panel
  unsigned char* const stages = memory + P::kBuffers * P::kFixedBytes;
  const Turns<P::kTurns> turns(group);
  RingPosition<P::kBuffers> fixed_at;
  RingPosition<P::kStages> at;
  typename Schedule::Run run;
  while (schedule.next(run)) {
    epilogue.begin(run);
    const uint64_t fixed =
        k_major(memory + fixed_at.stage * P::kFixedBytes + (P::kResident == Resident::kRows ? group * kHalf : 0));
    if constexpr (P::kResident != Resident::kNone) fixed_ring.wait(fixed_at);
    for (int moving = run.begin; moving < run.end; ++moving) {
      float c[P::kColumns / 2];
      turns.wait();
      int last_stage = 0;
      // Multiplies the next streamed panel with one or two panels of the resident operand.
      const auto multiply_next = [&](bool first, int fixed_panel, auto second_panel) {
        ring.wait(at);
        unsigned char* const stage = stages + at.stage * P::kStageBytes;
        wgmma_fence(c);
        if constexpr (P::kResident == Resident::kNone) {
          multiply_panel<P>(c, k_major(stage + group * kHalf), k_major(stage + kPanelBytes), !first);
        } else if constexpr (P::kResident == Resident::kRows) {
          multiply_panel<P>(c, advance(fixed, fixed_panel * P::kFixedPanelBytes), k_major(stage), !first);
          if constexpr (kHasSecond<decltype(second_panel)>) {
            multiply_panel<P>(c, advance(fixed, second_panel * P::kFixedPanelBytes), k_major(stage), true);
          }
        } else {
          const uint64_t streamed = k_major(stage + group * kHalf);
          multiply_panel<P>(c, streamed, advance(fixed, fixed_panel * P::kFixedPanelBytes), !first);
          if constexpr (kHasSecond<decltype(second_panel)>) {
            multiply_panel<P>(c, streamed, advance(fixed, second_panel * P::kFixedPanelBytes), true);
          }
        }
        wgmma_commit();
        if (!first) {
          wgmma_wait<1>();
          ring.release(last_stage);
        }
        last_stage = at.stage;
        at.advance();
      };
      // Not unrolled: the products of a panel take longer than the instructions between them, and with copies of this
      // code the compiler moves stages and descriptors out of uniform registers.
      if constexpr (P::kSplit && P::kResident == Resident::kNone) {
#pragma unroll 1
        for (int step = 0; step < 3 * panels; ++step) multiply_next(step == 0, step, NoPanel{});
      } else if constexpr (P::kSplit) {
#pragma unroll 1
        for (int panel = 0; panel < panels; ++panel) multiply_next(panel == 0, panel, panels + panel);
#pragma unroll 1
        for (int panel = 0; panel < panels; ++panel) multiply_next(false, panel, NoPanel{});
      } else {
#pragma unroll 1
        for (int panel = 0; panel < panels; ++panel) multiply_next(panel == 0, panel, NoPanel{});
      }
      turns.pass();
      wgmma_wait<0>(c);
      ring.release(last_stage);
      if (P::kResident != Resident::kNone && moving + 1 == run.end) fixed_ring.release(fixed_at.stage);
      epilogue.tile(c, run, moving);
    }
    if constexpr (P::kResident != Resident::kNone) fixed_at.advance();
    epilogue.end(run);
  }
  turns.finish();
}

}  // namespace tile_products_detail

// Called by all threads of a block of kProductThreads. `memory` holds P::kSharedBytes, aligned to 1024.
template <typename P, typename Schedule, typename Epilogue>
__device__ __forceinline__ void multiply_tiles(const Shared<unsigned char>& memory,
                                               const PackedOperand<typename P::T>& rows,
                                               const PackedOperand<typename P::T>& columns, const Schedule& schedule,
                                               Epilogue& epilogue) {
  auto* const barriers =
      (memory + (P::kBuffers * P::kFixedBytes + P::kStages * P::kStageBytes)).template as<MBarrier>().get();
  const Ring<P::kBuffers> fixed_ring{barriers};
  const Ring<P::kStages> ring{barriers + 2 * P::kBuffers};
  if (threadIdx.x == 0) {
    fixed_ring.init();
    ring.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroup_index() == 0) {
    give_registers<24>();
    if (warp_in_block() == 0 && elect_one()) {
      tile_products_detail::produce<P>(memory.get(), fixed_ring, ring, rows, columns, schedule);
    }
  } else {
    take_registers<240>();
    tile_products_detail::consume<P>(memory.get(), fixed_ring, ring, rows.panels, schedule, epilogue);
  }
}

}  // namespace scan_fast
