// The definition of NT-Xent in double, and a comparison of any form of the GPU kernels with it.
#pragma once

#include <algorithm>

#include "check.h"
#include "common/device.h"
#include "nt_xent/nt_xent.h"

namespace scan_fast::nt_xent_test {

struct Result {
  std::vector<double> losses, grad_z0, grad_z1;  // of all anchors; of all samples
};

__attribute__((no_sanitize("address"))) inline double dot(const double* a, const double* b, int64_t d) {
  double sum = 0;
  for (int64_t k = 0; k < d; ++k) sum += a[k] * b[k];
  return sum;
}
__attribute__((no_sanitize("address"))) inline void add(double* to, double factor, const double* b, int64_t d) {
  for (int64_t k = 0; k < d; ++k) to[k] += factor * b[k];
}

// The definition, written out: losses of all anchors and the gradient of sum_i upstream_i loss_i, for every `every`-th
// of the 2N rows.
inline Result oracle(const std::vector<float>& z0, const std::vector<float>& z1, int64_t n, int64_t d,
                     double temperature, bool both, const std::vector<float>& upstream, int64_t every = 1) {
  const int64_t m = 2 * n, anchors = both ? m : n;
  std::vector<double> u(m * d), norm(m), s(m * m), weight(m * m, 0.0), du(m * d, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    const float* x = i < n ? &z0[i * d] : &z1[(i - n) * d];
    double sum = 0;
    for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * x[k];
    norm[i] = std::max(std::sqrt(sum), 1e-12);
    for (int64_t k = 0; k < d; ++k) u[i * d + k] = x[k] / norm[i];
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j <= i; ++j) s[i * m + j] = s[j * m + i] = dot(&u[i * d], &u[j * d], d) / temperature;
  }
  Result result;
  for (int64_t i = 0; i < anchors; ++i) {
    const int64_t positive = (i + n) % m;
    double largest = -INFINITY, sum = 0;
    for (int64_t j = 0; j < m; ++j) {
      if (j != i) largest = std::max(largest, s[i * m + j]);
    }
    for (int64_t j = 0; j < m; ++j) {
      if (j != i) sum += std::exp(s[i * m + j] - largest);
    }
    const double lse = largest + std::log(sum);
    result.losses.push_back(lse - s[i * m + positive]);
    for (int64_t j = 0; j < m; ++j) {
      if (j == i) continue;
      const double c = upstream[i] * (std::exp(s[i * m + j] - lse) - (j == positive)) / temperature;
      weight[i * m + j] += c;
      weight[j * m + i] += c;
    }
  }
  for (int64_t i = 0; i < m; i += every) {
    for (int64_t j = 0; j < m; ++j) add(&du[i * d], weight[i * m + j], &u[j * d], d);
  }
  for (int64_t i = 0; i < m; ++i) {
    double radial = 0;
    for (int64_t k = 0; k < d; ++k) radial += du[i * d + k] * u[i * d + k];
    for (int64_t k = 0; k < d; ++k) {
      (i < n ? result.grad_z0 : result.grad_z1).push_back((du[i * d + k] - radial * u[i * d + k]) / norm[i]);
    }
  }
  return result;
}

template <typename T>
std::vector<T> converted(const std::vector<float>& x) {
  std::vector<T> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = from_float<T>(x[i]);
  return out;
}

struct Buffer {
  std::vector<unsigned char> storage;
  unsigned char* aligned;
  explicit Buffer(int64_t bytes) : storage(bytes + 256, 0xff) {
    aligned = storage.data() + (256 - reinterpret_cast<uintptr_t>(storage.data()) % 256) % 256;
  }
};

// Runs both passes over the samples in parts, as ranks would, and compares with the oracle: all losses, and the
// gradients of every `every`-th row. Samples behind the last part are a queue of negatives: nobody handles them, and
// upstream gradient, loss and lse of their anchors are 0.
inline void compare(const NTXentGpuKernels& kernels, int64_t n, int64_t d, double temperature, bool both, bool reduced,
                    const std::vector<int64_t>& cuts, double tolerance, int64_t every = 1) {
  const int64_t handled = cuts.back();
  check::Random random{static_cast<uint64_t>(n * 1000 + d)};
  std::vector<float> z0(n * d), z1(n * d);
  for (int64_t i = 0; i < n * d; ++i) {
    z0[i] = static_cast<float>(random.normal());
    z1[i] = static_cast<float>(0.5 * z0[i] + 0.7 * random.normal());
  }
  const int64_t anchors = both ? 2 * n : n;
  std::vector<float> upstream(anchors);
  for (int64_t i = 0; i < anchors; ++i) upstream[i] = i % n < handled ? static_cast<float>(random.normal()) : 0.0f;
  const Result expected = oracle(z0, z1, n, d, temperature, both, upstream, every);

  std::vector<float> losses(anchors, 0.0f), lse(anchors, 0.0f), unit(2 * n * d, NAN), inv_norm(2 * n, NAN);
  std::vector<float> grad_z0(n * d, NAN), grad_z1(n * d, NAN);
  const int views = both ? 2 : 1;
  for (size_t part = 0; part + 1 < cuts.size(); ++part) {
    const NTXentProblem problem{n, d, temperature, both, cuts[part], cuts[part + 1] - cuts[part]};
    std::vector<float> part_losses(problem.local_anchors(), NAN), part_lse(problem.local_anchors(), NAN);
    const Buffer workspace(kernels.forward_workspace(problem, reduced));
    kernels.forward(problem, z0.data(), z1.data(), DType::kFloat32, reduced, part_losses.data(), part_lse.data(),
                    unit.data(), inv_norm.data(), workspace.aligned, nullptr);
    for (int view = 0; view < views; ++view) {
      for (int64_t i = 0; i < problem.sample_count; ++i) {
        losses[view * n + cuts[part] + i] = part_losses[view * problem.sample_count + i];
        lse[view * n + cuts[part] + i] = part_lse[view * problem.sample_count + i];
      }
    }
  }
  for (size_t part = 0; part + 1 < cuts.size(); ++part) {
    const NTXentProblem problem{n, d, temperature, both, cuts[part], cuts[part + 1] - cuts[part]};
    const Buffer workspace(kernels.backward_workspace(problem, reduced));
    kernels.backward(problem, unit.data(), inv_norm.data(), losses.data(), lse.data(), {upstream.data(), 1},
                     DType::kFloat32, reduced, grad_z0.data() + cuts[part] * d, grad_z1.data() + cuts[part] * d,
                     workspace.aligned, nullptr);
  }
  double largest = 1e-3;
  for (int64_t i = 0; i < n * d; ++i) {
    if (i / d % every == 0 && i / d < handled) largest = std::max(largest, std::fabs(expected.grad_z0[i]));
  }
  for (int64_t i = 0; i < anchors; ++i) {
    if (i % n < handled) CHECK_NEAR(losses[i], expected.losses[i], tolerance * (1 + 1 / temperature));
  }
  // The projection loses what the radial part had; short rows divide by their length.
  for (int64_t row = 0; row < 2 * n; ++row) {
    if (row % n >= handled) continue;
    const std::vector<float>& grad = row < n ? grad_z0 : grad_z1;
    const std::vector<double>& of_oracle = row < n ? expected.grad_z0 : expected.grad_z1;
    for (int64_t i = row % n * d; i < (row % n + 1) * d; ++i) {
      const double exact = row % every == 0 ? of_oracle[i] : grad[i];  // all must be numbers
      CHECK_NEAR(grad[i], exact, tolerance / temperature * std::max(largest, 1.0 * inv_norm[row]));
    }
  }
}

// Forward pass by 16-bit products that are exact: the elements of all unit rows are +-1/8 (+-1/4), with 64 (16) of them.
// So the losses are as accurate as the exponentials and sums, of which a part is computed by exp2_polynomial.
inline void exact_products(const NTXentGpuKernels& kernels, int64_t n, int64_t d, double temperature) {
  check::Random random{static_cast<uint64_t>(n + d)};
  std::vector<float> z0(n * d), z1(n * d);
  for (float& x : z0) x = random.normal() < 0 ? -1.0f : 1.0f;
  for (float& x : z1) x = random.normal() < 0 ? -1.0f : 1.0f;
  const NTXentProblem problem{n, d, temperature, true, 0, n};
  const Result expected = oracle(z0, z1, n, d, temperature, true, std::vector<float>(2 * n, 1.0f), 2 * n);
  std::vector<float> losses(2 * n, NAN), lse(2 * n, NAN), unit(2 * n * d, NAN), inv_norm(2 * n, NAN);
  const Buffer workspace(kernels.forward_workspace(problem, true));
  kernels.forward(problem, z0.data(), z1.data(), DType::kFloat32, true, losses.data(), lse.data(), unit.data(),
                  inv_norm.data(), workspace.aligned, nullptr);
  for (int64_t i = 0; i < 2 * n; ++i)
    CHECK_NEAR(losses[i], expected.losses[i], 1e-7 * (10 + expected.losses[i] + 1 / temperature));
}

// A row of NaN makes all losses NaN, by whichever exponential; also the forward pass by 16-bit products.
inline void nan_row(const NTXentGpuKernels& kernels, int64_t n, int64_t d, double temperature, int64_t row) {
  check::Random random{5};
  std::vector<float> z0(n * d), z1(n * d);
  for (float& x : z0) x = static_cast<float>(random.normal());
  for (float& x : z1) x = static_cast<float>(random.normal());
  z0[row * d + d / 2] = NAN;
  const NTXentProblem problem{n, d, temperature, true, 0, n};
  for (const bool reduced : {true, false}) {
    std::vector<float> losses(2 * n, 0.0f), lse(2 * n, 0.0f), unit(2 * n * d), inv_norm(2 * n);
    const Buffer workspace(kernels.forward_workspace(problem, reduced));
    kernels.forward(problem, z0.data(), z1.data(), DType::kFloat32, reduced, losses.data(), lse.data(), unit.data(),
                    inv_norm.data(), workspace.aligned, nullptr);
    for (const float loss : losses) CHECK(std::isnan(loss));
  }
}

}  // namespace scan_fast::nt_xent_test
