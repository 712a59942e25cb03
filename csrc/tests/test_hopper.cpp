// The sm_90a part of the device layer in its host form, and the main loop on it.
#include <algorithm>

#include "check.h"
#include "common/device.h"
#include "common/panels.h"
#include "hopper_kernels.h"

namespace {

using namespace scan_fast;
using namespace scan_fast::hopper_test;

// A packed matrix and its values. With `split`, panels of hi are followed by those of lo.
template <typename T>
struct Packed {
  std::vector<T> storage;
  T* values;
  std::vector<double> exact;
  Packed(int64_t rows, int64_t panels, bool split, uint64_t seed) : exact(rows * panels * kPanelDims) {
    check::Random random{seed};
    const int64_t stored = split ? 2 * panels : panels;
    storage.resize(packed_size(rows, stored) + 64);
    values = storage.data();
    while (reinterpret_cast<uintptr_t>(values) % 128 != 0) ++values;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < panels * kPanelDims; ++k) {
        const float x = static_cast<float>(random.normal());
        const T hi = from_float<T>(x);
        values[panel_at(i, k, stored)] = hi;
        if (split) values[panel_at(i, k + panels * kPanelDims, stored)] = from_float<T>(x - to_float(hi));
        exact[i * panels * kPanelDims + k] = split ? x : to_float(hi);
      }
    }
  }
};

double dot(const std::vector<double>& a, int64_t i, const std::vector<double>& b, int64_t j, int64_t dim) {
  double sum = 0;
  for (int64_t k = 0; k < dim; ++k) sum += a[i * dim + k] * b[j * dim + k];
  return sum;
}

void panels_hold_every_element_once() {
  for (const int64_t panels : {1, 3}) {
    const int64_t rows = 300, dim = panels * kPanelDims;
    std::vector<int> used(packed_size(rows, panels), 0);
    for (int64_t i = 0; i < row_tiles(rows) * kPanelRows; ++i) {
      for (int64_t k = 0; k < dim; ++k) ++used[panel_at(i, k, panels)];
    }
    CHECK(std::all_of(used.begin(), used.end(), [](int count) { return count == 1; }));
  }
}

template <typename T>
void chained(DType dtype) {
  emu::options() = {.detect_races = true};
  const Packed<T> a(128, 1, false, 1), b(128, 1, false, 2);
  std::vector<float> out(64 * 64, NAN), out2(64 * 64, NAN);
  chained_products(dtype, a.values, b.values, out.data(), out2.data(), Fault::kNone);
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 64; ++j) CHECK_NEAR(out[i * 64 + j], dot(a.exact, i, b.exact, j, 64), 1e-4);
    for (int k = 0; k < 64; ++k) {
      double expected = 0;
      for (int j = 0; j < 64; ++j) expected += to_float(from_float<T>(out[i * 64 + j])) * b.exact[j * 64 + k];
      CHECK_NEAR(out2[i * 64 + k], expected, 1e-3);
    }
  }
}
void chained_half() { chained<half_t>(DType::kFloat16); }
void chained_bf16() { chained<bf16_t>(DType::kBFloat16); }

void faults_are_reported() {
  emu::options() = {.detect_races = true};
  const Packed<half_t> a(128, 1, false, 1), b(128, 1, false, 2);
  std::vector<float> out(64 * 64), out2(64 * 64);
  const auto with = [&](Fault fault) {
    chained_products(DType::kFloat16, a.values, b.values, out.data(), out2.data(), fault);
  };
  CHECK_THROWS(with(Fault::kNoDataWait), "race");
  CHECK_THROWS(with(Fault::kNoFence), "needs a wgmma_fence");
  CHECK_THROWS(with(Fault::kEarlyRelease), "changed before its wait");
  CHECK_THROWS(with(Fault::kWrittenInFlight), "written before its wait");
  CHECK_THROWS(with(Fault::kNotWaitedFor), "before its products were waited for");
  CHECK_THROWS(with(Fault::kNoResultWait), "changed before its wait");
  // Without the race detector, the content of the memory shows the error.
  emu::options() = {};
  CHECK_THROWS(with(Fault::kNoDataWait), "more arrivals at an mbarrier");
  with(Fault::kNone);
  CHECK(!std::isnan(out2[0]));
}

template <typename T>
void compare(Mode mode, DType dtype, int width, int panels, int row_count, int column_count) {
  const bool split = mode == Mode::kSplitRows || mode == Mode::kSplitColumns;
  const int64_t rows = 128 * row_count, columns = static_cast<int64_t>(width) * column_count, dim = 64 * panels;
  const Packed<T> a(rows, panels, split, 3), b(columns, panels, split, 4);
  std::vector<float> out(rows * columns, NAN);
  tile_products(mode, dtype, width, a.values, b.values, panels, row_count, column_count, out.data());
  for (int64_t i = 0; i < rows; i += 7) {
    for (int64_t j = 0; j < columns; j += 5) CHECK_NEAR(out[i * columns + j], dot(a.exact, i, b.exact, j, dim), 2e-4);
  }
}

void the_main_loop_multiplies() {
  emu::options() = {.detect_races = true};
  compare<half_t>(Mode::kRows, DType::kFloat16, 128, 2, 3, 3);
  emu::options() = {.detect_races = false, .seed = 3};
  compare<half_t>(Mode::kNone, DType::kFloat16, 128, 5, 1, 3);
  compare<half_t>(Mode::kNone, DType::kFloat16, 256, 1, 2, 1);
  compare<half_t>(Mode::kRows, DType::kFloat16, 256, 1, 1, 3);
  compare<half_t>(Mode::kColumns, DType::kFloat16, 128, 1, 3, 2);
  compare<half_t>(Mode::kColumns, DType::kFloat16, 256, 1, 2, 1);
  compare<bf16_t>(Mode::kColumns, DType::kBFloat16, 128, 2, 1, 1);
}

void the_main_loop_multiplies_split_operands() {
  emu::options() = {.detect_races = true, .seed = 9};
  compare<half_t>(Mode::kSplitRows, DType::kFloat16, 128, 2, 1, 2);
  compare<half_t>(Mode::kSplitColumns, DType::kFloat16, 128, 1, 3, 1);
}

}  // namespace

int main() {
  RUN(panels_hold_every_element_once);
  RUN(chained_half);
  RUN(chained_bf16);
  RUN(faults_are_reported);
  RUN(the_main_loop_multiplies);
  RUN(the_main_loop_multiplies_split_operands);
  return check::finish();
}
