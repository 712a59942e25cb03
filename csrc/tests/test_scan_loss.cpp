// The CUDA kernels of the SCAN loss, run on the host, against the definition in double precision.
#include "logits.h"
#include "scan_loss/scan_loss.h"

namespace {

using namespace scan_fast;
using check::Elements;

struct Results {
  std::vector<float> total, consistency, entropy, mean_prob;
  Elements grad_a, grad_n;
};

struct Upstream {
  std::vector<float> total, consistency, entropy;  // empty: not used
};

const float* pointer(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

Results run(DType dtype, const ScanLossShape& shape, const Elements& a, const Elements& n, float weight,
            const Upstream& upstream) {
  const size_t heads = shape.heads, elements = a.size();
  Results r{std::vector<float>(heads, NAN), std::vector<float>(heads, NAN),
            std::vector<float>(heads, NAN), std::vector<float>(heads * shape.classes, NAN),
            Elements(dtype, elements),      Elements(dtype, elements)};
  std::vector<float> stats(heads * shape.rows * kScanLossRowStats, NAN);
  std::vector<unsigned char> workspace(scan_loss_cuda_workspace(shape), 0xff);
  scan_loss_forward_cuda(dtype, shape,
                         {a.data(), n.data(), r.total.data(), r.consistency.data(), r.entropy.data(),
                          r.mean_prob.data(), stats.data(), workspace.data(), weight},
                         nullptr);
  scan_loss_backward_cuda(dtype, shape,
                          {pointer(upstream.total), pointer(upstream.consistency), pointer(upstream.entropy), a.data(),
                           n.data(), r.mean_prob.data(), stats.data(), r.grad_a.data(), r.grad_n.data(), weight},
                          nullptr);
  return r;
}

// `magnitude` is the largest difference of logits: subtracting it in float32 costs its last place.
void compare(DType dtype, const ScanLossShape& shape, const Elements& a, const Elements& n, float weight,
             const Upstream& upstream, const Results& r, double magnitude = 10) {
  const size_t rows = shape.rows, classes = shape.classes;
  std::vector<double> p(rows * classes), lse_a(rows), lse_n(rows), lse_joint(rows);
  for (size_t h = 0; h < static_cast<size_t>(shape.heads); ++h) {
    std::vector<double> mean(classes, 0.0);
    double consistency = 0, entropy = 0;
    for (size_t i = 0; i < rows; ++i) {
      const size_t base = (h * rows + i) * classes;
      lse_a[i] = check::log_sum_exp(classes, [&](size_t c) { return a.get(base + c); });
      lse_n[i] = check::log_sum_exp(classes, [&](size_t c) { return n.get(base + c); });
      lse_joint[i] = check::log_sum_exp(classes, [&](size_t c) { return a.get(base + c) + n.get(base + c); });
      consistency += (lse_a[i] + lse_n[i] - lse_joint[i]) / static_cast<double>(rows);
      for (size_t c = 0; c < classes; ++c) {
        p[i * classes + c] = std::exp(a.get(base + c) - lse_a[i]);
        mean[c] += p[i * classes + c] / static_cast<double>(rows);
      }
    }
    for (size_t c = 0; c < classes; ++c) {
      const double m = std::fmax(mean[c], 1e-8);
      entropy -= m * std::log(m);
      CHECK_NEAR(r.mean_prob[h * classes + c], mean[c], 3e-6 * mean[c] + 1e-12);
    }
    const double loose = 4e-6 * (1 + std::fabs(consistency));
    CHECK_NEAR(r.consistency[h], consistency, loose);
    CHECK_NEAR(r.entropy[h], entropy, 4e-6 * (1 + entropy));
    CHECK_NEAR(r.total[h], consistency - weight * entropy, loose + 4e-6 * weight * (1 + entropy));

    auto at = [&](const std::vector<float>& v) { return v.empty() ? 0.0 : static_cast<double>(v[h]); };
    const double k = (at(upstream.total) + at(upstream.consistency)) / static_cast<double>(rows);
    const double e = (at(upstream.entropy) - weight * at(upstream.total)) / static_cast<double>(rows);
    const double noise = (std::fabs(k) + 30 * std::fabs(e)) * 1e-7 * magnitude + check::smallest(dtype);
    for (size_t i = 0; i < rows; ++i) {
      const size_t base = (h * rows + i) * classes;
      auto slope = [&](size_t c) { return mean[c] < 1e-8 ? 0.0 : -1 - std::log(mean[c]); };
      double dot = 0;
      for (size_t c = 0; c < classes; ++c) {
        if (p[i * classes + c] > 0) dot += p[i * classes + c] * slope(c);
      }
      for (size_t c = 0; c < classes; ++c) {
        const double q = std::exp(n.get(base + c) - lse_n[i]), prob = p[i * classes + c];
        const double joint = std::exp(a.get(base + c) + n.get(base + c) - lse_joint[i]);
        const double grad_a = k * (prob - joint) + (prob > 0 ? e * prob * (slope(c) - dot) : 0.0);
        const double grad_n = k * (q - joint);
        CHECK_NEAR(r.grad_a.get(base + c), grad_a, check::rounding(dtype) * std::fabs(grad_a) + noise);
        CHECK_NEAR(r.grad_n.get(base + c), grad_n, check::rounding(dtype) * std::fabs(grad_n) + noise);
      }
    }
  }
}

void matches_the_definition() {
  const ScanLossShape shapes[] = {{1, 1, 1},   {3, 7, 1},    {1, 7, 2},    {1, 130, 2},  {3, 130, 10}, {1, 1, 33},
                                  {3, 7, 33},  {1, 130, 33}, {1, 130, 36}, {1, 7, 300},  {1, 30, 301}, {3, 7, 1000},
                                  {1, 1, 999}, {1, 7, 1024}, {1, 7, 1025}, {3, 3, 1025}, {1, 5, 5000}};
  for (const DType dtype : check::kDTypes) {
    uint64_t seed = 11;
    for (const ScanLossShape& shape : shapes) {
      emu::options() = {.detect_races = shape.heads * shape.rows * shape.classes < 10000, .seed = seed};
      const size_t elements = shape.heads * shape.rows * shape.classes;
      const Elements a = check::normal_logits(dtype, elements, 3, ++seed);
      const Elements n = check::normal_logits(dtype, elements, 3, ++seed);
      Upstream upstream;
      check::Random random{seed};
      for (int64_t h = 0; h < shape.heads; ++h) {
        upstream.total.push_back(static_cast<float>(random.normal()));
        if (shape.rows != 7) upstream.consistency.push_back(static_cast<float>(random.normal()));
        if (shape.classes != 33) upstream.entropy.push_back(static_cast<float>(random.normal()));
      }
      compare(dtype, shape, a, n, 5.0f, upstream, run(dtype, shape, a, n, 5.0f, upstream));
    }
  }
}

void rows_that_disagree_and_masked_classes() {
  for (const int64_t classes : {10, 36, 1000, 1300}) {
    for (const double size : {40.0, 300.0, 20000.0}) {
      emu::options() = {};
      const ScanLossShape shape{2, 9, classes};
      Elements a = check::normal_logits(DType::kFloat32, 18 * classes, 1, 3);
      Elements n = check::normal_logits(DType::kFloat32, 18 * classes, 1, 4);
      for (size_t i = 0; i < 18; i += 2) {
        a.set(i * classes, size);
        n.set(i * classes + 1, size);
      }
      for (size_t i = 0; i < 18; ++i) {
        a.set(i * classes + 3, -check::kInfinity);
        n.set(i * classes + 4, -check::kInfinity);
      }
      a.set(5, -check::kInfinity);
      n.set(5, -check::kInfinity);
      const Upstream upstream{{1.0f, -2.0f}, {}, {0.5f, 0.25f}};
      compare(DType::kFloat32, shape, a, n, 2.0f, upstream, run(DType::kFloat32, shape, a, n, 2.0f, upstream), size);
    }
  }
}

void same_bits_in_any_order() {
  for (const ScanLossShape& shape :
       {ScanLossShape{2, 530, 10}, ScanLossShape{1, 61, 100}, ScanLossShape{1, 9, 1100}, ScanLossShape{1, 20, 1000}}) {
    const size_t elements = shape.heads * shape.rows * shape.classes;
    const Elements a = check::normal_logits(DType::kFloat32, elements, 3, 5);
    const Elements n = check::normal_logits(DType::kFloat32, elements, 3, 6);
    const Upstream upstream{std::vector<float>(shape.heads, 1.0f), {}, {}};
    emu::options() = {};
    const Results first = run(DType::kFloat32, shape, a, n, 5.0f, upstream);
    for (const uint64_t seed : {1, 2, 3}) {
      emu::options() = {.detect_races = true, .seed = seed};
      const Results again = run(DType::kFloat32, shape, a, n, 5.0f, upstream);
      CHECK(again.total == first.total && again.mean_prob == first.mean_prob);
      CHECK(again.grad_a == first.grad_a && again.grad_n == first.grad_n);
    }
    compare(DType::kFloat32, shape, a, n, 5.0f, upstream, first);
  }
}

// The number of blocks on an H100, and the largest number of classes whose sums fit into 99 KB of shared memory.
void many_multiprocessors_and_little_shared_memory() {
  const auto check_shape = [](DType dtype, const ScanLossShape& shape) {
    const size_t elements = shape.heads * shape.rows * shape.classes;
    const Elements a = check::normal_logits(dtype, elements, 3, 41), n = check::normal_logits(dtype, elements, 3, 42);
    const Upstream upstream{std::vector<float>(shape.heads, -1.5f), {}, {}};
    compare(dtype, shape, a, n, 5.0f, upstream, run(dtype, shape, a, n, 5.0f, upstream));
  };
  emu::options() = {.seed = 6, .multiprocessors = 132, .resident_blocks = 3};
  check_shape(DType::kBFloat16, {2, 900, 10});
  check_shape(DType::kFloat32, {10, 300, 40});
  check_shape(DType::kFloat16, {1, 40, 1500});
  emu::options() = {.compute_capability = 86, .device = 86};
  check_shape(DType::kFloat32, {1, 3, 24 * 1024});
  check_shape(DType::kFloat32, {1, 3, 24 * 1024 + 1});
}

// The sums of the blocks are added in one batch of loads or several, in one slice of the classes or several, and the
// workspace suffices whatever the number of blocks: the sanitizer would see an access beyond it.
void any_number_of_blocks() {
  const ScanLossShape shapes[] = {{1, 200, 1000}, {1, 300, 1000}, {3, 70, 5}, {1, 1100, 3}, {2, 40, 1026}};
  for (const int resident : {1, 3, 20}) {
    for (const ScanLossShape& shape : shapes) {
      emu::options() = {.seed = 5, .multiprocessors = 66, .resident_blocks = resident};
      const size_t elements = shape.heads * shape.rows * shape.classes;
      const Elements a = check::normal_logits(DType::kFloat32, elements, 3, 51);
      const Elements n = check::normal_logits(DType::kFloat32, elements, 3, 52);
      const Upstream upstream{std::vector<float>(shape.heads, 1.0f), {}, {}};
      compare(DType::kFloat32, shape, a, n, 5.0f, upstream, run(DType::kFloat32, shape, a, n, 5.0f, upstream));
    }
  }
}

void nan_and_infinity_stay_visible() {
  emu::options() = {};
  for (const int64_t classes : {6, 40, 1100}) {
    const ScanLossShape shape{1, 3, classes};
    const Elements n = check::normal_logits(DType::kFloat32, 3 * classes, 1, 6);
    for (const double bad : {static_cast<double>(NAN), check::kInfinity}) {
      Elements a = check::normal_logits(DType::kFloat32, 3 * classes, 1, 5);
      a.set(classes + 2, bad);
      const Upstream upstream{{1.0f}, {}, {}};
      CHECK(std::isnan(run(DType::kFloat32, shape, a, n, 1.0f, upstream).total[0]));
      const Results swapped = run(DType::kFloat32, shape, n, a, 1.0f, upstream);
      CHECK(std::isnan(swapped.consistency[0]) && std::isfinite(swapped.entropy[0]));
    }
    Elements x(DType::kFloat32, classes), y(DType::kFloat32, classes);
    for (int64_t c = 0; c < classes; ++c) {
      x.set(c, c == 0 ? 0.0 : -check::kInfinity);
      y.set(c, c == 1 ? 0.0 : -check::kInfinity);
    }
    CHECK(run(DType::kFloat32, {1, 1, classes}, x, y, 1.0f, {{1.0f}, {}, {}}).consistency[0] == INFINITY);
  }
}

}  // namespace

int main() {
  RUN(matches_the_definition);
  RUN(rows_that_disagree_and_masked_classes);
  RUN(same_bits_in_any_order);
  RUN(many_multiprocessors_and_little_shared_memory);
  RUN(any_number_of_blocks);
  RUN(nan_and_infinity_stay_visible);
  return check::finish();
}
