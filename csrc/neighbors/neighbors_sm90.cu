// First search of the GPU neighbour search on Hopper. Compiled for sm_90a only.
//
// Operands, lists, and all steps before and after this search are those of neighbors_cuda.cu, which calls
// search_tiles_sm90 instead of its own search_tiles: the same products, bounds and guarantees. Tiles are 128 x 256,
// computed by the main loop of common/tile_products.cuh. Persistent blocks take work items (128 queries, column split)
// round-robin, so that concurrent blocks read the same columns from the L2 cache.
//
//   up to 128 dimensions   the queries stay in shared memory, two buffers of 32 KB; columns stream through 4 stages
//                          of 32 KB; ping-pong: one warpgroup multiplies while the other filters
//   up to 512              the queries stay in shared memory, one buffer of 128 KB; columns stream through 3 stages of
//                          32 KB; copies continue while the warpgroups filter
//   more                   both operands stream through 4 stages of 48 KB; the same
//
// The filter is the epilogue on the accumulators. Each warp has 16 of a warpgroup's 64 rows, and the 256 columns of a
// row are in four lanes, 64 each. So a list belongs to one warp, and its threshold needs no barrier but __syncwarp. Per
// tile, a thread compares the maxima of two rows, 64 values each, with their thresholds (about one instruction per
// value). Candidates are entered, and lists over their limit are tightened, as in cuda_lists.cuh. The query itself is
// excluded by index, padding and broken rows by their NaN.
//
// Limit: 2 Q N D flops at the float16 rate. Resident queries save a third of the bytes from L2: 32 KB per 64 dimensions
// of a tile, 0.74 us at the full rate, are 5.8 TB/s over 132 multiprocessors. With both operands they would be 8.7,
// more than L2 is known to give. 128 accumulators per thread, 240 registers.
//
// Prediction for a self-search of N x 512, k = 20, on an H200: a tile takes 5.9 us of products and 0.6 us of filter.
// 50,000 rows are 3 runs of 196 tiles per block, 3.9 ms; the start of each run (queries, first threshold, lists that
// double every few tiles) is 0.1 ms more. 20,000 rows are 5 runs of 20 tiles, 0.65 ms and 0.2 ms for the starts.
#include "neighbors/cuda_lists.cuh"
#include "neighbors/sm90_schedule.cuh"

namespace scan_fast {
namespace {

template <typename P>
struct Filter {
  const TopkProblem& problem;
  const Workspace& work;
  const TileBatch& batch;
  RowLists<P::kColumns> lists;
  int first_row;  // first of the 16 rows of this warp

  __device__ __forceinline__ uint2* list_of(const SearchSchedule::Run& run, int row) const {
    const int64_t place = static_cast<int64_t>(run.fixed) * kPanelRows + row;
    return work.candidates + (place * batch.splits + run.split) * batch.capacity;
  }
  __device__ __forceinline__ int query_of(const SearchSchedule::Run& run, int row) const {
    return static_cast<int>(batch.first_query) + run.fixed * kPanelRows + row;
  }

  __device__ __forceinline__ void begin(const SearchSchedule::Run& run) const {
    const int lane = threadIdx.x % 32;
    if (lane < 16) {
      const int row = first_row + lane;
      const bool exists = static_cast<int64_t>(run.fixed) * kPanelRows + row < batch.queries;
      lists.open(row, exists ? work.margin[query_of(run, row)] : -1.0);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void tile(float (&c)[P::kColumns / 2], const SearchSchedule::Run& run, int moving) const {
    const auto margin_of = [&](int row) { return work.margin[query_of(run, row)]; };
    if (moving == run.begin) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lists.template warm_up<P::kColumns / 8>(problem, tile_row(2 * half), margin_of,
                                                [&](int column8, int e) { return c[4 * column8 + 2 * half + e]; });
      }
      __syncwarp();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row(2 * half);
      lists.template enter<P::kColumns / 8>(
          problem, row, query_of(run, row), [&](int r) { return list_of(run, r); },
          moving * P::kColumns + accumulator_column(0),
          [&](int column8, int e) { return c[4 * column8 + 2 * half + e]; });
    }
    __syncwarp();  // all candidates of the tile are entered
    lists.template make_room<16>(first_row, 1, [&](int row) { return list_of(run, row); }, margin_of);
    __syncwarp();  // publishes the thresholds for the next tile
  }

  __device__ __forceinline__ void end(const SearchSchedule::Run& run) const {
    const int lane = threadIdx.x % 32;
    const int64_t place = static_cast<int64_t>(run.fixed) * kPanelRows + first_row + lane;
    if (lane < 16 && place < batch.queries)
      work.counts[place * batch.splits + run.split] = lists.count[first_row + lane];
    __syncwarp();  // before the next run opens its lists
  }
};

template <typename P>
__global__ void __launch_bounds__(kProductThreads, 1)
    search_tiles_sm90_kernel(TopkProblem problem, Workspace work, TileBatch batch) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  SCAN_FAST_SHARED(float, threshold, kPanelRows);
  SCAN_FAST_SHARED(int, count, kPanelRows);
  SCAN_FAST_SHARED(int, limit, kPanelRows);
  const SearchSchedule schedule = SearchSchedule::of_block<P::kColumns>(problem, batch);
  Filter<P> filter{problem,
                   work,
                   batch,
                   {threshold, count, limit, static_cast<int>(problem.k), batch.capacity},
                   static_cast<int>(threadIdx.x) / 32 * 16 - 64};
  const half_t* const queries = work.query_rounded + batch.first_query / kPanelRows * batch.panels * kPanelElements;
  multiply_tiles<P>(aligned_to_panels(dynamic), PackedOperand<half_t>{queries, batch.panels},
                    PackedOperand<half_t>{work.database_rounded, batch.panels}, schedule, filter);
}

template <typename P>
void search_with(const TopkProblem& problem, const TopkWorkspace& work, const TileBatch& batch, StreamHandle stream) {
  launch(search_tiles_sm90_kernel<P>, dim3(static_cast<unsigned>(search_blocks(batch))), dim3(kProductThreads),
         P::kSharedBytes + 1024, stream, problem, work, batch);
}

}  // namespace

bool search_tiles_sm90_runs_here() { return compute_capability() == 90; }

void search_tiles_sm90(const TopkProblem& problem, const TopkWorkspace& work, const TileBatch& batch,
                       StreamHandle stream) {
  with_products(batch, [&]<typename P>() { search_with<P>(problem, work, batch, stream); });
}

}  // namespace scan_fast
