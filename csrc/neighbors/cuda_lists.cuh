// GPU neighbour search: candidate lists of a block, for any matrix instruction.
//
// Every row of a tile has a threshold, a count and a limit in shared memory, and a list of at most `capacity` entries
// (similarity bits, column) in global memory, cached in L2. Threads enter values that reach the threshold, at slots
// from an atomic. Between two tiles, separated by barriers, one warp per row over its limit raises the threshold and
// drops the candidates below it. So the set of candidates is the same in every run; only its order in the list varies,
// and no result depends on that.
//
// Cost. The matrix units wait for the slowest warp of a block, so what counts is the latency of each step. If lists
// belong to one warp (neighbors_sm90.cu), the predictions are
//   enter      per 32 values of a thread: about 1 instruction a value for the maximum; if one of the warp's lanes has a
//              candidate, 2 more a value and one shared atomic, and 4 more a value in groups of 8 that have candidates
//   warm_up    once per run of tiles: 9 counts of 64 values for each of two rows, 2,600 instructions; without it, all
//              256 values of each row would enter and 16 lists would be tightened one after the other
//   tighten    one read of the list from L2 (about 500 cycles), then some 10 steps of 40 cycles on registers
// A row gets about k ln(N / k) candidates and is tightened every time that its list doubles.
//
// Included by neighbors_cuda.cu and neighbors_sm90.cu only.
#pragma once

#include "neighbors/cuda_common.cuh"

namespace scan_fast {
namespace {

// Finds a value that at least k of more than k values reach, by bisection: the largest such value if a step separates
// exactly k. each(visit) calls visit(value) for the calling lane's values; NaN is none. Called by one warp.
template <typename Each>
__device__ __forceinline__ float reached_by(int64_t k, int steps, Each each) {
  float low = FLT_MAX, high = -FLT_MAX;
  each([&](float v) {
    low = fminf(low, v);
    high = fmaxf(high, v);
  });
  low = warp_min(low);
  high = warp_max(high);
  for (int step = 0; step < steps; ++step) {
    const float middle = low + 0.5f * (high - low);
    if (middle <= low || middle > high) break;
    int hits = 0;
    each([&](float v) { hits += v >= middle; });
    hits = __reduce_add_sync(kFullMask, hits);
    if (hits >= k) {
      low = middle;
    } else {
      high = middle;
    }
    if (hits == k) break;
  }
  // As many values reach the least of those that reach `low`.
  float least = FLT_MAX;
  each([&](float v) { least = v >= low ? fminf(least, v) : least; });
  return warp_min(least);
}

__device__ __forceinline__ float subtract_margin(float reached, double margin) {
  const double bound = static_cast<double>(reached) - margin;
  const float threshold = static_cast<float>(bound);
  return static_cast<double>(threshold) > bound ? nextafterf(threshold, -INFINITY) : threshold;
}

// Raises a row's threshold and drops the candidates below it, by one warp. Returns how many stay. Usual lists are held
// in registers from the first read on.
__device__ __forceinline__ int tighten(uint2* list, int count, int64_t k, double margin, float& threshold) {
  constexpr int kHeld = 8, kSteps = 14;
  const int lane = threadIdx.x % 32;
  const bool held = count <= 32 * kHeld;
  uint2 entries[kHeld];
  float reached;
  if (held) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int e = i * 32 + lane;
      entries[i] = make_uint2(0x7fffffffu, 0);  // NaN
      if (e < count) entries[i] = list[e];
    }
    reached = reached_by(k, kSteps, [&](auto visit) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) visit(__uint_as_float(entries[i].x));
    });
  } else {
    reached = reached_by(k, kSteps, [&](auto visit) {
      for (int e = lane; e < count; e += 32) visit(__uint_as_float(list[e].x));
    });
  }
  const float bound = subtract_margin(reached, margin);
  threshold = bound > threshold ? bound : threshold;

  int kept = 0;
  // Safe in place: entries only move towards the front, and all that precede the ballot were read before it.
  const auto keep = [&](const uint2& entry, bool inside) {
    const bool stays = inside && __uint_as_float(entry.x) >= threshold;
    const unsigned ballot = __ballot_sync(kFullMask, stays);
    if (stays) list[kept + __popc(ballot & ((1u << lane) - 1))] = entry;
    kept += __popc(ballot);
  };
  if (held) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * 32 < count) keep(entries[i], true);
    }
  } else {
    for (int base = 0; base < count; base += 32) {
      const bool inside = base + lane < count;
      uint2 entry = make_uint2(0, 0);
      if (inside) entry = list[base + lane];
      keep(entry, inside);
      __syncwarp();
    }
  }
  return kept;
}

// kTile: number of entries that one tile may add to a row.
template <int kTile>
struct RowLists {
  Shared<float> threshold;
  Shared<int> count;  // -1: the list overflowed
  Shared<int> limit;
  int k, capacity;

  __device__ __forceinline__ int first_limit() const { return 4 * k < 128 ? 128 : 4 * k; }
  __device__ __forceinline__ int last_limit() const { return capacity - kTile; }  // leaves room for the next tile
  __device__ __forceinline__ void set_limit(int row, int wanted) const {
    wanted = wanted > first_limit() ? wanted : first_limit();
    limit[row] = wanted < last_limit() ? wanted : last_limit();
  }

  // Called by one thread per row. With a negative or infinite margin the list stays empty.
  __device__ __forceinline__ void open(int row, double margin) const {
    threshold[row] = margin >= 0 && margin <= DBL_MAX ? -FLT_MAX : INFINITY;
    count[row] = 0;
    set_limit(row, 0);
  }

  // Raises the threshold of an open row to what its first tile shows, before the tile is entered: k columns reach the
  // threshold plus the margin. The row's columns are in four consecutive lanes, kColumns8 times 2 in each; value_at as
  // for enter. All lanes of the warp take part; __syncwarp must follow.
  template <int kColumns8, typename MarginOf, typename ValueAt>
  __device__ __forceinline__ void warm_up(const TopkProblem& problem, int row, MarginOf margin_of,
                                          ValueAt value_at) const {
    constexpr int kSteps = 8;
    const int wanted = k + (problem.exclude_self ? 1 : 0);  // the query itself may be among the columns
    const auto quad_count = [&](float bound) {
      int hits = 0;
#pragma unroll
      for (int c = 0; c < kColumns8; ++c) hits += (value_at(c, 0) >= bound) + (value_at(c, 1) >= bound);
      hits += __shfl_xor_sync(kFullMask, hits, 1);
      return hits + __shfl_xor_sync(kFullMask, hits, 2);
    };
    float low = FLT_MAX, high = -FLT_MAX;
#pragma unroll
    for (int c = 0; c < kColumns8; ++c) {
      low = fminf(low, fminf(value_at(c, 0), value_at(c, 1)));
      high = fmaxf(high, fmaxf(value_at(c, 0), value_at(c, 1)));
    }
    low = fminf(low, __shfl_xor_sync(kFullMask, low, 1));
    low = fminf(low, __shfl_xor_sync(kFullMask, low, 2));
    high = fmaxf(high, __shfl_xor_sync(kFullMask, high, 1));
    high = fmaxf(high, __shfl_xor_sync(kFullMask, high, 2));
    const bool enough = quad_count(low) >= wanted;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const float middle = low + 0.5f * (high - low);
      if (quad_count(middle) >= wanted) {
        low = middle;
      } else {
        high = middle;
      }
    }
    if (enough && threadIdx.x % 4 == 0 && threshold[row] < FLT_MAX) {
      threshold[row] = subtract_margin(low, margin_of(row));
    }
  }

  // Enters a thread's values of one row; value_at(c, e) is that of column first_column + 8 c + e, as in the
  // accumulators of mma and wgmma. Their maximum is tested first, at about one instruction per value.
  template <int kColumns8, typename ListOf, typename ValueAt>
  __device__ __forceinline__ void enter(const TopkProblem& problem, int row, int query, ListOf list_of,
                                        int first_column, ValueAt value_at) const {
    constexpr int kChunk = kColumns8 < 16 ? kColumns8 : 16;  // one bit per value
    static_assert(kColumns8 % kChunk == 0);
    const float bound = threshold[row];
#pragma unroll
    for (int chunk = 0; chunk < kColumns8; chunk += kChunk) {
      float best = value_at(chunk, 0);
#pragma unroll
      for (int c = chunk; c < chunk + kChunk; ++c) best = fmaxf(best, fmaxf(value_at(c, 0), value_at(c, 1)));
      if (!(best >= bound)) continue;
      unsigned passed = 0;
#pragma unroll
      for (int bit = 0; bit < 2 * kChunk; ++bit) {
        passed |= value_at(chunk + bit / 2, bit % 2) >= bound ? 1u << bit : 0u;
      }
      if (problem.exclude_self) {
        const int self = query - first_column - chunk * 8;
        if (self >= 0 && self < 8 * kChunk && self % 8 < 2) passed &= ~(1u << (self / 8 * 2 + self % 8));
      }
      if (passed == 0) continue;
      uint2* const list = list_of(row);
      int slot = atomicAdd((count + row).get(), __popc(passed));
#pragma unroll
      for (int first = 0; first < 2 * kChunk; first += 8) {
        if ((passed >> first & 255) == 0) continue;  // usually a warp has candidates in one or two of these groups
#pragma unroll
        for (int bit = first; bit < first + 8; ++bit) {
          if (passed >> bit & 1) {
            list[slot++] = make_uint2(__float_as_uint(value_at(chunk + bit / 2, bit % 2)),
                                      static_cast<unsigned>(first_column + (chunk + bit / 2) * 8 + bit % 2));
          }
        }
      }
    }
  }

  // Called by one warp when its rows first_row, first_row + stride, ... are complete. Makes room in them for the next
  // tile.
  template <int kRows, typename ListOf, typename MarginOf>
  __device__ __forceinline__ void make_room(int first_row, int stride, ListOf list_of, MarginOf margin_of) const {
    static_assert(kRows <= 32);
    const int lane = threadIdx.x % 32;
    bool full = false;
    if (lane < kRows) {
      const int row = first_row + lane * stride, entries = count[row];
      full = entries > limit[row] && entries > k;
    }
    for (unsigned rows = __ballot_sync(kFullMask, full); rows != 0; rows &= rows - 1) {
      const int row = first_row + (__ffs(static_cast<int>(rows)) - 1) * stride;
      float bound = threshold[row];
      int kept = tighten(list_of(row), count[row], k, margin_of(row), bound);
      if (kept > last_limit()) {
        bound = INFINITY;
        kept = -1;
      }
      __syncwarp();  // every lane has read this row's state
      if (lane == 0) {
        threshold[row] = bound;
        count[row] = kept;
        set_limit(row, 2 * kept);
      }
    }
  }
};

}  // namespace
}  // namespace scan_fast
