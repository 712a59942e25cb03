// CPU driver of the augment family: tabulates the filters that a batch needs and distributes the images over threads.
//
// A filter depends only on the length of the box, so each length that occurs is tabulated once per call. Images are
// independent of each other: neither the number of threads nor the rest of the batch changes a bit.
#include <algorithm>
#include <vector>

#include "augment/augment_cpu_kernel.h"
#include "augment/pixel.h"
#include "common/parallel.h"

namespace scan_fast {
namespace {

// Pixels per task: tens of microseconds of work at the smallest sizes.
constexpr int64_t kPixelsPerTask = 4096;

// Filters of every box length in the batch, forward and mirrored.
class Filters {
 public:
  explicit Filters(const ViewBatch& batch)
      : side_(batch.side), forward_(static_cast<size_t>(longest(batch)) + 1), mirrored_(forward_) {
    const int64_t words = recipe_words(batch.steps);
    for (int64_t i = 0; i < batch.count; ++i) {
      const int32_t* recipe = batch.recipes + i * words;
      add_filter(forward_, recipe[2], false);
      add_filter(recipe[4] ? mirrored_ : forward_, recipe[3], recipe[4] != 0);
    }
  }

  AxisTaps of(int64_t length, bool mirrored) const {
    if (length == side_) return {};
    const Filter& filter = (mirrored ? mirrored_ : forward_)[static_cast<size_t>(length)];
    const int32_t* first = filter.data.data();
    const int64_t padded = padded_side();
    return {first, first + padded, first + 2 * padded, filter.taps, padded};
  }

  int64_t most() const { return most_; }

 private:
  struct Filter {
    int64_t taps = 0;
    std::vector<int32_t> data;  // first, number, weights
  };

  static int64_t longest(const ViewBatch& batch) { return std::max(batch.height, batch.width); }
  int64_t padded_side() const { return (side_ + kTapPadding - 1) / kTapPadding * kTapPadding; }

  void add_filter(std::vector<Filter>& filters, int64_t length, bool mirrored) {
    Filter& filter = filters[static_cast<size_t>(length)];
    if (length == side_ || filter.taps > 0) return;
    const int64_t padded = padded_side();
    for (int64_t j = 0; j < side_; ++j) filter.taps = std::max<int64_t>(filter.taps, range(j, length, mirrored).count);
    filter.data.assign(static_cast<size_t>(padded * (2 + filter.taps)), 0);
    for (int64_t j = 0; j < side_; ++j) {
      const TapRange taps = range(j, length, mirrored);
      const double sum = tap_sum(taps);
      filter.data[static_cast<size_t>(j)] = taps.first;
      filter.data[static_cast<size_t>(padded + j)] = taps.count;
      for (int t = 0; t < taps.count; ++t) {
        filter.data[static_cast<size_t>((2 + t) * padded + j)] = fixed_tap(taps, t, sum);
      }
    }
    most_ = std::max(most_, filter.taps);
  }

  TapRange range(int64_t j, int64_t length, bool mirrored) const {
    return tap_range(static_cast<int>(mirrored ? side_ - 1 - j : j), static_cast<int>(length), static_cast<int>(side_));
  }

  int64_t side_, most_ = 1;
  std::vector<Filter> forward_, mirrored_;
};

}  // namespace

void augment_cpu(const ViewBatch& batch) {
  const Filters filters(batch);
  const auto render = SCAN_FAST_BEST_ISA(render_view);
  const int64_t words = recipe_words(batch.steps);
  const int64_t per_task = std::max<int64_t>(1, kPixelsPerTask / (batch.side * batch.side));
  const ViewScratch at = view_scratch(batch.height, batch.width, batch.side, filters.most());
  std::vector<unsigned char> scratch(static_cast<size_t>(at.bytes) * static_cast<size_t>(max_threads()));
  parallel_for((batch.count + per_task - 1) / per_task, [&](int64_t task, int thread) {
    const int64_t end = std::min(batch.count, (task + 1) * per_task);
    for (int64_t i = task * per_task; i < end; ++i) {
      const int32_t* recipe = batch.recipes + i * words;
      render(batch, i, filters.of(recipe[3], recipe[4] != 0), filters.of(recipe[2], false), at,
             scratch.data() + thread * at.bytes);
    }
  });
}

}  // namespace scan_fast
