// The neighbour search with Hopper's tile search, run on the host: the cases of the portable one, and its own.
#include "neighbors_cases.h"

namespace {

using namespace neighbor_cases;

void many_dimensions() {
  // More than two panels: both operands pass by. Races are looked for in the schedule of warpgroups and copies.
  emu::options() = {.detect_races = true, .seed = 3};
  CHECK(search({normal(3, 129, 1), normal(270, 129, 2), 129, 5}).searched(0, 0));
  emu::options() = {};
  CHECK(search({{}, normal(140, 320, 3), 320, 4}).searched(0, 0));
  CHECK(search({normal(2, 2048, 4), normal(300, 2048, 5), 2048, 7, false}).searched(0, 0));
}

void blocks_take_turns() {
  // One block for all: runs follow each other, lists and shared memory are used anew; then more shares than runs.
  for (const int processors : {1, 7}) {
    emu::options() = {.seed = 2, .multiprocessors = processors};
    CHECK(search({{}, normal(390, 70, 6), 70, 3}).searched(0, 0));
    CHECK(search({normal(260, 150, 7), normal(520, 150, 8), 150, 3, false}).searched(0, 0));
  }
}

void undecided_queries_go_on() {
  emu::options() = {};
  CHECK(search({cluster(4, 24, 0.01, 1), cluster(1500, 24, 0.01, 2), 24, 5}).searched(4, 0));
  CHECK(search({duplicates(1, 2, 8), duplicates(1, 2500, 8), 8, 3}).searched(2, 2));
}

// Which candidates there are does not depend on the tile search where float32 sums are exact: integers.
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
  RUN(undecided_queries_go_on);
  RUN(same_as_portable);
  return check::finish();
}
