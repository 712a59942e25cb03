// Tensor layer of the augment family: checks, allocation, device dispatch.
//
// Recipes and indices are on the CPU, where they are drawn. So everything that decides which memory a kernel touches is
// checked here without a device synchronisation.
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "augment/augment.h"
#include "common/large_buffers.h"
#include "common/op_utils.h"

namespace scan_fast {
namespace {

ViewFormat format_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kByte: return ViewFormat::kUint8;
    case at::kFloat: return ViewFormat::kFloat32;
    case at::kBFloat16: return ViewFormat::kBFloat16;
    default: TORCH_CHECK_VALUE(false, "dtype must be uint8, float32 or bfloat16, got ", dtype);
  }
}

// Limits of an operation's arguments. Beyond them, and for NaN, positions and steps would not fit into integers.
constexpr float kMostTurns = 1e6f;    // of a hue shift
constexpr float kMostPixels = 1e30f;  // of a coefficient of kBilinear: sums of their products stay finite

void check_arguments(Operation operation, const int32_t* words, int64_t image) {
  float amounts[kRecipeStep - 1];
  std::memcpy(amounts, words, sizeof(amounts));
  const float amount = amounts[0];
  switch (operation) {
    case Operation::kBrightness:
    case Operation::kContrast:
    case Operation::kSaturation:
    case Operation::kSharpness:
      TORCH_CHECK_VALUE(std::isfinite(amount), "recipes: image ", image, " has the factor ", amount,
                        ", which must be finite");
      return;
    case Operation::kHue:
      TORCH_CHECK_VALUE(std::abs(amount) <= kMostTurns, "recipes: image ", image, " shifts the hue by ", amount,
                        " turns; from -", kMostTurns, " to ", kMostTurns, " are possible");
      return;
    case Operation::kSolarize:
      TORCH_CHECK_VALUE(!std::isnan(amount), "recipes: image ", image, " has the threshold NaN");
      return;
    case Operation::kPosterize:
      TORCH_CHECK_VALUE(amount >= 0 && amount <= 8, "recipes: image ", image, " asks to keep ", amount,
                        " bits; 0 to 8 are possible");
      return;
    case Operation::kBilinear:
      for (const float coefficient : amounts) {
        TORCH_CHECK_VALUE(std::abs(coefficient) <= kMostPixels, "recipes: image ", image,
                          " has the bilinear coefficient ", coefficient, "; from -", kMostPixels, " to ", kMostPixels,
                          " are possible");
      }
      return;
    default: return;
  }
}

void check_recipes(const ViewBatch& batch) {
  const int64_t words = recipe_words(batch.steps), side = batch.side;
  for (int64_t i = 0; i < batch.count; ++i) {
    const int32_t* r = batch.recipes + i * words;
    const int64_t top = r[0], left = r[1], height = r[2], width = r[3];
    TORCH_CHECK_VALUE(top >= 0 && left >= 0 && height >= 1 && width >= 1 && top + height <= batch.height &&
                          left + width <= batch.width,
                      "recipes: the box of image ", i, " (top ", top, ", left ", left, ", height ", height, ", width ",
                      width, ") must lie within ", batch.height, " x ", batch.width, " pixels");
    TORCH_CHECK_VALUE(r[5] >= 0 && r[6] >= 0 && r[7] <= side && r[8] <= side, "recipes: the cutout of image ", i,
                      " must lie within ", side, " x ", side, " pixels");
    for (int64_t step = 0; step < batch.steps; ++step) {
      const int32_t* words_of_step = r + kRecipeHeader + step * kRecipeStep;
      const int32_t operation = words_of_step[0];
      TORCH_CHECK_VALUE(operation >= 0 && operation < static_cast<int32_t>(Operation::kCount), "recipes: image ", i,
                        " asks for operation ", operation, ", which does not exist");
      check_arguments(static_cast<Operation>(operation), words_of_step + 1, i);
    }
  }
}

at::Tensor to_output(const at::Tensor& interleaved, ViewFormat format) {
  return format == ViewFormat::kUint8 ? interleaved : interleaved.permute({0, 3, 1, 2});
}

#ifdef SCAN_FAST_WITH_CUDA
// Copies to the device without blocking the host.
at::Tensor copy_async(const at::Tensor& tensor, const at::Device& device) {
  return tensor.pin_memory().to(device, /*non_blocking=*/true);
}
#endif

// images (N, H, W, 3) uint8; indices (n) int64 on the CPU or none; recipes (n, words) int32 on the CPU, see augment.h.
// Returns (n, size, size, 3) uint8, or (n, 3, size, size) float32 or bfloat16 in channels_last memory, on the images'
// device.
at::Tensor augment(const at::Tensor& images, const std::optional<at::Tensor>& indices, const at::Tensor& recipes,
                   int64_t size, std::vector<double> scale, std::vector<double> shift, at::ScalarType dtype) {
  check_readable(images, "images");
  check_readable(recipes, "recipes");
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(3) == 3 && images.scalar_type() == at::kByte,
                    "images must be (N, H, W, 3) uint8, got ", images.sizes(), " ", images.scalar_type());
  TORCH_CHECK_VALUE(recipes.dim() == 2 && recipes.scalar_type() == at::kInt && recipes.device().is_cpu() &&
                        recipes.size(1) >= kRecipeHeader && (recipes.size(1) - kRecipeHeader) % kRecipeStep == 0,
                    "recipes must be (n, ", kRecipeHeader, " + steps * ", kRecipeStep, ") int32 on the CPU, got ",
                    recipes.sizes(), " ", recipes.scalar_type(), " on ", recipes.device());
  TORCH_CHECK_VALUE(
      size >= 1 && size <= kMaxViewSide && images.size(1) <= kMaxViewSide && images.size(2) <= kMaxViewSide,
      "size and the images' sides must be from 1 to ", kMaxViewSide, ", got ", size, " and ", images.sizes());
  TORCH_CHECK_VALUE(scale.size() == 3 && shift.size() == 3, "scale and shift must be 3 numbers each, got ",
                    scale.size(), " and ", shift.size());
  for (const double number : scale) check_finite(number, "scale");
  for (const double number : shift) check_finite(number, "shift");
  const at::Tensor pixels = images.contiguous();
  at::Tensor plan = *dense(recipes, "recipes"), rows;
  if (indices.has_value() && indices->defined()) {
    rows = *dense(*indices, "indices");
    TORCH_CHECK_VALUE(
        rows.dim() == 1 && rows.scalar_type() == at::kLong && rows.device().is_cpu() && rows.size(0) == plan.size(0),
        "indices must be (", plan.size(0), ",) int64 on the CPU, got ", rows.sizes(), " ", rows.scalar_type(), " on ",
        rows.device());
    const int64_t* index = rows.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows.size(0); ++i) {
      TORCH_CHECK_VALUE(index[i] >= 0 && index[i] < pixels.size(0), "indices must be from 0 to ", pixels.size(0) - 1,
                        ", got ", index[i]);
    }
  } else {
    TORCH_CHECK_VALUE(plan.size(0) == pixels.size(0), "recipes must have a row for each of the ", pixels.size(0),
                      " images, got ", plan.size(0));
  }
  ViewBatch batch{pixels.const_data_ptr<uint8_t>(),
                  rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr,
                  plan.const_data_ptr<int32_t>(),
                  nullptr,
                  plan.size(0),
                  pixels.size(1),
                  pixels.size(2),
                  size,
                  (plan.size(1) - kRecipeHeader) / kRecipeStep,
                  {},
                  {},
                  format_of(dtype)};
  for (int c = 0; c < 3; ++c) {
    batch.scale[c] = static_cast<float>(scale[c]);
    batch.shift[c] = static_cast<float>(shift[c]);
  }
  check_recipes(batch);
  at::Tensor out = empty_large({batch.count, size, size, 3}, pixels.options().dtype(dtype));
  batch.out = out.data_ptr();
  if (batch.count > 0) {
#ifdef SCAN_FAST_WITH_CUDA
    if (pixels.is_cuda()) {
      const c10::cuda::CUDAGuard guard(pixels.device());
      plan = copy_async(plan, pixels.device());
      batch.recipes = plan.const_data_ptr<int32_t>();
      if (rows.defined()) {
        rows = copy_async(rows, pixels.device());
        batch.indices = rows.const_data_ptr<int64_t>();
      }
      const at::Tensor workspace =
          at::empty({static_cast<int64_t>(augment_cuda_workspace(batch))}, pixels.options().dtype(at::kByte));
      augment_cuda(batch, workspace.data_ptr(), current_stream());
      return to_output(out, batch.format);
    }
#endif
    augment_cpu(batch);
  }
  return to_output(out, batch.format);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(scan_fast, m) {
  m.def(
      "augment(Tensor images, Tensor? indices, Tensor recipes, int size, float[] scale, float[] shift, "
      "ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(scan_fast, CPU, m) { m.impl("augment", &augment); }
#ifdef SCAN_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(scan_fast, CUDA, m) { m.impl("augment", &augment); }
#endif

}  // namespace scan_fast
