// Interface of the augment kernels: render one view (augmented version) of each image of a batch in a single pass.
// Input: uint8 pixels and one recipe per image. Output: the normalised view.
//
// The kernels draw nothing at random. A recipe states the crop box, the mirror flag, the sequence of operations, and
// the box that is zeroed after normalisation. After every operation the pixel values are integers 0..255, with PIL's
// rounding and truncation. So a view is bit-identical on every device, with every instruction set, for any number of
// threads and in any batch. Normalisation rounds once in float32 and uses no fused multiply-add, so it is bit-identical
// as well.
//
// A recipe is kRecipeHeader + steps * kRecipeStep words of 32 bits:
//   top, left, height, width     crop box in source pixels, within the image; resized to (side, side)
//   flip                         0 or 1: mirror left-right after the resize
//   top, left, bottom, right     cutout in output pixels, within (side, side); empty if bottom <= top
//   then per step: the operation and six argument words; unused words may hold anything
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

constexpr int kRecipeHeader = 9, kRecipeStep = 7;
constexpr int kMaxViewSide = 16384;  // largest side of source and view: positions are 16.16 fixed point

// The first argument is a float32 unless stated otherwise.
enum class Operation : int32_t {
  kIdentity = 0,
  kBrightness,  // factor: blend with black
  kContrast,    // factor: blend with the mean grey of the image at this step
  kSaturation,  // factor: blend with the luma
  kHue,         // shift as a fraction of the hue circle
  kGrayscale,
  kAutocontrast,  // stretch each channel's range to 0..255
  kEqualize,      // flatten each channel's histogram
  kSolarize,      // threshold: invert pixel values at or above it
  kPosterize,     // number of high bits to keep
  kSharpness,     // factor: blend with the smoothed image
  kNearest,       // six int32, 16.16 fixed point: start x, x per column, x per row, start y, y per column, y per row
  kBilinear,      // six float32 a, b, c, d, e, f: output (x, y) shows the input at (a x + b y + c, d x + e y + f)
  kCount
};

enum class ViewFormat : int32_t { kUint8 = 0, kFloat32 = 1, kBFloat16 = 2 };

struct ViewBatch {
  const uint8_t* images;   // (N, height, width, 3)
  const int64_t* indices;  // (count) rows of images, or null for the first `count`
  const int32_t* recipes;  // (count, kRecipeHeader + steps * kRecipeStep)
  void* out;               // (count, side, side, 3): uint8 pixel values, or value * scale + shift with the cutout
  int64_t count, height, width, side, steps;
  float scale[3], shift[3];
  ViewFormat format;
};

inline int64_t recipe_words(int64_t steps) { return kRecipeHeader + steps * kRecipeStep; }

void augment_cpu(const ViewBatch& batch);

// Runs on the current device; the pointers are device memory. Throws std::runtime_error if CUDA refuses a launch.
size_t augment_cuda_workspace(const ViewBatch& batch);
void augment_cuda(const ViewBatch& batch, void* workspace, StreamHandle stream);

}  // namespace scan_fast
