// The bfloat16 convolutions, usable with AMX or AVX-512-BF16 only, and the float32 weight gradient, against the definition
// in double precision.
#include "convolution/bf16_tiles.h"
#include "convolution/convolution.h"
#include "cpu_check.h"
#include "logits.h"

namespace {

using namespace scan_fast;
using check::Elements;

void only_with_bfloat16_products() {
  const ConvolutionShape shape{32, 8, 8, 32, 8, 8, 64, 3, 1, 1};
  CHECK(convolution_is_usable(shape) == convolution::bf16_tiles_are_usable());
  ConvolutionShape odd = shape;
  odd.out_channels = 65;
  CHECK(!convolution_is_usable(odd));
}

void matches_the_definition() {
  for (const int64_t stride : {1, 2}) {
    const int64_t batch = 35, side = 6, out = (side + 2 - 3) / stride + 1, in_channels = 32, out_channels = 64;
    const ConvolutionShape shape{batch, side, side, in_channels, out, out, out_channels, 3, stride, 1};
    if (!convolution_is_usable(shape)) return;
    const size_t n_x = batch * side * side * in_channels, n_y = batch * out * out * out_channels;
    const Elements x = check::normal_logits(DType::kBFloat16, n_x, 1, 1);
    const Elements grad_y = check::normal_logits(DType::kBFloat16, n_y, 1, 2);
    const Elements rounded = check::normal_logits(DType::kBFloat16, out_channels * 9 * in_channels, 0.1, 3);
    std::vector<float> weight(rounded.size()), grad_weight(rounded.size(), NAN);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(rounded.get(i));
    Elements y(DType::kBFloat16, n_y), grad_x(DType::kBFloat16, n_x);
    const auto pass = [&](ConvolutionPass which, auto run) {
      const size_t bytes = (convolution_workspace(shape, which) + 63) / 64 * 64;
      void* const workspace = std::aligned_alloc(64, bytes + 64);
      std::memset(workspace, 0xff, bytes);
      run(workspace);
      std::free(workspace);
    };
    const auto words = [](const Elements& of) { return static_cast<const uint16_t*>(of.data()); };
    pass(ConvolutionPass::kForward, [&](void* workspace) {
      convolution_forward(shape, words(x), weight.data(), static_cast<uint16_t*>(y.data()), workspace);
    });
    pass(ConvolutionPass::kGradInput, [&](void* workspace) {
      convolution_grad_input(shape, words(grad_y), weight.data(), nullptr, static_cast<uint16_t*>(grad_x.data()),
                             workspace);
    });
    pass(ConvolutionPass::kGradWeight, [&](void* workspace) {
      convolution_grad_weight(shape, words(grad_y), words(x), grad_weight.data(), workspace);
    });
    std::vector<double> exact_y(n_y, 0.0), exact_x(n_x, 0.0), exact_weight(weight.size(), 0.0);
    for (int64_t i = 0; i < batch * out * out * 9; ++i) {
      const int64_t tap = i % 9, q = i / 9 % out, p = i / 9 / out % out, image = i / 9 / out / out;
      const int64_t row = p * stride + tap / 3 - 1, column = q * stride + tap % 3 - 1;
      if (row < 0 || row >= side || column < 0 || column >= side) continue;
      const size_t from = ((image * side + row) * side + column) * in_channels, to = i / 9 * out_channels;
      for (int64_t o = 0; o < out_channels; ++o) {
        const double dy = grad_y.get(to + o);
        for (int64_t c = 0; c < in_channels; ++c) {
          const size_t w = (o * 9 + tap) * in_channels + c;
          exact_y[to + o] += x.get(from + c) * static_cast<double>(weight[w]);
          exact_x[from + c] += dy * static_cast<double>(weight[w]);
          exact_weight[w] += dy * x.get(from + c);
        }
      }
    }
    const double rounding = check::rounding(DType::kBFloat16);
    for (size_t i = 0; i < n_y; ++i) CHECK_NEAR(y.get(i), exact_y[i], rounding * std::fabs(exact_y[i]) + 1e-5);
    for (size_t i = 0; i < n_x; ++i) CHECK_NEAR(grad_x.get(i), exact_x[i], rounding * std::fabs(exact_x[i]) + 1e-5);
    for (size_t i = 0; i < weight.size(); ++i) CHECK_NEAR(grad_weight[i], exact_weight[i], 1e-4);
  }
}

struct Geometry {
  int64_t batch, in_channels, out_channels, height, width, kernel, stride, padding;
};

// Chunks of rows and of images, register tiles that are whole and not, phases of strides, borders of every width: zeros
// that rows and images share, a chunk with fewer images than the others, and no image at all.
void float32_weight_gradient() {
  for (const Geometry& g : {Geometry{3, 16, 24, 8, 8, 3, 1, 1},
                            {2, 17, 7, 30, 12, 3, 2, 1},
                            {30, 33, 13, 4, 4, 3, 1, 1},
                            {1, 1, 1, 1, 1, 1, 1, 0},
                            {2, 5, 9, 11, 40, 5, 3, 2},
                            {2, 8, 5, 10, 10, 2, 4, 0},
                            {1, 3, 6, 3, 400, 3, 1, 1},
                            {20, 19, 8, 5, 3, 5, 1, 2},
                            {25, 4, 7, 4, 5, 3, 1, 2},
                            {25, 5, 7, 5, 5, 4, 2, 2},
                            {25, 5, 9, 5, 5, 3, 2, 1},
                            {9, 16, 6, 6, 7, 4, 2, 1},
                            {40, 3, 5, 6, 5, 2, 3, 2},
                            {2, 33, 12, 30, 9, 5, 2, 2},
                            {0, 3, 5, 4, 4, 3, 1, 1}}) {
    const auto out = [&](int64_t in) { return (in + 2 * g.padding - g.kernel) / g.stride + 1; };
    const int64_t out_height = out(g.height), out_width = out(g.width), taps = g.kernel * g.kernel;
    check::Random random{static_cast<uint64_t>(g.batch * 100 + g.in_channels)};
    std::vector<float> x(g.batch * g.height * g.width * g.in_channels);
    std::vector<float> grad_y(g.batch * out_height * out_width * g.out_channels);
    std::vector<float> found(g.out_channels * taps * g.in_channels, NAN);
    for (float& value : x) value = static_cast<float>(random.normal());
    for (float& value : grad_y) value = static_cast<float>(random.normal());
    convolution_grad_weight_float32({g.batch, g.height, g.width, g.in_channels, out_height, out_width, g.out_channels,
                                     g.kernel, g.stride, g.padding},
                                    grad_y.data(), x.data(), found.data());
    std::vector<double> exact(found.size(), 0.0);
    for (int64_t i = 0; i < g.batch * out_height * out_width * taps; ++i) {
      const int64_t tap = i % taps, q = i / taps % out_width, p = i / taps / out_width % out_height;
      const int64_t image = i / taps / out_width / out_height;
      const int64_t row = p * g.stride + tap / g.kernel - g.padding, column = q * g.stride + tap % g.kernel - g.padding;
      if (row < 0 || row >= g.height || column < 0 || column >= g.width) continue;
      const int64_t from = ((image * g.height + row) * g.width + column) * g.in_channels,
                    of = i / taps * g.out_channels;
      for (int64_t o = 0; o < g.out_channels; ++o) {
        for (int64_t c = 0; c < g.in_channels; ++c) {
          exact[(o * taps + tap) * g.in_channels + c] +=
              static_cast<double>(grad_y[of + o]) * static_cast<double>(x[from + c]);
        }
      }
    }
    for (size_t i = 0; i < found.size(); ++i) CHECK_NEAR(found[i], exact[i], 1e-4);
  }
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(only_with_bfloat16_products);
  RUN(matches_the_definition);
  RUN(float32_weight_gradient);
  return check::finish();
}
