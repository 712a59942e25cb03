// Backward kernel of NT-Xent for sm_90a: dZ = W Z in one kernel. It forms similarities, turns them into weights, and
// multiplies these with the same columns.
//
// A block has 128 rows and a column split. The rows stay in shared memory; tiles of columns stream through a ring. Each
// warpgroup forms S (64 rows x kColumns), turns it into W in registers, and adds W Z to its half of dZ (64 x D, in
// registers for the whole kernel). The fragment layout of an accumulator equals that of a left operand, and the tile of
// columns is read a second time, transposed. The product W Z of tile t - 1 is issued after the similarities of tile t
// and runs while the exponentials of tile t are computed. The two warpgroups also alternate (ping-pong).
//
// In cycles of a multiprocessor, 128 x 128 similarities take 16 D of products (48 D if split), 1,024 of exponentials and
// about 760 of instructions. So at D = 128 exponentials do not limit the kernel, and no polynomial replaces them as in
// the forward pass. At D = 64, where the two are equal, one in eight would give 896 of each (a prediction).
//
// A tile has 128 columns, or 64 if D > 128 or operands are split, because of registers and shared memory. The weights
// of a tile's columns are copied with it. Operands and weights of padding positions are zero and need no test.
#pragma once

#include "common/tile_products.cuh"
#include "nt_xent/sm90_packing.cuh"

namespace scan_fast {
namespace {

template <int kPanels_, bool kSplit_>
struct BackwardTiles {
  static constexpr int kPanels = kPanels_, kParts = kSplit_ ? 2 : 1;
  static constexpr bool kSplit = kSplit_;
  static constexpr int kDim = kPanels * kPanelDims, kColumns = kPanels > 2 || kSplit ? 64 : 128;
  static_assert(kPanels == 1 || kPanels == 2 || (kPanels == 4 && !kSplit), "unsupported number of panels");
  static constexpr int kRowBytes = kParts * kPanels * kPanelBytes;
  static constexpr int kColumnPanelBytes = kPanelBytes * kColumns / kPanelRows;
  static constexpr int kColumnBytes = kParts * kPanels * kColumnPanelBytes;
  static constexpr int kStages =
      (200 * 1024 - kRowBytes) / kColumnBytes > 4 ? 4 : (200 * 1024 - kRowBytes) / kColumnBytes;
  static_assert(kStages >= 3, "needs the current tile, the previous one and one in flight");
  static constexpr int kWeightBytes = kColumns * static_cast<int>(sizeof(float));
  static constexpr int kBarriersAt = kRowBytes + kStages * (kColumnBytes + kWeightBytes);
  static constexpr int kSharedBytes = kBarriersAt + (2 * kStages + 1) * static_cast<int>(sizeof(MBarrier));
  static_assert(kSharedBytes + 1024 <= 227 * 1024, "exceeds the shared memory of a block");
};

// Work of a block: a row tile and the column tiles [begin, end). Tile t begins at position kColumns * t.
struct BackwardShare {
  int row_tile, begin, end;
};

template <typename B>
__device__ __forceinline__ void produce_columns(unsigned char* memory, const Ring<B::kStages>& ring,
                                                MBarrier* rows_full, const half_t* __restrict__ packed,
                                                const float* __restrict__ weight, const BackwardShare& share) {
  constexpr int64_t kTileElements = int64_t{B::kParts} * B::kPanels * kPanelElements;
  mbarrier_expect(rows_full, B::kRowBytes);
  bulk_copy(memory, packed + share.row_tile * kTileElements, B::kRowBytes, rows_full);
  RingPosition<B::kStages> at;
  for (int tile = share.begin; tile < share.end; ++tile, at.advance()) {
    constexpr int kPerTile = kPanelRows / B::kColumns;
    const half_t* from = packed + tile / kPerTile * kTileElements + tile % kPerTile * (B::kColumns * kPanelDims);
    unsigned char* const to = memory + B::kRowBytes + at.stage * B::kColumnBytes;
    MBarrier* const full = ring.full(at.stage);
    ring.claim(at, B::kColumnBytes + B::kWeightBytes);
    if constexpr (kPerTile == 1) {
      bulk_copy(to, from, B::kColumnBytes, full);
    } else {
      for (int panel = 0; panel < B::kParts * B::kPanels; ++panel) {
        bulk_copy(to + panel * B::kColumnPanelBytes, from + panel * kPanelElements, B::kColumnPanelBytes, full);
      }
    }
    bulk_copy(memory + B::kRowBytes + B::kStages * B::kColumnBytes + at.stage * B::kWeightBytes,
              weight + int64_t{tile} * B::kColumns, B::kWeightBytes, full);
  }
}

// Issues s = products of 64 rows with a tile's columns: hi hi, then hi lo and lo hi.
template <typename B>
__device__ __forceinline__ void issue_similarities(float (&s)[B::kColumns / 2], uint64_t rows, uint64_t columns) {
#pragma unroll
  for (int product = 0; product < (B::kSplit ? 3 : 1); ++product) {
#pragma unroll
    for (int panel = 0; panel < B::kPanels; ++panel) {
      const int of_row = panel + (product == 2 ? B::kPanels : 0), of_column = panel + (product == 1 ? B::kPanels : 0);
#pragma unroll
      for (int k = 0; k < kPanelDims / 16; ++k) {
        wgmma<half_t, B::kColumns>(s, advance(rows, of_row * kPanelBytes + 32 * k),
                                   advance(columns, of_column * B::kColumnPanelBytes + 32 * k),
                                   product + panel + k > 0);
      }
    }
  }
}

// Issues dz += W Z: hi hi, then lo hi and hi lo.
template <typename B>
__device__ __forceinline__ void issue_gather(float (&dz)[B::kDim / 2], uint32_t (&w)[B::kParts][B::kColumns / 16][4],
                                             uint64_t columns) {
#pragma unroll
  for (int product = 0; product < (B::kSplit ? 3 : 1); ++product) {
    const int of_w = product == 1 ? 1 : 0, of_column = product == 2 ? B::kPanels * B::kColumnPanelBytes : 0;
#pragma unroll
    for (int k = 0; k < B::kColumns / 16; ++k) {
      wgmma<half_t, B::kDim, true>(dz, w[of_w][k], advance(columns, of_column + 2048 * k), true);
    }
  }
}

// partial: (splits, local rows, D), this block's contribution to dZ. packed and weight are indexed by position. The
// handled rows, all of which are anchors here, are the positions [0, local rows).
template <typename B>
__global__ void __launch_bounds__(kProductThreads, 1)
    backward_sm90_kernel(const half_t* __restrict__ packed, const float* __restrict__ weight,
                         float* __restrict__ partial, int column_tiles, int count, Params p) {
  constexpr int kColumns = B::kColumns, kSteps = kColumns / 16;
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  const Shared<unsigned char> memory = aligned_to_panels(dynamic);
  const Shared<float> weights = (memory + (B::kRowBytes + B::kStages * B::kColumnBytes)).template as<float>();
  MBarrier* const barriers = (memory + B::kBarriersAt).template as<MBarrier>().get();
  const Ring<B::kStages> ring{barriers};
  MBarrier* const rows_full = barriers + 2 * B::kStages;
  if (threadIdx.x == 0) {
    ring.init();
    mbarrier_init(rows_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  follow_previous_kernel();
  const int split = static_cast<int>(blockIdx.y);
  const BackwardShare share{static_cast<int>(blockIdx.x), column_tiles * split / p.splits,
                            column_tiles * (split + 1) / p.splits};
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    give_registers<24>();
    if (warp_in_block() == 0 && elect_one()) produce_columns<B>(memory.get(), ring, rows_full, packed, weight, share);
  } else {
    take_registers<240>();
    const int group = warpgroup - 1, first_row = share.row_tile * kPanelRows;
    const float limit = kOperandScale * kOperandScale * p.scale;
    float row_weight[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) row_weight[h] = weight[first_row + tile_row(2 * h)];
    float s[kColumns / 2], dz[B::kDim / 2];
    uint32_t w[B::kParts][kSteps][4];
#pragma unroll
    for (int r = 0; r < B::kDim / 2; ++r) dz[r] = 0;
    const uint64_t rows = k_major(memory.get() + group * (kPanelBytes / 2));
    unsigned char* const stages = memory.get() + B::kRowBytes;

    const auto weigh = [&](int tile, int stage) {
      exclude_handled_pairs<kColumns>(s, first_row, tile * kColumns, count);
#pragma unroll
      for (int t = 0; t < kColumns / 8; ++t) {
        const float2 of_column = ld_shared<float2>(weights + (stage * kColumns + accumulator_column(4 * t)));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float& value = s[4 * t + r];
          value = exp2_approx(value * p.scale - limit) * (row_weight[r / 2] + (r % 2 ? of_column.y : of_column.x));
        }
      }
    };
    const auto pack = [&] {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float x = s[8 * k + 2 * q], y = s[8 * k + 2 * q + 1];
          w[0][k][q] = pack2<half_t>(x, y);
          if constexpr (B::kSplit) {
            const float2 high = unpack2<half_t>(w[0][k][q]);
            w[1][k][q] = pack2<half_t>(x - high.x, y - high.y);
          }
        }
      }
    };

    const Turns<true> turns(group);
    RingPosition<B::kStages> at;
    mbarrier_wait(rows_full, 0);
    turns.wait();
    ring.wait(at);
    wgmma_fence(s);
    issue_similarities<B>(s, rows, k_major(stages + at.stage * B::kColumnBytes));
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>(s);
    weigh(share.begin, at.stage);
    pack();
    int previous = at.stage;
    at.advance();
    for (int tile = share.begin + 1; tile < share.end; ++tile) {
      turns.wait();
      ring.wait(at);
      wgmma_fence(s, dz, w);
      issue_similarities<B>(s, rows, k_major(stages + at.stage * B::kColumnBytes));
      wgmma_commit();
      issue_gather<B>(dz, w, mn_major(stages + previous * B::kColumnBytes, B::kColumnPanelBytes));
      wgmma_commit();
      turns.pass();
      wgmma_wait<1>(s);
      weigh(tile, at.stage);
      wgmma_wait<0>(dz, w);
      ring.release(previous);
      pack();
      previous = at.stage;
      at.advance();
    }
    turns.wait();
    wgmma_fence(dz, w);
    issue_gather<B>(dz, w, mn_major(stages + previous * B::kColumnBytes, B::kColumnPanelBytes));
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>(dz, w);
    turns.finish();

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int local = first_row + tile_row(2 * h);
      if (local >= p.local_rows) continue;
      float* const to = partial + (int64_t{split} * p.local_rows + local) * p.dim;
      store_accumulators<B::kDim>(to, dz, h, p.dim, p.dim % 2 == 0);
    }
  }
}

}  // namespace
}  // namespace scan_fast
