// NT-Xent on sm_90a, run on the host: against the double oracle, and with the portable kernels' results.
#include "nt_xent_cases.h"
#include "nt_xent_rings.h"

namespace {

using namespace scan_fast;
using namespace scan_fast::nt_xent_test;

void one_tile() {
  emu::options() = {.detect_races = true};
  for (const bool both : {true, false}) {
    compare(kNTXentSM90, 3, 1, 0.5, both, true, {0, 3}, 2e-3);
    compare(kNTXentSM90, 33, 40, 0.5, both, false, {0, 33}, 3e-6);
  }
}

void several_tiles() {
  emu::options() = {.detect_races = true, .seed = 5};
  compare(kNTXentSM90, 170, 128, 0.1, true, true, {0, 170}, 2e-3);
  compare(kNTXentSM90, 150, 100, 0.1, false, true, {0, 150}, 2e-3);
  emu::options() = {.detect_races = false, .seed = 6, .multiprocessors = 2};
  compare(kNTXentSM90, 200, 64, 0.1, true, true, {0, 200}, 2e-3);
  compare(kNTXentSM90, 140, 256, 0.1, true, true, {0, 140}, 2e-3);
}

void split_operands() {
  emu::options() = {.detect_races = true, .seed = 7};
  compare(kNTXentSM90, 140, 128, 0.1, true, false, {0, 140}, 3e-6);
  emu::options() = {.detect_races = false, .seed = 8, .multiprocessors = 7};
  compare(kNTXentSM90, 150, 50, 0.0301, false, false, {0, 150}, 3e-6);
}

// Local rows against all ranks' columns.
void parts_of_the_samples() {
  emu::options() = {.detect_races = false, .seed = 2};
  for (const bool both : {true, false}) compare(kNTXentSM90, 150, 24, 0.1, both, false, {0, 1, 100, 150}, 3e-6);
}

// Exponentials of which every fourth is a polynomial, up to 128 dimensions.
void exponentials_by_polynomial() {
  emu::options() = {.detect_races = true, .seed = 13, .multiprocessors = 2};
  exact_products(kNTXentSM90, 200, 64, 0.1);
  exact_products(kNTXentSM90, 70, 16, 0.5);
  for (const int64_t row : {0, 3, 149}) nan_row(kNTXentSM90, 150, 20, 0.1, row);
}

// Samples that nobody handles, with zeros for the gradient, loss and lse of their anchors.
void queue_of_negatives() {
  emu::options() = {.detect_races = true, .seed = 11};
  for (const bool both : {true, false}) {
    compare(kNTXentSM90, 150, 40, 0.1, both, true, {0, 40}, 2e-3);
    compare(kNTXentSM90, 150, 128, 0.0301, both, false, {0, 20, 33}, 3e-6);
    compare(kNTXentSM90, 140, 200, 0.1, both, true, {0, 30}, 2e-3);
  }
}

void repeated_runs_give_the_same_bits() {
  const int64_t n = 150, d = 40;
  const NTXentProblem problem{n, d, 0.1, true, 0, n};
  check::Random random{9};
  std::vector<float> z0(n * d), z1(n * d), upstream(2 * n, 1.0f);
  for (float& x : z0) x = static_cast<float>(random.normal());
  for (float& x : z1) x = static_cast<float>(random.normal());
  std::vector<float> first;
  for (const uint64_t seed : {0, 1, 2}) {
    emu::options() = {.detect_races = false, .seed = seed};  // permutes blocks and threads, delays copies
    std::vector<float> losses(2 * n), lse(2 * n), unit(2 * n * d), inv_norm(2 * n), out(2 * n * d);
    const Buffer forward(nt_xent_forward_sm90_workspace(problem, true));
    nt_xent_forward_sm90(problem, z0.data(), z1.data(), DType::kFloat32, true, losses.data(), lse.data(), unit.data(),
                         inv_norm.data(), forward.aligned, nullptr);
    const Buffer backward(nt_xent_backward_sm90_workspace(problem, true));
    nt_xent_backward_sm90(problem, unit.data(), inv_norm.data(), losses.data(), lse.data(), {upstream.data(), 1},
                          DType::kFloat32, true, out.data(), out.data() + n * d, backward.aligned, nullptr);
    out.insert(out.end(), losses.begin(), losses.end());
    if (first.empty()) first = out;
    CHECK(out == first);
  }
}

// One problem large enough for every ring to wrap twice in every block, on a machine of so many multiprocessors;
// checked, so that it stays so whatever the tiles and stages become.
struct Wrapping {
  int multiprocessors;
  int64_t n, d;
  bool both, reduced;
  std::vector<int64_t> cuts;
  int64_t every = 1;                                // see compare
  int64_t runs = 2 * NarrowProducts::kBuffers + 1;  // operands that stay one after the other in one block: three rounds
  int64_t splits = 1;                               // of the backward pass, at least
};

void wrap(const Wrapping& c, uint64_t seed, bool detect_races = false) {
  emu::options() = {.detect_races = detect_races, .seed = seed, .multiprocessors = c.multiprocessors};
  for (size_t part = 0; part + 1 < c.cuts.size(); ++part) {
    const NTXentProblem problem{c.n, c.d, 0.1, c.both, c.cuts[part], c.cuts[part + 1] - c.cuts[part]};
    const Rings forward = forward_rings(problem, c.reduced), backward = backward_rings(problem, c.reduced);
    CHECK(forward.wrap_twice() && forward.least_tiles >= 2 && forward.blocks == c.multiprocessors);
    CHECK(forward.most_runs >= c.runs);
    CHECK(backward.wrap_twice() && backward.splits >= c.splits);
  }
  compare(kNTXentSM90, c.n, c.d, 0.1, c.both, c.reduced, c.cuts, c.reduced ? 2e-3 : 3e-6, c.every);
}

void rings_wrap_on_one_multiprocessor() {
  wrap({1, 576, 64, true, true, {0, 576}}, 0);
  wrap({1, 640, 100, false, true, {0, 640}}, 1);
  wrap({1, 576, 256, true, true, {0, 576}, 3}, 11);
  wrap({1, 576, 64, true, false, {0, 576}}, 2);
  wrap({1, 620, 20, true, true, {0, 300, 620}}, 10);
}

void rings_wrap_on_two_multiprocessors() {
  wrap({2, 704, 128, true, true, {0, 704}}, 3);
  wrap({2, 1000, 33, false, false, {0, 1000}, 3}, 4);
}

void rings_wrap_on_seven_multiprocessors() {
  wrap({7, 520, 130, true, true, {0, 520}, 3, 3}, 5);  // 3 panels forward, 4 backward
  wrap({7, 520, 100, true, false, {0, 520}, 3, 3}, 6);
}

// The columns divided, and the rings wrap in every part.
void rings_wrap_in_parts_of_the_columns() { wrap({10, 620, 128, true, false, {0, 310, 620}, 1, 2, 2}, 7); }

// As on an H100. The operand that stays changes once in a block: more would take 4,000 rows.
void rings_wrap_on_a_whole_gpu() { wrap({132, 1736, 200, true, true, {0, 1736}, 13, 2, 4}, 8); }

void rings_wrap_without_races() { wrap({1, 576, 20, true, true, {0, 576}, 5}, 9, true); }

// More outer tiles than one launch has slots for: the sums so far are kept between launches.
void several_launches() {
  emu::options() = {.seed = 3, .multiprocessors = 2};
  const struct Restored {
    int64_t usual = max_transposed_slots;
    ~Restored() { max_transposed_slots = usual; }
  } restored;
  max_transposed_slots = 2;
  for (const bool both : {true, false}) {
    const NTXentProblem problem{330, 40, 0.1, both, 0, 330};
    CHECK(forward_rings(problem, true).launches == (both ? 3 : 2));
    compare(kNTXentSM90, 330, 40, 0.1, both, true, {0, 330}, 2e-3);
    compare(kNTXentSM90, 330, 40, 0.1, both, false, {0, 130, 330}, 3e-6);
  }
}

// More than 256 dimensions, or 128 split: W is stored, for 128 rows at a time and in parts of the columns. `stages`
// says which main loop is meant: the one with a resident operand of up to 512 dimensions (256 split), or the one
// without.
struct Wide {
  int64_t n, d;
  bool both, reduced;
  std::vector<int64_t> cuts;
  int stages;
  int64_t splits = 1;  // at least
};

void wide(const Wide& c, uint64_t seed, int multiprocessors, bool detect_races = false) {
  emu::options() = {.detect_races = detect_races, .seed = seed, .multiprocessors = multiprocessors};
  const struct Restored {
    int64_t usual = max_weight_bytes;
    ~Restored() { max_weight_bytes = usual; }
  } restored;
  max_weight_bytes = 1;
  const NTXentProblem problem{c.n, c.d, 0.1, c.both, 0, c.cuts[1]};
  CHECK(nt_xent_sm90_covers(problem, c.reduced) && forward_rings(problem, c.reduced).stages == c.stages);
  const BackwardPlan plan(problem, c.reduced);
  CHECK(!plan.narrow && plan.chunk == std::min<int64_t>(kPanelRows, plan.rows) && plan.p.splits >= c.splits);
  compare(kNTXentSM90, c.n, c.d, 0.1, c.both, c.reduced, c.cuts, c.reduced ? 2e-3 : 3e-6, 3);
}

void many_dimensions() {
  wide({140, 300, true, true, {0, 140}, LargeProducts<Resident::kColumns, false>::kStages}, 1, 2, true);
  wide({130, 512, false, true, {0, 60, 130}, LargeProducts<Resident::kColumns, false>::kStages}, 2, 3);
  wide({66, 577, true, true, {0, 66}, StreamedProducts<false>::kStages}, 3, 1, true);
  wide({40, 1024, false, true, {0, 40}, StreamedProducts<false>::kStages}, 4, 1);
  // Four column tiles, divided.
  wide({250, 264, true, true, {0, 250}, LargeProducts<Resident::kColumns, false>::kStages, 2}, 5, 12);
}

void many_split_dimensions() {
  wide({140, 130, true, false, {0, 140}, LargeProducts<Resident::kColumns, true>::kStages}, 6, 2, true);
  wide({100, 256, false, false, {0, 30, 100}, LargeProducts<Resident::kColumns, true>::kStages}, 7, 3);
  wide({66, 260, true, false, {0, 66}, StreamedProducts<true>::kStages}, 8, 1, true);
  wide({250, 129, true, false, {0, 250}, LargeProducts<Resident::kColumns, true>::kStages, 2}, 9, 12);
}

// W of all rows at once.
void many_dimensions_in_one_piece() {
  emu::options() = {.seed = 10, .multiprocessors = 3};
  compare(kNTXentSM90, 200, 320, 0.1, true, true, {0, 200}, 2e-3, 3);
  compare(kNTXentSM90, 150, 200, 0.1, true, false, {0, 150}, 3e-6, 3);
}

// Sizes that sm90_plan.cuh gives for 132 multiprocessors; benchmarks use them on a GPU.
void sizes_that_wrap_on_a_gpu() {
  emu::options() = {.multiprocessors = 132};
  struct Size {
    int64_t dim, forward, backward, example;
    bool reduced;
  };
  const Size sizes[] = {{64, 4225, 2113, 4352, true},  {128, 3073, 2113, 4096, true}, {192, 1985, 1409, 2048, true},
                        {256, 1729, 1409, 2048, true}, {64, 2497, 1409, 2560, false}, {128, 1729, 1409, 2048, false}};
  for (const Size& size : sizes) {
    const auto problem = [&](int64_t n) { return NTXentProblem{n, size.dim, 0.1, true, 0, n}; };
    CHECK(forward_rings(problem(size.forward), size.reduced).wrap_twice());
    CHECK(!forward_rings(problem(size.forward - 1), size.reduced).wrap_twice());
    CHECK(backward_rings(problem(size.backward), size.reduced).wrap_twice());
    CHECK(!backward_rings(problem(size.backward - 1), size.reduced).wrap_twice());
    const Rings forward = forward_rings(problem(size.example), size.reduced);
    CHECK(forward.wrap_twice() && forward.most_runs >= 3 && forward.launches == 1);
    CHECK(backward_rings(problem(size.example), size.reduced).wrap_twice());
  }
  for (const int64_t dim : {512, 1024}) {
    for (const bool reduced : {true, false}) {
      const NTXentProblem problem{2048, dim, 0.1, true, 0, 2048};
      CHECK(forward_rings(problem, reduced).wrap_twice());
      const BackwardPlan plan(problem, reduced);
      const StoredWeights stored = plan.stored(0);
      CHECK(int64_t{stored.row_tiles()} * stored.column_tiles / 132 * plan.panels >= 2 * 6 + 1);
      CHECK(stored.split_panels() >= 2 * GatherProducts<true>::kStages + 1);
    }
  }
  CHECK(forward_rings({9000, 128, 0.1, true, 0, 9000}, true).launches == 2);
}

// Each part of the columns is a part of dZ to write and to read, which pays only if multiprocessors would be idle.
void columns_are_divided_where_it_pays() {
  emu::options() = {.multiprocessors = 132};
  const auto splits = [](int64_t samples, int64_t handled) {
    return BackwardPlan({samples, 128, 0.1, true, 0, handled}, true).p.splits;
  };
  for (const int64_t samples : {8192, 32768, 65536}) CHECK(splits(samples, samples) == 1);
  CHECK(splits(4096, 4096) == 2 && splits(1024, 1024) >= 4);
  CHECK(splits(32768, 128) == 16);  // a rank of many
  CHECK(splits(32, 32) == 1);       // one tile
}

void covers_what_fits() {
  const auto covers = [](int64_t dim, double temperature, bool reduced) {
    return nt_xent_sm90_covers({10, dim, temperature, true, 0, 10}, reduced);
  };
  CHECK(covers(128, 0.1, true) && covers(1024, 0.1, false) && covers(1024, 0.03, true));
  CHECK(!covers(1025, 0.1, false) && !covers(1025, 0.1, true) && !covers(128, 0.02, true));
}

}  // namespace

int main() {
  RUN(one_tile);
  RUN(several_tiles);
  RUN(split_operands);
  RUN(parts_of_the_samples);
  RUN(queue_of_negatives);
  RUN(repeated_runs_give_the_same_bits);
  RUN(exponentials_by_polynomial);
  RUN(covers_what_fits);
  RUN(columns_are_divided_where_it_pays);
  RUN(sizes_that_wrap_on_a_gpu);
  RUN(many_dimensions);
  RUN(many_split_dimensions);
  RUN(many_dimensions_in_one_piece);
  RUN(several_launches);
  RUN(rings_wrap_on_one_multiprocessor);
  RUN(rings_wrap_on_two_multiprocessors);
  RUN(rings_wrap_on_seven_multiprocessors);
  RUN(rings_wrap_in_parts_of_the_columns);
  RUN(rings_wrap_on_a_whole_gpu);
  RUN(rings_wrap_without_races);
  return check::finish();
}
