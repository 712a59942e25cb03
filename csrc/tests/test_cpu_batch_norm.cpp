// The CPU kernels of batch normalisation against the definition in double precision.
#include "batch_norm/batch_norm.h"
#include "cpu_check.h"
#include "logits.h"

namespace {

using namespace scan_fast;
using check::Elements;

constexpr float kMomentum = 0.1f, kEps = 1e-5f;

void compare(DType dtype, const BatchNormShape& shape, bool residual, bool relu, bool training) {
  const size_t rows = shape.rows, channels = shape.channels, n = rows * channels;
  check::Random random{n + 2 * residual + relu};
  Elements x(dtype, n), added(dtype, n), grad_y(dtype, n), y(dtype, n), grad_x(dtype, n), grad_added(dtype, n);
  for (size_t i = 0; i < n; ++i) {
    x.set(i, 0.3 + 1.5 * random.normal());
    added.set(i, random.normal());
    grad_y.set(i, random.normal());
  }
  std::vector<float> weight, bias, running_mean, running_var;
  for (size_t c = 0; c < channels; ++c) {
    weight.push_back(static_cast<float>(random.normal()));
    bias.push_back(static_cast<float>(0.5 * random.normal()));
    running_mean.push_back(static_cast<float>(random.normal()));
    running_var.push_back(static_cast<float>(0.5 + random.uniform()));
  }
  const std::vector<float> old_mean = running_mean, old_var = running_var;
  std::vector<float> mean(channels, NAN), inv_std(channels, NAN), grad_weight(channels, NAN), grad_bias(channels, NAN);
  std::vector<uint16_t> mask(residual && relu ? batch_norm_mask_words(shape) : 0, 0xffff);
  uint16_t* const mask_data = mask.empty() ? nullptr : mask.data();
  std::vector<unsigned char> workspace(batch_norm_cpu_workspace(shape), 0xff);
  batch_norm_forward_cpu(
      dtype, shape,
      {x.data(), residual ? added.data() : nullptr, weight.data(), bias.data(), running_mean.data(), running_var.data(),
       y.data(), mean.data(), inv_std.data(), mask_data, workspace.data(), kMomentum, kEps, training, relu});
  batch_norm_backward_cpu(
      dtype, shape,
      {grad_y.data(), x.data(), weight.data(), bias.data(), mean.data(), inv_std.data(), mask_data, grad_x.data(),
       residual ? grad_added.data() : nullptr, grad_weight.data(), grad_bias.data(), workspace.data(), training, relu});
  const double count = static_cast<double>(rows), rounding = check::rounding(dtype);
  for (size_t c = 0; c < channels; ++c) {
    const auto at = [&](const Elements& of, size_t i) { return of.get(i * channels + c); };
    double m = old_mean[c], var = old_var[c];
    if (training) {
      m = var = 0;
      for (size_t i = 0; i < rows; ++i) m += at(x, i) / count;
      for (size_t i = 0; i < rows; ++i) var += std::pow(at(x, i) - m, 2) / count;
      CHECK_NEAR(running_mean[c], 0.9 * old_mean[c] + 0.1 * m, 2e-6);
      CHECK_NEAR(running_var[c], 0.9 * old_var[c] + 0.1 * var * count / (count - 1), 2e-6 * (1 + var));
    } else {
      CHECK(running_mean[c] == old_mean[c] && running_var[c] == old_var[c]);
    }
    const double inv = 1 / std::sqrt(var + kEps), scale = weight[c] * inv;
    CHECK_NEAR(mean[c], m, 2e-6);
    CHECK_NEAR(inv_std[c], inv, 4e-6 * inv);
    double sum = 0, moment = 0;
    std::vector<double> dz(rows);
    for (size_t i = 0; i < rows; ++i) {
      const double v = (at(x, i) - m) * scale + bias[c] + (residual ? at(added, i) : 0.0);
      CHECK_NEAR(at(y, i), relu ? std::fmax(v, 0.0) : v, rounding * std::fabs(v) + 1e-5 + check::smallest(dtype));
      // At the edge of the ReLU, either side is right: the one that the kernel took.
      const bool edge = std::fabs(v) < 1e-5, passes = !relu || (edge ? at(y, i) > 0 : v > 0);
      dz[i] = passes ? at(grad_y, i) : 0.0;
      sum += dz[i];
      moment += dz[i] * (at(x, i) - m);
      if (residual) CHECK(at(grad_added, i) == dz[i]);
    }
    const double tolerance = 1e-5 * std::sqrt(count);
    CHECK_NEAR(grad_bias[c], sum, tolerance);
    CHECK_NEAR(grad_weight[c], inv * moment, 4 * tolerance);
    for (size_t i = 0; i < rows; ++i) {
      const double exact =
          training ? scale * (dz[i] - sum / count - (at(x, i) - m) * inv * inv * moment / count) : scale * dz[i];
      CHECK_NEAR(at(grad_x, i), exact, rounding * std::fabs(exact) + 2e-5 * std::fabs(scale) + check::smallest(dtype));
    }
  }
}

void matches_the_definition() {
  for (const DType dtype : check::kDTypes) {
    for (const BatchNormShape& shape : {BatchNormShape{2, 1}, {37, 3}, {50, 16}, {130, 33}, {1500, 64}, {9, 515}}) {
      for (const bool training : {true, false}) {
        compare(dtype, shape, false, false, training);
        compare(dtype, shape, false, true, training);
        compare(dtype, shape, true, false, training);
        compare(dtype, shape, true, true, training);
      }
    }
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(matches_the_definition);
  return check::finish();
}
