// Division of the M x M similarities into tiles for the CPU kernel. Index arithmetic only, shared with its tests.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "nt_xent/nt_xent.h"

namespace scan_fast {

// Consecutive rows of [z0; z1] of one view, either all or none of which are handled by this call.
struct RowBlock {
  int64_t begin;  // first row, in [0, 2N)
  int64_t size;
  int64_t local;   // first row's index among the handled rows (view * sample_count + sample - begin), or -1
  int64_t anchor;  // first row's index among this call's anchors, or -1
};

// Divides all rows into blocks of at most `target` rows, of nearly equal size within each segment. If a `unit` is given,
// all blocks of a segment but the last have a multiple of it; it must divide the target.
inline std::vector<RowBlock> make_row_blocks(const NTXentProblem& problem, int64_t target, int64_t unit = 1) {
  std::vector<RowBlock> blocks;
  const int64_t cuts[4] = {0, problem.sample_begin, problem.sample_begin + problem.sample_count, problem.samples};
  for (int64_t view = 0; view < 2; ++view) {
    for (int segment = 0; segment < 3; ++segment) {
      const int64_t rows = cuts[segment + 1] - cuts[segment];
      const int64_t count = (rows + target - 1) / target;
      const int64_t whole = count == 0 ? 0 : ((rows + count - 1) / count + unit - 1) / unit * unit;
      for (int64_t b = 0; b < count; ++b) {
        const int64_t first = unit == 1 ? rows * b / count : whole * b;
        const int64_t last = unit == 1 ? rows * (b + 1) / count : first + whole < rows ? first + whole : rows;
        if (first >= last) break;
        const int64_t local = segment == 1 ? view * problem.sample_count + first : -1;
        const bool anchors = segment == 1 && (view == 0 || problem.both_anchors);
        blocks.push_back({view * problem.samples + cuts[segment] + first, last - first, local, anchors ? local : -1});
      }
    }
  }
  return blocks;
}

// Anchor block `row` against the blocks [column_begin, column_end). With `symmetric` the columns are anchors too, and
// each exponential is added to the sum of its row and of its column.
struct ForwardTask {
  int64_t row, column_begin, column_end;
  bool symmetric;
};

// Covers each pair of an anchor and any row by exactly one task; among anchors, the upper triangle only.
inline std::vector<ForwardTask> make_forward_tasks(const std::vector<RowBlock>& blocks, int64_t max_columns) {
  const int64_t count = static_cast<int64_t>(blocks.size());
  std::vector<ForwardTask> tasks;
  for (int64_t i = 0; i < count; ++i) {
    if (blocks[i].anchor < 0) continue;
    tasks.push_back({i, i, i + 1, false});
    for (int64_t j = 0; j < count;) {
      const bool anchors = blocks[j].anchor >= 0;
      if (anchors && j <= i) {
        ++j;
        continue;
      }
      int64_t end = j + 1, columns = blocks[j].size;
      while (end < count && columns + blocks[end].size <= max_columns && (blocks[end].anchor >= 0) == anchors &&
             (!anchors || blocks[end].anchor == blocks[end - 1].anchor + blocks[end - 1].size)) {
        columns += blocks[end++].size;
      }
      tasks.push_back({i, j, end, anchors});
      j = end;
    }
  }
  return tasks;
}

// Round `round` of a round-robin tournament of `players` (the circle method): over all rounds each pair meets once, and
// in one round no player appears twice. So tasks of one round may add to the gradients of both players at the same
// time. The order of additions to each gradient depends only on the number of players.
inline int64_t tournament_rounds(int64_t players) { return players < 2 ? 0 : players - 1 + players % 2; }

inline std::vector<std::pair<int64_t, int64_t>> tournament_round(int64_t players, int64_t round) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  const int64_t circle = tournament_rounds(players);  // odd; player number `circle` is the centre of the circle
  if (circle < players) pairs.emplace_back(round, circle);
  for (int64_t k = 1; k <= (circle - 1) / 2; ++k) {
    const int64_t x = (round + k) % circle, y = (round + circle - k) % circle;
    pairs.emplace_back(x < y ? x : y, x < y ? y : x);
  }
  return pairs;
}

}  // namespace scan_fast
