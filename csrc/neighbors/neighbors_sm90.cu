// First search of the GPU neighbour search on Hopper. Compiled for sm_90a only.
//
// Operands, lists, and all steps before and after this search are those of neighbors_cuda.cu, which calls
// search_tiles_sm90 instead of its own search_tiles: the same products, bounds and guarantees. Tiles are 128 x 256,
// computed by the main loop of common/tile_products.cuh. Persistent blocks take work items (128 queries, column split)
// round-robin, so that concurrent blocks read the same columns from the L2 cache.
//
//   up to 128 dimensions   the queries stay in shared memory, two buffers of 32 KB; columns stream through 4 stages
//                          of 32 KB; ping-pong: one warpgroup multiplies while the other filters
//   more                   both operands stream through 4 stages of 48 KB; copies continue while the warpgroups filter
//
// The filter is the epilogue on the accumulators. Each warp has 16 of a warpgroup's 64 rows, and the 256 columns of a
// row are in four lanes, 64 each. So a list belongs to one warp, and its threshold needs no barrier but __syncwarp. Per
// tile, a thread compares the maxima of two rows, 64 values each, with their thresholds (about one instruction per
// value). Candidates are entered, and lists over their limit are tightened, as in cuda_lists.cuh. The query itself is
// excluded by index, padding by column < n.
//
// Limit: 2 Q N D flops at the float16 rate. 128 accumulators per thread, 240 registers.
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row(2 * half);
      lists.template enter<P::kColumns / 8>(
          problem, work.database_length, row, query_of(run, row), [&](int r) { return list_of(run, r); },
          moving * P::kColumns + accumulator_column(0),
          [&](int column8, int e) { return c[4 * column8 + 2 * half + e]; });
    }
    __syncwarp();  // all candidates of the tile are entered
    lists.template make_room<16>(
        first_row, 1, [&](int row) { return list_of(run, row); },
        [&](int row) { return work.margin[query_of(run, row)]; });
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
