// NT-Xent on sm_90a, run on the host: against the double oracle, and with the portable kernels' results.
#include "nt_xent_cases.h"

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

void covers_what_fits() {
  const auto covers = [](int64_t dim, double temperature, bool reduced) {
    return nt_xent_sm90_covers({10, dim, temperature, true, 0, 10}, reduced);
  };
  CHECK(covers(128, 0.1, true) && covers(128, 0.1, false) && covers(256, 0.03, true));
  CHECK(!covers(129, 0.1, false) && !covers(257, 0.1, true) && !covers(128, 0.02, true));
}

}  // namespace

int main() {
  RUN(one_tile);
  RUN(several_tiles);
  RUN(split_operands);
  RUN(parts_of_the_samples);
  RUN(repeated_runs_give_the_same_bits);
  RUN(covers_what_fits);
  return check::finish();
}
