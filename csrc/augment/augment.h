// Views of a batch of images in one pass: uint8 pixels and a recipe per image in, a normalised view out. The contract.
//
// Everything random has been drawn before: a recipe says which box to cut out, whether to mirror it, which operations
// follow one after another, and which box is zero after normalisation. The levels are whole numbers 0..255 after every
// operation, with PIL's rounding and truncation, so a view is the same on every device, with every instruction set,
// for any number of threads and in any batch; only the normalised values' last bit is a matter of float32 rounding, and
// it is the same too (no fused multiply-add).
//
// A recipe is kRecipeHeader + steps * kRecipeStep words of 32 bits:
//   top, left, height, width     the box in source pixels, within the image; resized to (side, side)
//   flip                         0 or 1: mirror left-right after the resize
//   top, left, bottom, right     the cutout in output pixels, within (side, side); empty where bottom <= top
//   steps times: operation, then six words of arguments, the unused ones anything
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace scan_fast {

constexpr int kRecipeHeader = 9, kRecipeStep = 7;
constexpr int kMaxViewSide = 16384;  // of source and view: positions are held in 16.16 fixed point

// The first argument is a float32 unless said otherwise.
enum class Operation : int32_t {
  kIdentity = 0,
  kBrightness,    // factor: blend with black
  kContrast,      // factor: blend with the mean grey of the image as it is then
  kSaturation,    // factor: blend with the luma
  kHue,           // shift as a fraction of the circle
  kGrayscale,
  kAutocontrast,  // stretch each channel's range to 0..255
  kEqualize,      // flatten each channel's histogram
  kSolarize,      // invert the levels from this one on
  kPosterize,     // keep this many of the highest bits
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
  void* out;               // (count, side, side, 3): uint8 before normalisation, or level * scale + shift and cutout
  int64_t count, height, width, side, steps;
  float scale[3], shift[3];
  ViewFormat format;
};

inline int64_t recipe_words(int64_t steps) { return kRecipeHeader + steps * kRecipeStep; }

void augment_cpu(const ViewBatch& batch);

// On the current device; the pointers are device memory. Throws std::runtime_error where CUDA refuses a launch.
size_t augment_cuda_workspace(const ViewBatch& batch);
void augment_cuda(const ViewBatch& batch, void* workspace, StreamHandle stream);

}  // namespace scan_fast
