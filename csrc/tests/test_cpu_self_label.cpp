// The CPU kernels of the self-label loss against the definition in double precision.
#include "cpu_check.h"
#include "logits.h"
#include "self_label/self_label.h"

namespace {

using namespace scan_fast;
using check::Elements;

constexpr float kThreshold = 0.9f, kUpstream = -1.5f;

void compare(DType dtype, const SelfLabelShape& shape, bool balance, uint64_t seed) {
  const size_t rows = shape.rows, classes = shape.classes;
  Elements weak = check::normal_logits(dtype, rows * classes, 1, seed);
  const Elements strong = check::normal_logits(dtype, rows * classes, 3, seed + 100);
  check::Random random{seed};
  // About half the rows have one large logit.
  for (size_t i = 0; i < rows; i += 2) weak.set(i * classes + random.bits() % classes, 25);
  float loss = NAN;
  int64_t n_confident = -1;
  std::vector<int32_t> target(rows, -7);
  std::vector<float> weight(rows, NAN), stats(rows * kSelfLabelRowStats, NAN);
  std::vector<unsigned char> workspace(self_label_cpu_workspace(shape), 0xff);
  Elements grad(dtype, rows * classes);
  self_label_forward_cpu(dtype, shape,
                         {weak.data(), strong.data(), &loss, &n_confident, target.data(), weight.data(), stats.data(),
                          workspace.data(), kThreshold, balance});
  self_label_backward_cpu(dtype, shape,
                          {&kUpstream, strong.data(), target.data(), weight.data(), stats.data(), grad.data()});
  std::vector<bool> confident(rows);
  std::vector<size_t> label(rows), per_class(classes, 0);
  size_t count = 0, present = 0;
  for (size_t i = 0; i < rows; ++i) {
    for (size_t c = 1; c < classes; ++c) {
      if (weak.get(i * classes + c) > weak.get(i * classes + label[i])) label[i] = c;
    }
    const double lse = check::log_sum_exp(classes, [&](size_t c) { return weak.get(i * classes + c); });
    confident[i] = std::exp(weak.get(i * classes + label[i]) - lse) > static_cast<double>(kThreshold);
    CHECK(target[i] == static_cast<int32_t>(label[i]));
    if (!confident[i]) continue;
    ++count;
    present += per_class[label[i]]++ == 0;
  }
  CHECK(n_confident == static_cast<int64_t>(count));
  double exact_loss = 0;
  for (size_t i = 0; i < rows; ++i) {
    const auto logit = [&](size_t c) { return strong.get(i * classes + c); };
    const double share = balance ? static_cast<double>(present * per_class[label[i]]) : static_cast<double>(count);
    const double of_row = confident[i] ? 1 / share : 0.0, lse = check::log_sum_exp(classes, logit);
    CHECK_NEAR(weight[i], of_row, 1e-6 * of_row);
    if (confident[i]) exact_loss += of_row * (lse - logit(label[i]));
    const double scale = static_cast<double>(kUpstream) * of_row;
    for (size_t c = 0; c < classes; ++c) {
      const double exact = confident[i] ? scale * (std::exp(logit(c) - lse) - (c == label[i])) : 0.0;
      CHECK_NEAR(grad.get(i * classes + c), exact,
                 check::rounding(dtype) * std::fabs(exact) + 1e-6 * std::fabs(scale) + check::smallest(dtype));
    }
  }
  CHECK_NEAR(loss, exact_loss, 4e-6 * (1 + exact_loss));
}

void matches_the_definition() {
  uint64_t seed = 1;
  for (const DType dtype : check::kDTypes) {
    for (const SelfLabelShape& shape :
         {SelfLabelShape{1, 1}, {7, 1}, {7, 2}, {130, 10}, {3500, 10}, {1, 33}, {130, 33}, {7, 1000}, {61, 1025}}) {
      for (const bool balance : {true, false}) compare(dtype, shape, balance, ++seed);
    }
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(matches_the_definition);
  return check::finish();
}
