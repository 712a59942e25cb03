// The GPU neighbour search: exact similarities decide, of the candidates where those are known to suffice, else of all
// rows.
//
// Part of neighbors_cuda.cu, which alone includes it.
#pragma once

#include "neighbors/cuda_search.cuh"

namespace scan_fast {
namespace {

constexpr int64_t kMaxFastK = 1024;  // the keys of one query's candidates must fit in shared memory
constexpr int kDecideThreads = 128, kExactThreads = 256;

// One block sorts keys[0, size), size a power of two, descending.
template <typename Keys>
__device__ __forceinline__ void sort_descending(Keys keys, int64_t size) {
  for (int64_t width = 2; width <= size; width *= 2) {
    for (int64_t stride = width / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int64_t low = pair / stride * stride * 2 + pair % stride, high = low + stride;
        const unsigned long long a = keys[low], b = keys[high];
        const bool descending = (low & width) == 0;
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Block b decides query first_query + b. max_keys: a power of two, at least k.
__global__ void __launch_bounds__(kDecideThreads)
    decide(TopkProblem problem, Workspace work, int64_t first_query, int splits, int capacity, int max_keys,
           float* __restrict__ similarity, int64_t* __restrict__ index) {
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(float, shared_bound, 1);
  SCAN_FAST_SHARED(int, shared_count, 1);
  const Shared<unsigned long long> keys = memory.as<unsigned long long>();
  const int64_t row = blockIdx.x, i = first_query + row, k = problem.k;
  const int thread = threadIdx.x, warp = thread / 32;
  const double margin = work.margin[i];
  const uint2* lists = work.candidates + row * splits * capacity;
  const int32_t* counts = work.counts + row * splits;

  if (margin < 0) {  // a query with a non-finite entry
    for (int64_t rank = thread; rank < k; rank += kDecideThreads) write_key(problem, similarity, index, i, rank, 0);
    return;
  }
  bool undecided = !(margin <= DBL_MAX);
  int total = 0;
  for (int s = 0; s < splits; ++s) {
    undecided = undecided || counts[s] < 0;
    total += counts[s];
  }
  if (undecided) {
    if (thread == 0) work.undecided[atomicAdd(work.undecided_count, 1ull)] = static_cast<int32_t>(i);
    return;
  }

  if (thread == 0) shared_count[0] = 0;
  if (warp == 0) {
    float bound = -FLT_MAX;
    if (total > k) {
      // Entry e of all lists together.
      const auto value_at = [&](int e) {
        int s = 0;
        while (e >= counts[s]) e -= counts[s++];
        return __uint_as_float(lists[static_cast<int64_t>(s) * capacity + e].x);
      };
      bound = lowered(reached_by(k, total, 40, value_at), margin);
    }
    if (thread == 0) shared_bound[0] = bound;
  }
  __syncthreads();
  const float bound = shared_bound[0];
  for (int s = 0; s < splits; ++s) {
    for (int e = thread; e < counts[s]; e += kDecideThreads) {
      const uint2 entry = lists[static_cast<int64_t>(s) * capacity + e];
      if (!(__uint_as_float(entry.x) >= bound)) continue;
      const int slot = atomicAdd(shared_count.get(), 1);
      if (slot < max_keys) keys[slot] = entry.y;
    }
  }
  __syncthreads();
  const int found = shared_count[0];
  if (found > max_keys) {
    if (thread == 0) work.undecided[atomicAdd(work.undecided_count, 1ull)] = static_cast<int32_t>(i);
    return;
  }
  int size = 1;
  while (size < found || size < k) size *= 2;
  for (int e = found + thread; e < size; e += kDecideThreads) keys[e] = 0ull;
  for (int e = warp; e < found; e += kDecideThreads / 32) {
    const unsigned column = static_cast<unsigned>(static_cast<unsigned long long>(keys[e]));
    __syncwarp();  // every lane has read the column
    const unsigned long long key = exact_key(problem, work, i, column);
    if (thread % 32 == 0) keys[e] = key;
  }
  sort_descending(keys, size);
  for (int64_t rank = thread; rank < k; rank += kDecideThreads) {
    const unsigned long long key = keys[rank];
    write_key(problem, similarity, index, i, rank, key);
  }
}

// Without a fast search every query is for search_exactly.
__global__ void __launch_bounds__(kThreads) leave_all_undecided(TopkProblem problem, Workspace work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < problem.n_queries) work.undecided[i] = static_cast<int32_t>(i);
}

// Blocks share the undecided queries: keys of all rows, the k-th largest by radix selection (keys are distinct), a
// sort. all: every query, whatever undecided_count says.
__global__ void __launch_bounds__(kExactThreads)
    search_exactly(TopkProblem problem, Workspace work, bool all, int64_t sort_keys, float* __restrict__ similarity,
                   int64_t* __restrict__ index) {
  SCAN_FAST_SHARED(int, histogram, 256);
  SCAN_FAST_SHARED(unsigned long long, chosen, 1);
  SCAN_FAST_SHARED(long long, remaining, 1);
  SCAN_FAST_SHARED(int, filled, 1);
  const int thread = threadIdx.x, warp = thread / 32;
  const int64_t n = problem.n_database, k = problem.k;
  const int64_t queries = all ? problem.n_queries : static_cast<int64_t>(*work.undecided_count);
  unsigned long long* keys = work.keys + static_cast<int64_t>(blockIdx.x) * (n + sort_keys);
  unsigned long long* best = keys + n;

  for (int64_t q = blockIdx.x; q < queries; q += gridDim.x) {
    const int64_t i = work.undecided[q];
    const bool usable = work.query_length[i] <= DBL_MAX;
    for (int64_t j = warp; j < n; j += kExactThreads / 32) {
      unsigned long long key = 0;
      if (usable && work.database_length[j] <= DBL_MAX && !(problem.exclude_self && i == j)) {
        key = exact_key(problem, work, i, j);
      }
      if (thread % 32 == 0) keys[j] = key;
    }
    // The k-th largest key, eight bits at a time from the top.
    if (thread == 0) {
      chosen[0] = 0ull;
      remaining[0] = static_cast<long long>(k);
      filled[0] = 0;
    }
    for (int shift = 56; shift >= 0; shift -= 8) {
      histogram[thread] = 0;
      __syncthreads();
      const unsigned long long prefix = chosen[0];
      for (int64_t j = thread; j < n; j += kExactThreads) {
        const unsigned long long key = keys[j];
        if (shift == 56 || (key >> (shift + 8)) == (prefix >> (shift + 8))) {
          atomicAdd((histogram + static_cast<int>(key >> shift & 255)).get(), 1);
        }
      }
      __syncthreads();
      if (thread == 0) {
        long long left = remaining[0];
        int digit = 255;
        while (digit > 0 && histogram[digit] < left) left -= histogram[digit--];
        remaining[0] = left;
        chosen[0] = prefix | static_cast<unsigned long long>(digit) << shift;
      }
      __syncthreads();
    }
    const unsigned long long kth = chosen[0];  // 0 where there are fewer than k neighbours
    for (int64_t e = thread; e < sort_keys; e += kExactThreads) best[e] = 0;
    __syncthreads();
    for (int64_t j = thread; j < n; j += kExactThreads) {
      const unsigned long long key = keys[j];
      if (key != 0 && key >= kth) best[atomicAdd(filled.get(), 1)] = key;
    }
    sort_descending(best, sort_keys);
    for (int64_t rank = thread; rank < k; rank += kExactThreads) {
      write_key(problem, similarity, index, i, rank, best[rank]);
    }
    __syncthreads();
  }
}

__global__ void report(Workspace work, bool all, int64_t* searched_again) {
  *searched_again = all ? 0 : static_cast<int64_t>(*work.undecided_count);
}

}  // namespace
}  // namespace scan_fast
