// GPU neighbour search: candidate lists of a block, for any matrix instruction.
//
// Every row of a tile has a threshold, a count and a limit in shared memory, and a list of at most `capacity` entries
// (similarity bits, column) in global memory, cached in L2. Threads enter values that reach the threshold, at a slot
// from an atomic. Between two tiles, separated by barriers, one warp per row over its limit raises the threshold and
// drops the candidates below it. So the set of candidates is the same in every run; only its order in the list varies,
// and no result depends on that.
//
// Included by neighbors_cuda.cu and neighbors_sm90.cu only.
#pragma once

#include "neighbors/cuda_common.cuh"

namespace scan_fast {
namespace {

// Finds by bisection the largest value that at least k entries reach. Called by one warp, with count > k.
template <typename ValueAt>
__device__ __forceinline__ float reached_by(int64_t k, int count, int steps, ValueAt value_at) {
  const int lane = threadIdx.x % 32;
  float low = FLT_MAX, high = -FLT_MAX;
  for (int e = lane; e < count; e += 32) {
    const float v = value_at(e);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  low = warp_min(low);
  high = warp_max(high);
  for (int step = 0; step < steps; ++step) {
    const float middle = low + 0.5f * (high - low);
    if (middle <= low || middle > high) break;
    int hits = 0;
    for (int e = lane; e < count; e += 32) hits += value_at(e) >= middle;
    if (warp_sum(hits) >= k) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ float subtract_margin(float reached, double margin) {
  const double bound = static_cast<double>(reached) - margin;
  const float threshold = static_cast<float>(bound);
  return static_cast<double>(threshold) > bound ? nextafterf(threshold, -INFINITY) : threshold;
}

// Raises a row's threshold and drops the candidates below it, by one warp. Returns how many stay.
__device__ __forceinline__ int tighten(uint2* list, int count, int64_t k, double margin, float& threshold) {
  const int lane = threadIdx.x % 32;
  const float reached = reached_by(k, count, 14, [&](int e) { return __uint_as_float(list[e].x); });
  const float bound = subtract_margin(reached, margin);
  threshold = bound > threshold ? bound : threshold;
  int kept = 0;
  for (int base = 0; base < count; base += 32) {
    const bool inside = base + lane < count;
    uint2 entry = make_uint2(0, 0);
    if (inside) entry = list[base + lane];
    const bool stays = inside && __uint_as_float(entry.x) >= threshold;
    const unsigned ballot = __ballot_sync(kFullMask, stays);
    // Safe in place: entries only move towards the front, and all 32 were read before the ballot.
    if (stays) list[kept + __popc(ballot & ((1u << lane) - 1))] = entry;
    kept += __popc(ballot);
    __syncwarp();
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

  // Enters a thread's values of one row; value_at(c, e) is that of column first_column + 8 c + e, as in the
  // accumulators of mma and wgmma. Their maximum is tested first, at about one instruction per value.
  template <int kColumns8, typename ListOf, typename ValueAt>
  __device__ __forceinline__ void enter(const TopkProblem& problem, const double* database_length, int row, int query,
                                        ListOf list_of, int first_column, ValueAt value_at) const {
    const float bound = threshold[row];
    float best = value_at(0, 0);
#pragma unroll
    for (int c = 0; c < kColumns8; ++c) best = fmaxf(best, fmaxf(value_at(c, 0), value_at(c, 1)));
    if (!(best >= bound)) return;
    uint2* const list = list_of(row);
    const int n = static_cast<int>(problem.n_database);
#pragma unroll
    for (int c = 0; c < kColumns8; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = value_at(c, e);
        const int column = first_column + c * 8 + e;
        if (value >= bound && column < n && !(problem.exclude_self && column == query) &&
            database_length[column] <= DBL_MAX) {
          const int slot = atomicAdd((count + row).get(), 1);
          list[slot] = make_uint2(__float_as_uint(value), static_cast<unsigned>(column));
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
