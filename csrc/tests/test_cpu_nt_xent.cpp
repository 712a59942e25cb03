// The CPU kernels of NT-Xent against the definition in double precision.
#include "cpu_check.h"
#include "nt_xent_cases.h"

namespace {

using namespace scan_fast;

struct Case {
  int64_t samples, dim;
  double temperature;
  bool both;
  int64_t begin, count;
};

void compare(const Case& c) {
  const int64_t n = c.samples, d = c.dim, rows = 2 * n;
  check::Random random{static_cast<uint64_t>(n * 1000 + d)};
  std::vector<float> z0(n * d), z1(n * d);
  for (int64_t i = 0; i < n * d; ++i) {
    z0[i] = static_cast<float>(random.normal());
    z1[i] = static_cast<float>(0.5 * z0[i] + 0.7 * random.normal());
  }
  const NTXentProblem all{n, d, c.temperature, c.both, 0, n};
  std::vector<float> upstream(all.anchors());
  for (float& value : upstream) value = static_cast<float>(random.normal());
  const nt_xent_test::Result expected = nt_xent_test::oracle(z0, z1, n, d, c.temperature, c.both, upstream);

  std::vector<float> unit(rows * d, NAN), inv_norm(rows, NAN), losses(all.anchors(), NAN), lse(all.anchors(), NAN);
  nt_xent_normalize_cpu(all, z0.data(), z1.data(), unit.data(), inv_norm.data());
  nt_xent_forward_cpu(all, unit.data(), false, losses.data(), lse.data());
  for (int64_t i = 0; i < all.anchors(); ++i) {
    CHECK_NEAR(losses[i], expected.losses[i], 2e-6 * (1 + 1 / c.temperature));
  }
  // The samples of one rank: the same losses, and their rows of the gradient.
  const NTXentProblem part{n, d, c.temperature, c.both, c.begin, c.count};
  std::vector<float> part_losses(part.local_anchors(), NAN), part_lse(part.local_anchors(), NAN);
  nt_xent_forward_cpu(part, unit.data(), false, part_losses.data(), part_lse.data());
  for (int64_t i = 0; i < part.local_anchors(); ++i) {
    const int64_t anchor = i / c.count * n + c.begin + i % c.count;
    CHECK_NEAR(part_losses[i], expected.losses[anchor], 2e-6 * (1 + 1 / c.temperature));
    CHECK_NEAR(part_lse[i], lse[anchor], 2e-6 * (1 + 1 / c.temperature));
  }
  std::vector<float> grad_z0(c.count * d, NAN), grad_z1(c.count * d, NAN);
  nt_xent_backward_cpu(part, unit.data(), inv_norm.data(), losses.data(), lse.data(), upstream.data(), false,
                       grad_z0.data(), grad_z1.data());
  double largest = 1e-3;
  for (const double value : expected.grad_z0) largest = std::max(largest, std::fabs(value));
  for (int64_t i = 0; i < c.count * d; ++i) {
    const double tolerance = 3e-6 / c.temperature * largest;
    CHECK_NEAR(grad_z0[i], expected.grad_z0[c.begin * d + i], tolerance);
    CHECK_NEAR(grad_z1[i], expected.grad_z1[c.begin * d + i], tolerance);
  }
}

void all_samples() {
  for (const bool both : {true, false}) {
    compare({1, 1, 0.5, both, 0, 1});
    compare({2, 3, 0.5, both, 0, 2});
    compare({33, 17, 0.1, both, 0, 33});
    compare({130, 128, 0.1, both, 0, 130});
    compare({300, 40, 0.07, both, 0, 300});
  }
}

void some_samples() {
  for (const bool both : {true, false}) {
    compare({40, 20, 0.2, both, 7, 19});
    compare({150, 64, 0.1, both, 100, 50});
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(all_samples);
  RUN(some_samples);
  return check::finish();
}
