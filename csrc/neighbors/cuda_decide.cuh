// GPU neighbour search: decision by exact similarities, among the candidates if these are known to suffice, otherwise
// among all rows.
//
// decide: the k-th best fast similarity, by one warp from shared memory; then exact sums of the candidates within the
// margin of it, eight at a time per warp; then the rank of each. Usually this is a little more than k candidates, too
// few for a second threshold after the first k sums (as on the CPU) to save work.
// Limit (a prediction): per query c rows of 4 D bytes for c candidates, from memory or L2, and 1.5 c D conversions from
// float32 to float64, of which a multiprocessor does 16 per cycle. For 50,000 x 512, k = 20, c = 22: 2.3 GB, half of it
// from memory, and 0.85 G conversions: 0.35 to 0.45 ms. A block takes about 8,000 cycles, and a multiprocessor has
// seven blocks: 0.25 ms, so that the memory is the limit.
//
// Included by neighbors_cuda.cu only.
#pragma once

#include "neighbors/cuda_lists.cuh"

namespace scan_fast {
namespace {

constexpr int64_t kMaxFastK = 1024;  // the keys of one query's candidates must fit into shared memory
constexpr int kDecideThreads = 128, kExactThreads = 256;

// Sorts keys[0, size) in descending order, by one block. size is a power of two.
template <typename Keys>
__device__ __forceinline__ void sort_descending(Keys keys, int64_t size) {
  for (int64_t width = 2; width <= size; width *= 2) {
    for (int64_t stride = width / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int64_t low = 2 * pair - (pair & (stride - 1)), high = low + stride;
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

// Decides query i, by one block. Returns false to all threads if the candidates are not known to suffice. keys:
// max_keys in shared memory, a power of two, at least k.
__device__ __forceinline__ bool decide_query(const TopkProblem& problem, const Workspace& work, int64_t i,
                                             double margin, const Candidates& lists,
                                             const Shared<unsigned long long>& keys, int max_keys, float* similarity,
                                             int64_t* index) {
  SCAN_FAST_SHARED(float, shared_bound, 1);
  SCAN_FAST_SHARED(int, shared_count, 1);
  const int64_t k = problem.k;
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32;
  const auto count_of = [&](int s) { return lists.counts[s * lists.count_stride]; };

  if (margin < 0) {  // query with a non-finite entry
    for (int64_t rank = thread; rank < k; rank += threads) write_key(problem, similarity, index, i, rank, 0);
    return true;
  }
  if (!(margin <= DBL_MAX)) return false;
  int total = 0;
  for (int s = 0; s < lists.splits; ++s) {
    if (count_of(s) < 0) return false;
    total += count_of(s);
  }

  __syncthreads();  // the block may have decided another query before
  if (thread == 0) {
    shared_count[0] = 0;
    shared_bound[0] = -FLT_MAX;
  }
  if (total > k) {
    // Values of all lists, in the memory of the keys, if it holds them.
    const Shared<float> values = keys.as<float>();
    const bool fit = total <= 2 * max_keys;
    int first = 0;
    for (int s = 0; fit && s < lists.splits; ++s) {
      const int count = count_of(s);
      for (int e = thread; e < count; e += threads) {
        values[first + e] = __uint_as_float(lists.entries[s * lists.entry_stride + e].x);
      }
      first += count;
    }
    __syncthreads();
    if (warp == 0) {
      constexpr int kSteps = 40;
      float reached;
      if (fit) {
        reached = reached_by(k, kSteps, [&](auto visit) {
          for (int e = thread; e < total; e += 32) visit(values[e]);
        });
      } else {
        reached = reached_by(k, kSteps, [&](auto visit) {
          for (int s = 0; s < lists.splits; ++s) {
            for (int e = thread; e < count_of(s); e += 32) {
              visit(__uint_as_float(lists.entries[s * lists.entry_stride + e].x));
            }
          }
        });
      }
      if (thread == 0) shared_bound[0] = subtract_margin(reached, margin);
    }
  }
  __syncthreads();
  const float bound = shared_bound[0];
  for (int s = 0; s < lists.splits; ++s) {
    const int count = count_of(s);
    for (int e = thread; e < count; e += threads) {
      const uint2 entry = lists.entries[s * lists.entry_stride + e];
      if (!(__uint_as_float(entry.x) >= bound)) continue;
      const int slot = atomicAdd(shared_count.get(), 1);
      if (slot < max_keys) keys[slot] = entry.y;
    }
  }
  __syncthreads();
  const int found = shared_count[0];
  if (found > max_keys) return false;
  for (int first = warp * kExactRows; first < found; first += threads / 32 * kExactRows) {
    exact_keys(
        problem, work, i, found - first,
        [&](int c) {
          const unsigned long long column = keys[first + c];
          return static_cast<int64_t>(column);
        },
        [&](int c, unsigned long long key) { keys[first + c] = key; });
  }
  if (found <= threads) {
    // Keys differ, so the number of larger ones is the rank.
    __syncthreads();
    if (thread < found) {
      const unsigned long long mine = keys[thread];
      int rank = 0;
      for (int e = 0; e < found; ++e) {
        const unsigned long long other = keys[e];
        rank += other > mine;
      }
      if (rank < k) write_key(problem, similarity, index, i, rank, mine);
    }
    for (int64_t rank = found + thread; rank < k; rank += threads) write_key(problem, similarity, index, i, rank, 0);
    return true;
  }
  int size = 1;
  while (size < found || size < k) size *= 2;
  for (int e = found + thread; e < size; e += threads) keys[e] = 0ull;
  sort_descending(keys, size);
  for (int64_t rank = thread; rank < k; rank += threads) {
    const unsigned long long key = keys[rank];
    write_key(problem, similarity, index, i, rank, key);
  }
  return true;
}

// Block b decides query first_query + b from the lists of search_tiles, or passes it on to search_finely.
__global__ void __launch_bounds__(kDecideThreads)
    decide(TopkProblem problem, Workspace work, int64_t first_query, int splits, int capacity, int max_keys,
           float* __restrict__ similarity, int64_t* __restrict__ index) {
  SCAN_FAST_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x, i = first_query + row;
  const Candidates lists{work.candidates + row * splits * capacity, work.counts + row * splits, capacity, 1, splits};
  if (!decide_query(problem, work, i, work.margin[i], lists, memory.as<unsigned long long>(), max_keys, similarity,
                    index) &&
      threadIdx.x == 0) {
    work.undecided[atomicAdd(work.undecided_count, 1ull)] = static_cast<int32_t>(i);
  }
}

// Brute force for the hard queries (`all`: for every query), distributed over blocks: keys of all rows, the k-th
// largest by radix selection (keys are distinct), a sort.
__global__ void __launch_bounds__(kExactThreads)
    search_exactly(TopkProblem problem, Workspace work, bool all, int64_t sort_keys, float* __restrict__ similarity,
                   int64_t* __restrict__ index) {
  SCAN_FAST_SHARED(int, histogram, 256);
  SCAN_FAST_SHARED(unsigned long long, chosen, 1);
  SCAN_FAST_SHARED(long long, remaining, 1);
  SCAN_FAST_SHARED(int, filled, 1);
  const int thread = threadIdx.x, warp = thread / 32;
  const int64_t n = problem.n_database, k = problem.k;
  const int64_t queries = all ? problem.n_queries : static_cast<int64_t>(*work.hard_count);
  unsigned long long* keys = work.keys + static_cast<int64_t>(blockIdx.x) * (n + sort_keys);
  unsigned long long* best = keys + n;

  for (int64_t q = blockIdx.x; q < queries; q += gridDim.x) {
    const int64_t i = all ? q : work.hard[q];
    const bool usable = work.query_length[i] <= DBL_MAX;
    for (int64_t first = warp * kExactRows; first < n; first += kExactThreads / 32 * kExactRows) {
      const int count = static_cast<int>(n - first < kExactRows ? n - first : kExactRows);
      exact_keys(
          problem, work, i, count, [&](int c) { return first + c; },
          [&](int c, unsigned long long key) {
            const int64_t j = first + c;
            const bool counts = usable && work.database_length[j] <= DBL_MAX && !(problem.exclude_self && i == j);
            keys[j] = counts ? key : 0;
          });
    }
    // Find the k-th largest key, eight bits at a time from the top.
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
    const unsigned long long kth = chosen[0];  // 0 if there are fewer than k neighbours
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

__global__ void report(Workspace work, SearchedAgain* searched) {
  searched->finely = static_cast<int64_t>(*work.undecided_count);
  searched->exactly = static_cast<int64_t>(*work.hard_count);
}

}  // namespace
}  // namespace scan_fast
