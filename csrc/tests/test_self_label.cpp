// The CUDA kernels of the self-label loss, run on the host, against the definition in double precision.
#include "logits.h"
#include "self_label/self_label.h"

namespace {

using namespace scan_fast;
using check::Elements;

struct Results {
  float loss = NAN;
  int64_t n_confident = -1;
  std::vector<int32_t> target;
  std::vector<float> weight;
  Elements grad;
};

Results run(DType dtype, const SelfLabelShape& shape, const Elements& weak, const Elements& strong, float threshold,
            bool balance, float upstream) {
  Results r{NAN, -1, std::vector<int32_t>(shape.rows, -7), std::vector<float>(shape.rows, NAN),
            Elements(dtype, weak.size())};
  std::vector<float> stats(shape.rows * kSelfLabelRowStats, NAN);
  std::vector<unsigned char> workspace(self_label_cuda_workspace(shape), 0xff);
  self_label_forward_cuda(dtype, shape,
                          {weak.data(), strong.data(), &r.loss, &r.n_confident, r.target.data(), r.weight.data(),
                           stats.data(), workspace.data(), threshold, balance},
                          nullptr);
  self_label_backward_cuda(
      dtype, shape, {&upstream, strong.data(), r.target.data(), r.weight.data(), stats.data(), r.grad.data()}, nullptr);
  return r;
}

void compare(DType dtype, const SelfLabelShape& shape, const Elements& weak, const Elements& strong, float threshold,
             bool balance, float upstream, const Results& r) {
  const size_t rows = shape.rows, classes = shape.classes;
  std::vector<bool> confident(rows);
  std::vector<size_t> target(rows), per_class(classes, 0);
  size_t count = 0, present = 0;
  for (size_t i = 0; i < rows; ++i) {
    for (size_t c = 1; c < classes; ++c) {
      if (weak.get(i * classes + c) > weak.get(i * classes + target[i])) target[i] = c;
    }
    const double lse = check::log_sum_exp(classes, [&](size_t c) { return weak.get(i * classes + c); });
    confident[i] = std::exp(weak.get(i * classes + target[i]) - lse) > static_cast<double>(threshold);
    CHECK(r.target[i] == static_cast<int32_t>(target[i]));
    if (!confident[i]) continue;
    ++count;
    present += per_class[target[i]]++ == 0;
  }
  CHECK(r.n_confident == static_cast<int64_t>(count));
  double loss = 0;
  for (size_t i = 0; i < rows; ++i) {
    const size_t base = i * classes;
    const double weight = !confident[i] ? 0.0
                          : balance     ? 1.0 / static_cast<double>(present * per_class[target[i]])
                                        : 1.0 / static_cast<double>(count);
    CHECK_NEAR(r.weight[i], weight, 1e-6 * weight);
    const double lse = check::log_sum_exp(classes, [&](size_t c) { return strong.get(base + c); });
    if (confident[i]) loss += weight * (lse - strong.get(base + target[i]));
    for (size_t c = 0; c < classes; ++c) {
      const double scale = static_cast<double>(upstream) * weight;
      const double grad = confident[i] ? scale * (std::exp(strong.get(base + c) - lse) - (c == target[i])) : 0.0;
      CHECK_NEAR(r.grad.get(base + c), grad,
                 check::rounding(dtype) * std::fabs(grad) + 1e-6 * std::fabs(scale) + check::smallest(dtype));
    }
  }
  CHECK_NEAR(r.loss, loss, 4e-6 * (1 + loss));
}

// About half the rows have one large logit.
Elements weak_logits(DType dtype, const SelfLabelShape& shape, uint64_t seed) {
  Elements weak = check::normal_logits(dtype, shape.rows * shape.classes, 1, seed);
  check::Random random{seed};
  for (int64_t i = 0; i < shape.rows; i += 2) weak.set(i * shape.classes + random.bits() % shape.classes, 25);
  return weak;
}

void matches_the_definition() {
  const SelfLabelShape shapes[] = {{1, 1},  {7, 1},    {7, 2},    {130, 2},  {130, 10}, {530, 10},  {1, 33},
                                   {7, 33}, {130, 33}, {130, 36}, {7, 1000}, {7, 1025}, {130, 300}, {5, 5000}};
  for (const DType dtype : check::kDTypes) {
    uint64_t seed = 1;
    for (const SelfLabelShape& shape : shapes) {
      for (const bool balance : {true, false}) {
        emu::options() = {.detect_races = true, .seed = ++seed};
        const Elements weak = weak_logits(dtype, shape, seed);
        const Elements strong = check::normal_logits(dtype, weak.size(), 3, seed + 100);
        const Results r = run(dtype, shape, weak, strong, 0.9f, balance, -1.5f);
        compare(dtype, shape, weak, strong, 0.9f, balance, -1.5f, r);
      }
    }
  }
}

// As many blocks as an H100 gets.
void many_multiprocessors() {
  emu::options() = {.seed = 8, .multiprocessors = 132, .resident_blocks = 8};
  for (const SelfLabelShape& shape : {SelfLabelShape{3000, 10}, SelfLabelShape{200, 1500}}) {
    const Elements weak = weak_logits(DType::kBFloat16, shape, 31);
    const Elements strong = check::normal_logits(DType::kBFloat16, weak.size(), 3, 32);
    const Results r = run(DType::kBFloat16, shape, weak, strong, 0.9f, true, -1.5f);
    compare(DType::kBFloat16, shape, weak, strong, 0.9f, true, -1.5f, r);
  }
}

// More rows than the threads of the last kernel take at once, and more classes than it can count in shared memory.
void many_rows_and_classes() {
  for (const int capability : {75, 90}) {
    emu::options() = {.seed = 4, .compute_capability = capability, .device = capability};
    for (const SelfLabelShape& shape : {SelfLabelShape{4200, 3}, SelfLabelShape{6, 20000}, SelfLabelShape{5, 25000}}) {
      for (const bool balance : {true, false}) {
        const Elements weak = weak_logits(DType::kFloat32, shape, 21);
        const Elements strong = check::normal_logits(DType::kFloat32, weak.size(), 3, 22);
        const Results r = run(DType::kFloat32, shape, weak, strong, 0.7f, balance, 2.0f);
        compare(DType::kFloat32, shape, weak, strong, 0.7f, balance, 2.0f, r);
      }
    }
  }
}

void masked_classes_and_ties() {
  emu::options() = {};
  for (const int64_t classes : {10, 36, 300}) {
    const SelfLabelShape shape{40, classes};
    Elements weak = weak_logits(DType::kFloat32, shape, 9);
    Elements strong = check::normal_logits(DType::kFloat32, weak.size(), 3, 10);
    for (int64_t i = 0; i < 40; ++i) {
      weak.set(i * classes, -check::kInfinity);
      weak.set(i * classes + 1, i % 4 < 2 ? 30.0 : -check::kInfinity);
      weak.set(i * classes + 7, i % 4 < 2 ? 30.0 : 1.0);
      strong.set(i * classes, -check::kInfinity);
    }
    const Results r = run(DType::kFloat32, shape, weak, strong, 0.4f, true, 1.0f);
    compare(DType::kFloat32, shape, weak, strong, 0.4f, true, 1.0f, r);
  }
}

void rows_that_cannot_be_confident() {
  emu::options() = {};
  for (const int64_t classes : {10, 36}) {
    const SelfLabelShape shape{6, classes};
    Elements weak = weak_logits(DType::kFloat32, shape, 9);
    Elements strong = check::normal_logits(DType::kFloat32, weak.size(), 3, 10);
    for (int64_t c = 0; c < classes; ++c) {
      weak.set(0 * classes + c, NAN);
      weak.set(2 * classes + c, -check::kInfinity);
      strong.set(1 * classes + c, NAN);
    }
    weak.set(4 * classes + 3, check::kInfinity);
    const Results r = run(DType::kFloat32, shape, weak, strong, 0.9f, true, 1.0f);
    CHECK(r.n_confident == 0 && r.loss == 0.0f);
    for (size_t i = 0; i < r.grad.size(); ++i) CHECK(r.grad.get(i) == 0.0);
    for (const int32_t target : r.target) CHECK(target >= 0 && target < classes);
  }
}

void same_bits_in_any_order() {
  const SelfLabelShape shape{530, 10};
  const Elements weak = weak_logits(DType::kFloat32, shape, 9);
  const Elements strong = check::normal_logits(DType::kFloat32, weak.size(), 3, 10);
  emu::options() = {};
  const Results first = run(DType::kFloat32, shape, weak, strong, 0.9f, true, 1.0f);
  for (const uint64_t seed : {1, 2, 3}) {
    emu::options() = {.detect_races = true, .seed = seed};
    const Results again = run(DType::kFloat32, shape, weak, strong, 0.9f, true, 1.0f);
    CHECK(again.loss == first.loss && again.weight == first.weight && again.grad == first.grad);
  }
}

}  // namespace

int main() {
  RUN(matches_the_definition);
  RUN(many_multiprocessors);
  RUN(many_rows_and_classes);
  RUN(masked_classes_and_ties);
  RUN(rows_that_cannot_be_confident);
  RUN(same_bits_in_any_order);
  return check::finish();
}
