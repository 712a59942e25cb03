// The neighbour search with Hopper's tile search, run on the host: the cases of the portable one, and its own.
#include "neighbors_cases.h"
#include "neighbors/sm90_schedule.cuh"

namespace {

using namespace neighbor_cases;

void many_dimensions() {
  // More than two panels: warpgroups multiply side by side. More than eight: both operands pass by. Races are looked
  // for in the schedule of warpgroups and copies.
  emu::options() = {.detect_races = true, .seed = 3};
  CHECK(search({normal(3, 129, 1), normal(270, 129, 2), 129, 5}).searched(0, 0));
  CHECK(search({normal(3, 513, 1), normal(270, 513, 2), 513, 5}).searched(0, 0));
  emu::options() = {};
  CHECK(search({{}, normal(140, 320, 3), 320, 4}).searched(0, 0));
  CHECK(search({{}, normal(270, 512, 3), 512, 4}).searched(0, 0));
  CHECK(search({normal(2, 2048, 4), normal(300, 2048, 5), 2048, 7, false}).searched(0, 0));
}

void blocks_take_turns() {
  // One block for all runs, which reuse lists and shared memory; then more shares than runs.
  for (const int processors : {1, 7}) {
    emu::options() = {.seed = 2, .multiprocessors = processors};
    CHECK(search({{}, normal(390, 70, 6), 70, 3}).searched(0, 0));
    CHECK(search({normal(260, 150, 7), normal(520, 150, 8), 150, 3, false}).searched(0, 0));
  }
}

// The batches of the searches since the last clear().
std::vector<TileBatch> batches;
void search_and_record(const TopkProblem& problem, const TopkWorkspace& work, const TileBatch& batch,
                       StreamHandle stream) {
  batches.push_back(batch);
  search_tiles_sm90(problem, work, batch, stream);
}

// A search in which, in every block of every batch, the ring of streamed panels wraps twice, and the resident operand
// is followed by `runs` - 1 others in its two buffers. Checked, so that it stays so whatever tiles, stages and plans
// become.
void wrap(int multiprocessors, const Case& c, int64_t runs, int splits, uint64_t seed, bool detect_races = false) {
  emu::options() = {.detect_races = detect_races, .seed = seed, .multiprocessors = multiprocessors};
  batches.clear();
  tile_search = search_and_record;
  CHECK(search(c).searched(0, 0));
  tile_search = search_tiles_sm90;
  TopkProblem problem{};
  problem.n_database = static_cast<int64_t>(c.database.size()) / c.dim;
  CHECK(!batches.empty());
  for (const TileBatch& batch : batches) {
    CHECK(batch.splits >= splits);
    with_products(batch, [&]<typename P>() {
      CHECK(search_blocks(batch) >= multiprocessors * 9 / 10);
      gridDim = {static_cast<unsigned>(search_blocks(batch))};
      for (blockIdx = {}; blockIdx.x < gridDim.x; ++blockIdx.x) {
        auto schedule = SearchSchedule::of_block<P::kColumns>(problem, batch);
        int64_t steps = 0, count = 0;
        for (SearchSchedule::Run run; schedule.next(run); ++count) steps += int64_t{run.end - run.begin} * batch.panels;
        CHECK(steps >= 2 * P::kStages + 1);
        CHECK(count >= runs);
      }
    });
  }
}
constexpr int64_t kThreeRounds = 2 * NarrowProducts::kBuffers + 1;
constexpr int64_t kThreeRoundsOfOne = 2 * MediumProducts::kBuffers + 1;

void rings_wrap_on_one_multiprocessor() {
  wrap(1, {{}, normal(700, 64, 1), 64, 5}, kThreeRounds, 1, 0);
  wrap(1, {normal(600, 100, 2), normal(520, 100, 3), 100, 4, false}, kThreeRounds, 1, 1);
  wrap(1, {{}, normal(400, 140, 4), 140, 5, false}, kThreeRoundsOfOne, 1, 2);
  wrap(1, {{}, normal(270, 520, 4), 520, 5, false}, 2, 1, 2);
}

void rings_wrap_on_two_multiprocessors() {
  wrap(2, {{}, normal(1280, 20, 5), 20, 3}, kThreeRounds, 1, 3);
  wrap(2, {normal(700, 256, 6), normal(700, 256, 7), 256, 3}, kThreeRoundsOfOne, 1, 4);
}

void rings_wrap_on_seven_multiprocessors() {
  wrap(7, {normal(4400, 30, 8), normal(500, 30, 9), 30, 1, false}, kThreeRounds, 1, 5);
  wrap(7, {normal(2700, 200, 10), normal(300, 200, 11), 200, 3}, kThreeRoundsOfOne, 1, 6);
}

// Few queries: the columns are divided among the multiprocessors, each of which wraps in its share.
void rings_wrap_in_shares_of_the_columns() {
  wrap(7, {normal(100, 70, 11), normal(7 * 5 * 256, 70, 12), 70, 10}, 1, 7, 7);
  wrap(7, {normal(90, 130, 13), normal(7 * 3 * 256, 130, 14), 130, 10, false}, 1, 7, 8);
}

void rings_wrap_on_a_whole_gpu() {
  wrap(132, {normal(1020, 129, 15), normal(16 * 3 * 256, 129, 16), 129, 1}, 1, 16, 9);
}

void rings_wrap_without_races() {
  wrap(1, {{}, normal(640, 20, 19), 20, 3}, kThreeRounds, 1, 11, true);
  wrap(1, {{}, normal(300, 150, 20), 150, 3}, kThreeRoundsOfOne, 1, 12, true);
  wrap(1, {normal(20, 520, 20), normal(300, 520, 21), 520, 3}, 1, 1, 13, true);
}

void undecided_queries_go_on() {
  emu::options() = {};
  CHECK(search({cluster(4, 24, 0.01, 1), cluster(1500, 24, 0.01, 2), 24, 5}).searched(4, 0));
  CHECK(search({duplicates(1, 2, 8), duplicates(1, 2500, 8), 8, 3}).searched(2, 2));
}

// The candidates do not depend on the tile search if float32 sums are exact: integers.
void same_as_portable() {
  emu::options() = {};
  const Case c{integers(150, 40, 1), integers(900, 40, 2), 40, 12};
  const Found hopper = search(c);
  tile_search = search_tiles_portable;
  const Found portable = search(c);
  tile_search = search_tiles_sm90;
  CHECK(hopper.searched(portable.again.finely, portable.again.exactly));
  CHECK(hopper.index == portable.index && hopper.similarity == portable.similarity);
}

}  // namespace

int main() {
  tile_search = search_tiles_sm90;
  RUN(odd_sizes);
  RUN(any_order_of_threads);
  RUN(ties);
  RUN(truncating_units);
  RUN(broken_rows);
  RUN(batches_of_queries);
  RUN(many_dimensions);
  RUN(blocks_take_turns);
  RUN(rings_wrap_on_one_multiprocessor);
  RUN(rings_wrap_on_two_multiprocessors);
  RUN(rings_wrap_on_seven_multiprocessors);
  RUN(rings_wrap_in_shares_of_the_columns);
  RUN(rings_wrap_on_a_whole_gpu);
  RUN(rings_wrap_without_races);
  RUN(undecided_queries_go_on);
  RUN(same_as_portable);
  return check::finish();
}
