// The CPU kernels of the SCAN loss against the definition in double precision.
#include "cpu_check.h"
#include "logits.h"
#include "scan_loss/scan_loss.h"

namespace {

using namespace scan_fast;
using check::Elements;

constexpr float kWeight = 3.0f, kUpstream = 1.5f;

// `magnitude` is the largest difference of logits: subtracting it in float32 costs its last place.
void compare(DType dtype, const ScanLossShape& shape, const Elements& a, const Elements& n, double magnitude) {
  const size_t rows = shape.rows, classes = shape.classes, heads = shape.heads;
  std::vector<float> total(heads, NAN), consistency(heads, NAN), entropy(heads, NAN), mean_prob(heads * classes, NAN);
  std::vector<float> stats(heads * rows * kScanLossRowStats, NAN);
  std::vector<unsigned char> workspace(scan_loss_cpu_workspace(shape), 0xff);
  Elements grad_a(dtype, a.size()), grad_n(dtype, n.size());
  const std::vector<float> upstream(heads, kUpstream);
  scan_loss_forward_cpu(dtype, shape,
                        {a.data(), n.data(), total.data(), consistency.data(), entropy.data(), mean_prob.data(),
                         stats.data(), workspace.data(), kWeight});
  scan_loss_backward_cpu(dtype, shape,
                         {upstream.data(), nullptr, nullptr, a.data(), n.data(), mean_prob.data(), stats.data(),
                          grad_a.data(), grad_n.data(), kWeight});
  for (size_t h = 0; h < heads; ++h) {
    const auto value = [&](const Elements& of, size_t i, size_t c) { return of.get((h * rows + i) * classes + c); };
    std::vector<double> mean(classes, 0.0), lse_a(rows), lse_n(rows), lse_joint(rows);
    double loss = 0, exact_entropy = 0;
    for (size_t i = 0; i < rows; ++i) {
      lse_a[i] = check::log_sum_exp(classes, [&](size_t c) { return value(a, i, c); });
      lse_n[i] = check::log_sum_exp(classes, [&](size_t c) { return value(n, i, c); });
      lse_joint[i] = check::log_sum_exp(classes, [&](size_t c) { return value(a, i, c) + value(n, i, c); });
      loss += (lse_a[i] + lse_n[i] - lse_joint[i]) / static_cast<double>(rows);
      for (size_t c = 0; c < classes; ++c) mean[c] += std::exp(value(a, i, c) - lse_a[i]) / static_cast<double>(rows);
    }
    for (size_t c = 0; c < classes; ++c) {
      exact_entropy -= std::fmax(mean[c], 1e-8) * std::log(std::fmax(mean[c], 1e-8));
      CHECK_NEAR(mean_prob[h * classes + c], mean[c], 3e-6 * mean[c] + 1e-12);
    }
    CHECK_NEAR(consistency[h], loss, 4e-6 * (1 + loss));
    CHECK_NEAR(entropy[h], exact_entropy, 4e-6 * (1 + exact_entropy));
    CHECK_NEAR(total[h], loss - kWeight * exact_entropy, 4e-6 * (1 + loss + kWeight * exact_entropy));
    const double scale = static_cast<double>(kUpstream) / static_cast<double>(rows);
    const double noise = scale * (1 + 30 * kWeight) * 1e-7 * magnitude + check::smallest(dtype);
    const auto slope = [&](size_t c) { return mean[c] < 1e-8 ? 0.0 : 1 + std::log(mean[c]); };
    for (size_t i = 0; i < rows; ++i) {
      double dot = 0;
      for (size_t c = 0; c < classes; ++c) dot += std::exp(value(a, i, c) - lse_a[i]) * slope(c);
      for (size_t c = 0; c < classes; ++c) {
        const double p = std::exp(value(a, i, c) - lse_a[i]), q = std::exp(value(n, i, c) - lse_n[i]);
        const double joint = std::exp(value(a, i, c) + value(n, i, c) - lse_joint[i]);
        const double exact_a = scale * (p - joint + kWeight * p * (slope(c) - dot)), exact_n = scale * (q - joint);
        CHECK_NEAR(value(grad_a, i, c), exact_a, check::rounding(dtype) * std::fabs(exact_a) + noise);
        CHECK_NEAR(value(grad_n, i, c), exact_n, check::rounding(dtype) * std::fabs(exact_n) + noise);
      }
    }
  }
}

void matches_the_definition() {
  const ScanLossShape shapes[] = {{1, 1, 1},  {3, 7, 1},    {1, 7, 2},    {1, 130, 10}, {3, 37, 10},
                                  {1, 1, 33}, {1, 130, 33}, {2, 61, 100}, {1, 5, 1025}, {2, 4100, 10}};
  uint64_t seed = 11;
  for (const DType dtype : check::kDTypes) {
    for (const ScanLossShape& shape : shapes) {
      const size_t elements = shape.heads * shape.rows * shape.classes;
      const Elements a = check::normal_logits(dtype, elements, 3, ++seed);
      compare(dtype, shape, a, check::normal_logits(dtype, elements, 3, ++seed), 10);
    }
  }
}

void rows_that_disagree() {
  for (const int64_t classes : {10, 100}) {
    for (const double size : {40.0, 300.0}) {
      Elements a = check::normal_logits(DType::kFloat32, 9 * classes, 1, 3);
      Elements n = check::normal_logits(DType::kFloat32, 9 * classes, 1, 4);
      for (size_t i = 0; i < 9; i += 2) {
        a.set(i * classes, size);
        n.set(i * classes + 1, size);
      }
      compare(DType::kFloat32, {1, 9, classes}, a, n, size);
    }
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(matches_the_definition);
  RUN(rows_that_disagree);
  return check::finish();
}
