// The CUDA kernels of batch normalisation, run on the host, against the definition in double precision.
#include "batch_norm/batch_norm.h"
#include "logits.h"

namespace {

using namespace scan_fast;
using check::Elements;

struct Case {
  DType dtype;
  BatchNormShape shape;
  bool residual, relu, training;
  double mean = 0.3, spread = 1.5;  // of x
  size_t shift = 0;                 // elements by which x, y and their gradients miss the start of their memory
  bool running = true;
  unsigned moved = 0;  // those below that miss it by one element more
};

constexpr unsigned kX = 1, kResidual = 2, kY = 4, kGradY = 8, kGradX = 16, kGradResidual = 32;

struct Inputs {
  Elements x, residual, grad_y;
  std::vector<float> weight, bias, running_mean, running_var;
};

struct Results {
  Elements y, grad_x, grad_residual;
  std::vector<float> mean, inv_std, running_mean, running_var, grad_weight, grad_bias;

  bool operator==(const Results& other) const = default;
};

constexpr float kMomentum = 0.1f, kEps = 1e-5f;

Inputs inputs_of(const Case& c, uint64_t seed) {
  const size_t n = c.shape.rows * c.shape.channels, channels = c.shape.channels;
  check::Random random{seed};
  Inputs in{
      Elements(c.dtype, n + c.shift), Elements(c.dtype, n + c.shift), Elements(c.dtype, n + c.shift), {}, {}, {}, {}};
  for (size_t i = 0; i < n; ++i) {
    in.x.set(c.shift + i, c.mean + c.spread * random.normal());
    in.residual.set(c.shift + i, random.normal());
    in.grad_y.set(c.shift + i, random.normal());
  }
  for (size_t k = 0; k < channels; ++k) {
    in.weight.push_back(static_cast<float>(random.normal()));
    in.bias.push_back(static_cast<float>(0.5 * random.normal()));
    in.running_mean.push_back(static_cast<float>(c.mean + 0.2 * random.normal()));
    in.running_var.push_back(static_cast<float>(c.spread * c.spread * (0.5 + random.uniform())));
  }
  return in;
}

// A tensor as a kernel gets it: a copy that begins one element further on if its case says so. `back` copies the values
// into the original.
struct Argument {
  Elements memory;
  size_t start, bytes;
  Argument(const Case& c, const Elements& values, unsigned which)
      : memory(c.dtype, values.size() + (c.moved & which ? 1 : 0)) {
    const size_t element = c.dtype == DType::kFloat32 ? 4 : 2;
    start = c.moved & which ? element : 0;
    bytes = element * values.size();
    std::memcpy(static_cast<char*>(memory.data()) + start, values.data(), bytes);
  }
  void* at(size_t offset) { return static_cast<char*>(memory.data()) + start + offset; }
  void back(Elements& values) { std::memcpy(values.data(), at(0), bytes); }
};

Results run(const Case& c, const Inputs& in) {
  const size_t n = c.shape.rows * c.shape.channels + c.shift, channels = c.shape.channels;
  const size_t start = c.shift * (c.dtype == DType::kFloat32 ? 4 : 2);
  const std::vector<float> nothing(channels, NAN);
  Results r{Elements(c.dtype, n),
            Elements(c.dtype, n),
            Elements(c.dtype, n),
            nothing,
            nothing,
            in.running_mean,
            in.running_var,
            nothing,
            nothing};
  Argument x(c, in.x, kX), residual(c, in.residual, kResidual), grad_y(c, in.grad_y, kGradY), y(c, r.y, kY),
      grad_x(c, r.grad_x, kGradX), grad_residual(c, r.grad_residual, kGradResidual);
  const bool keep = c.residual && c.relu;
  std::vector<uint16_t> mask(keep ? batch_norm_mask_words(c.shape) : 0, 0xffff);
  std::vector<unsigned char> workspace(batch_norm_cuda_workspace(c.shape), 0xff);
  batch_norm_forward_cuda(c.dtype, c.shape,
                          {x.at(start), c.residual ? residual.at(start) : nullptr, in.weight.data(), in.bias.data(),
                           c.running ? r.running_mean.data() : nullptr, c.running ? r.running_var.data() : nullptr,
                           y.at(start), r.mean.data(), r.inv_std.data(), keep ? mask.data() : nullptr, workspace.data(),
                           kMomentum, kEps, c.training, c.relu},
                          nullptr);
  std::fill(workspace.begin(), workspace.end(), 0xff);
  batch_norm_backward_cuda(
      c.dtype, c.shape,
      {grad_y.at(start), x.at(start), in.weight.data(), in.bias.data(), r.mean.data(), r.inv_std.data(),
       keep ? mask.data() : nullptr, grad_x.at(start), c.residual ? grad_residual.at(start) : nullptr,
       r.grad_weight.data(), r.grad_bias.data(), workspace.data(), c.training, c.relu},
      nullptr);
  y.back(r.y);
  grad_x.back(r.grad_x);
  grad_residual.back(r.grad_residual);
  return r;
}

void compare(const Case& c, const Inputs& in, const Results& r) {
  const size_t rows = c.shape.rows, channels = c.shape.channels;
  const double count = static_cast<double>(rows), step = 6e-8 * (std::fabs(c.mean) + 3 * c.spread);
  for (size_t k = 0; k < channels; ++k) {
    auto at = [&](size_t row) { return c.shift + row * channels + k; };
    double mean = in.running_mean[k], var = in.running_var[k];
    if (c.training) {
      mean = var = 0;
      for (size_t i = 0; i < rows; ++i) mean += in.x.get(at(i)) / count;
      for (size_t i = 0; i < rows; ++i) var += std::pow(in.x.get(at(i)) - mean, 2) / count;
      const double unbiased = var * count / (count - 1);
      if (c.running) {
        CHECK_NEAR(r.running_mean[k], 0.9 * in.running_mean[k] + 0.1 * mean, 2 * step);
        CHECK_NEAR(r.running_var[k], 0.9 * in.running_var[k] + 0.1 * unbiased, 1e-6 * (in.running_var[k] + unbiased));
      }
    }
    if (!c.training || !c.running) {
      CHECK(r.running_mean[k] == in.running_mean[k] && r.running_var[k] == in.running_var[k]);
    }
    const double inv_std = 1 / std::sqrt(var + static_cast<double>(kEps)), scale = in.weight[k] * inv_std;
    CHECK_NEAR(r.mean[k], mean, 2 * step);
    CHECK_NEAR(r.inv_std[k], inv_std, 2e-6 * inv_std);
    double sum = 0, product = 0, sum_of_all = 0, product_of_all = 0;
    std::vector<double> dz(rows);
    for (size_t i = 0; i < rows; ++i) {
      const double x = in.x.get(at(i)), before = (x - mean) * scale + in.bias[k];
      const double value = before + (c.residual ? in.residual.get(at(i)) : 0.0);
      const double slack = 4e-6 * (std::fabs(scale * (x - mean)) + 1) + 2 * step * std::fabs(scale);
      CHECK_NEAR(r.y.get(at(i)), c.relu && value < 0 ? 0.0 : value,
                 check::rounding(c.dtype) * std::fabs(value) + slack + check::smallest(c.dtype));
      // Near zero, both signs are right; that of the forward pass counts.
      dz[i] = !c.relu || r.y.get(at(i)) > 0 ? in.grad_y.get(at(i)) : 0.0;
      if (c.residual) CHECK(r.grad_residual.get(at(i)) == dz[i]);
      sum += dz[i];
      product += dz[i] * (x - mean) * inv_std;
      sum_of_all += std::fabs(dz[i]);
      product_of_all += std::fabs(dz[i] * (x - mean) * inv_std);
    }
    const double off = 2 * step * inv_std;  // of the normalised x, by the rounding of the mean
    CHECK_NEAR(r.grad_bias[k], sum, 2e-6 * sum_of_all);
    CHECK_NEAR(r.grad_weight[k], product, 4e-6 * product_of_all + off * sum_of_all);
    for (size_t i = 0; i < rows; ++i) {
      const double normal = (in.x.get(at(i)) - mean) * inv_std;
      const double grad = scale * (c.training ? dz[i] - sum / count - normal * product / count : dz[i]);
      const double size = std::fabs(dz[i]) + (sum_of_all + (std::fabs(normal) + off) * product_of_all) / count;
      CHECK_NEAR(r.grad_x.get(at(i)), grad,
                 check::rounding(c.dtype) * std::fabs(grad) + (8e-6 + 4 * off) * std::fabs(scale) * size +
                     check::smallest(c.dtype));
    }
  }
}

void check_case(const Case& c, uint64_t seed) {
  const Inputs in = inputs_of(c, seed);
  compare(c, in, run(c, in));
}

void matches_the_definition() {
  const BatchNormShape shapes[] = {{2, 1},    {700, 1}, {5, 3},    {130, 8}, {33, 24}, {40, 33},
                                   {300, 64}, {9, 130}, {20, 136}, {3, 264}, {70, 80}};
  uint64_t seed = 1;
  for (const DType dtype : check::kDTypes) {
    for (const BatchNormShape& shape : shapes) {
      for (const bool residual : {false, true}) {
        for (const bool relu : {false, true}) {
          for (const bool training : {false, true}) {
            emu::options() = {.detect_races = true, .seed = ++seed};
            check_case({dtype, shape, residual, relu, training}, seed);
          }
        }
      }
    }
  }
}

void rows_that_start_anywhere() {
  for (const DType dtype : check::kDTypes) {
    emu::options() = {.detect_races = true, .seed = 3};
    check_case({.dtype = dtype, .shape = {50, 16}, .residual = true, .relu = true, .training = true, .shift = 1}, 7);
  }
}

// The forward pass may find all addresses of 16 bytes and the backward pass not, or the other way round: they must
// agree on the bits of the mask.
void addresses_that_differ_between_passes() {
  for (const DType dtype : check::kDTypes) {
    for (const int64_t channels : {8, 16, 64, 136, 264, 20}) {
      for (const unsigned moved : {0u, kResidual, kY, kGradY, kGradX, kGradResidual, kResidual | kGradY, kX}) {
        emu::options() = {.detect_races = true, .seed = moved + 1};
        check_case({.dtype = dtype,
                    .shape = {64, channels},
                    .residual = true,
                    .relu = true,
                    .training = moved != kY,
                    .moved = moved},
                   200 + moved);
      }
    }
  }
}

void many_multiprocessors() {
  for (const int count : {1, 132}) {
    emu::options() = {.seed = 5, .multiprocessors = count};
    check_case({DType::kBFloat16, {2000, 16}, true, true, true}, 11);
    check_case({DType::kFloat32, {150, 256}, false, true, true}, 12);
  }
}

void large_means_cancel_nothing() {
  emu::options() = {};
  for (const double mean : {1e3, 1e5}) {
    check_case({.dtype = DType::kFloat32,
                .shape = {3000, 8},
                .residual = false,
                .relu = true,
                .training = true,
                .mean = mean,
                .spread = 1.0},
               13);
  }
  check_case({.dtype = DType::kBFloat16,
              .shape = {3000, 8},
              .residual = true,
              .relu = true,
              .training = true,
              .mean = 100,
              .spread = 1.0},
             14);
  // A first row far from all others: the distances from it are large, and so is their mean.
  Case c{DType::kFloat32, {3000, 8}, false, false, true};
  Inputs in = inputs_of(c, 15);
  c.mean = 3000;
  for (size_t k = 0; k < 8; ++k) in.x.set(k, 3000.0);
  compare(c, in, run(c, in));
}

void constant_channels() {
  emu::options() = {};
  const Case c{.dtype = DType::kFloat32,
               .shape = {500, 16},
               .residual = false,
               .relu = false,
               .training = true,
               .mean = 1234.567,
               .spread = 0.0};
  const Inputs in = inputs_of(c, 17);
  const Results r = run(c, in);
  for (size_t i = 0; i < in.x.size(); ++i) CHECK(r.y.get(i) == static_cast<double>(in.bias[i % 16]));
  for (size_t k = 0; k < 16; ++k) CHECK(r.grad_weight[k] == 0.0f);
}

void without_running_statistics() {
  emu::options() = {};
  check_case(
      {.dtype = DType::kFloat32, .shape = {60, 9}, .residual = false, .relu = true, .training = true, .running = false},
      19);
}

void one_row_in_evaluation() {
  emu::options() = {.detect_races = true, .seed = 4};
  for (const int64_t channels : {1, 8, 17, 300}) {
    check_case({DType::kFloat16, {1, channels}, true, true, false}, 21);
    check_case({DType::kFloat32, {1, channels}, false, true, false}, 22);
  }
}

void what_is_not_finite_spreads() {
  emu::options() = {};
  for (const int64_t channels : {8, 5}) {
    for (const bool training : {true, false}) {
      const Case c{DType::kFloat32, {200, channels}, false, true, training};
      Inputs in = inputs_of(c, 23);
      for (float& weight : in.weight) weight = 1.0f;
      const size_t row = 77, base = row * channels;
      in.x.set(base, check::kInfinity);
      in.x.set(base + 1, NAN);
      in.x.set(base + 2, -check::kInfinity);
      const Results r = run(c, in);
      for (size_t i = 0; i < in.x.size(); ++i) {
        const size_t k = i % channels;
        if (training) {
          CHECK(std::isnan(r.y.get(i)) == (k < 3) && std::isnan(r.grad_x.get(i)) == (k < 3));
        } else {
          CHECK(std::isnan(r.y.get(i)) == (i == base + 1) && std::isfinite(r.grad_x.get(i)));
        }
      }
      if (!training) {
        CHECK(r.y.get(base) == check::kInfinity && r.y.get(base + 2) == 0.0);
        CHECK_NEAR(r.grad_x.get(base), r.inv_std[0] * in.grad_y.get(base), 1e-6);
      }
    }
  }
}

void same_bits_in_any_order() {
  for (const BatchNormShape& shape : {BatchNormShape{1000, 24}, BatchNormShape{300, 136}, BatchNormShape{900, 3}}) {
    const Case c{DType::kBFloat16, shape, true, true, true};
    const Inputs in = inputs_of(c, 25);
    emu::options() = {};
    const Results first = run(c, in);
    for (const uint64_t seed : {1, 2, 3}) {
      emu::options() = {.detect_races = true, .seed = seed};
      CHECK(run(c, in) == first);
    }
  }
}

}  // namespace

int main() {
  RUN(matches_the_definition);
  RUN(rows_that_start_anywhere);
  RUN(addresses_that_differ_between_passes);
  RUN(many_multiprocessors);
  RUN(large_means_cancel_nothing);
  RUN(constant_channels);
  RUN(without_running_statistics);
  RUN(one_row_in_evaluation);
  RUN(what_is_not_finite_spreads);
  RUN(same_bits_in_any_order);
  return check::finish();
}
