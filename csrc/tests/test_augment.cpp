// The GPU views, run on the host, against the CPU kernel: equal in every level and every normalised bit.
#include <cstdlib>
#include <memory>

#include "augment/augment.h"
#include "check.h"
#include "common/device.h"

namespace {

using namespace scan_fast;

int32_t bits(float value) {
  int32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

struct Case {
  int64_t count, height, width, side, steps;
  std::vector<Operation> operations;  // that the recipes draw from
  bool gather = false;
  ViewFormat format = ViewFormat::kUint8;
};

size_t bytes_per_value(ViewFormat format) {
  return format == ViewFormat::kUint8 ? 1 : format == ViewFormat::kFloat32 ? 4 : 2;
}

// Random images (noise, narrow ranges, greys, two pixel values, one pixel value) and recipes.
void compare(const Case& c, uint64_t seed) {
  check::Random random{seed};
  const int64_t stored = c.gather ? c.count + 3 : c.count;
  std::vector<uint8_t> images(static_cast<size_t>(stored * c.height * c.width * 3));
  for (int64_t i = 0; i < stored; ++i) {
    const int64_t size = c.height * c.width * 3;
    const uint8_t flat[3] = {static_cast<uint8_t>(random.bits()), static_cast<uint8_t>(random.bits()), 7};
    for (int64_t k = 0; k < size; ++k) {
      uint8_t level = static_cast<uint8_t>(random.bits());
      if (i % 5 == 1) level = static_cast<uint8_t>(100 + level / 9);
      if (i % 5 == 2 && k % 3 != 0) level = images[static_cast<size_t>(i * size + k - 1)];
      if (i % 5 == 3) level = level < 128 ? 0 : 255;
      if (i % 5 == 4) level = flat[k % 3];
      images[static_cast<size_t>(i * size + k)] = level;
    }
  }
  std::vector<int32_t> recipes;
  std::vector<int64_t> indices;
  auto below = [&](int64_t bound) { return static_cast<int64_t>(random.bits() % static_cast<uint64_t>(bound)); };
  for (int64_t i = 0; i < c.count; ++i) {
    indices.push_back(below(stored));
    int64_t height = 1 + below(c.height), width = 1 + below(c.width);
    if (i % 3 == 0) height = std::min(c.height, c.side);
    if (i % 6 == 0) width = std::min(c.width, c.side);
    const int64_t cut_top = below(c.side), cut_left = below(c.side);
    const int64_t header[kRecipeHeader] = {below(c.height - height + 1),
                                           below(c.width - width + 1),
                                           height,
                                           width,
                                           below(2),
                                           cut_top,
                                           cut_left,
                                           cut_top + below(c.side - cut_top + 1),
                                           cut_left + below(c.side - cut_left + 1)};
    for (const int64_t word : header) {
      recipes.push_back(static_cast<int32_t>(word));
    }
    for (int64_t step = 0; step < c.steps; ++step) {
      const size_t drawn = static_cast<size_t>(i + step * (1 + i / 7)) % c.operations.size();
      const Operation operation = c.operations[drawn];
      recipes.push_back(static_cast<int32_t>(operation));
      const double u = random.uniform();
      for (int k = 0; k < 6; ++k) {
        const double v = random.uniform() - 0.5, slope = (k % 3 == k / 3 ? 1 : 0) + v;
        const double shift = v * static_cast<double>(c.side);
        const double map = k % 3 == 2 ? shift : slope;
        if (operation == Operation::kNearest) {
          // Start, then per column and row.
          const double order[6] = {shift, 1 + v, v, shift, v, 1 + v};
          recipes.push_back(static_cast<int32_t>(65536 * order[k]));
        } else if (operation == Operation::kBilinear) {
          recipes.push_back(bits(static_cast<float>(map)));
        } else if (operation == Operation::kPosterize) {
          recipes.push_back(bits(static_cast<float>(below(9))));
        } else if (operation == Operation::kSolarize) {
          recipes.push_back(bits(static_cast<float>(256 * u)));
        } else {
          recipes.push_back(bits(static_cast<float>(operation == Operation::kHue ? u - 0.5 : 2 * u)));
        }
      }
    }
  }
  const size_t bytes = static_cast<size_t>(c.count * c.side * c.side * 3) * bytes_per_value(c.format);
  std::vector<uint8_t> expected(bytes, 1), got(bytes, 2);
  ViewBatch batch{images.data(),
                  c.gather ? indices.data() : nullptr,
                  recipes.data(),
                  expected.data(),
                  c.count,
                  c.height,
                  c.width,
                  c.side,
                  c.steps,
                  {0.017f, 0.021f, 0.019f},
                  {-2.1f, -1.9f, 0.3f},
                  c.format};
  augment_cpu(batch);
  batch.out = got.data();
  const size_t room = augment_cuda_workspace(batch);
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(256, (room + 255) / 256 * 256), std::free);
  std::memset(workspace.get(), 0xff, room);
  augment_cuda(batch, workspace.get(), nullptr);
  CHECK(got == expected);
}

const std::vector<Operation> kAll = {
    Operation::kIdentity,     Operation::kBrightness, Operation::kContrast, Operation::kSaturation, Operation::kHue,
    Operation::kGrayscale,    Operation::kEqualize,   Operation::kSolarize, Operation::kSharpness,  Operation::kNearest,
    Operation::kAutocontrast, Operation::kPosterize,  Operation::kBilinear};

void each_operation() {
  emu::options() = {.detect_races = true};
  for (const Operation operation : kAll) {
    compare({11, 12, 13, 11, 1, {operation}}, 1 + static_cast<uint64_t>(operation));  // four warps per image
    compare({2, 40, 31, 33, 1, {operation}}, 2 + static_cast<uint64_t>(operation));   // eight warps per image
  }
}

void operations_follow_one_another() {
  emu::options() = {.detect_races = true};
  compare({13, 16, 16, 16, 5, kAll}, 20);
  compare({6, 32, 32, 32, 4, kAll, true}, 21);
  compare({5, 34, 34, 34, 4, kAll, true}, 22);
}

void any_order_of_threads() {
  for (const uint64_t seed : {1, 2}) {
    emu::options() = {.detect_races = true, .seed = seed};
    compare({9, 18, 15, 17, 4, kAll, true}, 30);
    compare({3, 37, 35, 36, 4, kAll, true}, 31);
  }
}

void boxes_and_sizes() {
  emu::options() = {};
  compare({7, 1, 1, 1, 2, kAll}, 40);
  compare({5, 3, 50, 2, 2, kAll}, 41);
  compare({4, 60, 41, 9, 0, kAll}, 42);
  compare({4, 5, 4, 33, 1, kAll}, 43);
  compare({9, 12, 60, 20, 0, kAll}, 44);     // lower than the view and wider
  compare({9, 60, 12, 20, 0, kAll}, 45);     // higher and narrower
  compare({1, 262, 300, 261, 1, kAll}, 46);  // rows of more pixels than threads
}

void formats() {
  emu::options() = {};
  for (const ViewFormat format : {ViewFormat::kFloat32, ViewFormat::kBFloat16}) {
    compare({7, 14, 14, 14, 2, kAll, true, format}, 50);
    compare({3, 34, 34, 34, 2, kAll, true, format}, 51);
    // Four pixels at a time.
    compare({7, 16, 16, 16, 2, kAll, true, format}, 52);
    compare({3, 36, 36, 36, 2, kAll, true, format}, 53);
    compare({1, 120, 120, 120, 2, kAll, true, format}, 54);
  }
}

// Too large for shared memory: the images lie in the workspace.
void large_images() {
  emu::options() = {};
  compare({2, 130, 118, 115, 3, {Operation::kSharpness, Operation::kEqualize, Operation::kContrast}}, 60);
}

// Sides at which static and dynamic shared memory exceed 48 KB and the limit of a block. Each GPU is another device,
// on which no kernel has requested its shared memory yet.
void sides_at_the_limits_of_shared_memory() {
  for (const int capability : {86, 80, 90, 120, 75}) {
    emu::options() = {.compute_capability = capability, .device = capability};
    for (const int64_t side : {15, 16, 17, 19, 22, 23, 24, 31, 32, 33, 86, 87, 110, 111, 113, 114}) {
      compare({side > 32 ? 1 : 9, 24, 21, side, 1, {Operation::kContrast}}, 80 + static_cast<uint64_t>(side));
    }
  }
}

void no_images() {
  emu::options() = {};
  compare({0, 4, 4, 4, 1, kAll}, 70);
}

}  // namespace

int main() {
  RUN(each_operation);
  RUN(operations_follow_one_another);
  RUN(any_order_of_threads);
  RUN(boxes_and_sizes);
  RUN(formats);
  RUN(large_images);
  RUN(sides_at_the_limits_of_shared_memory);
  RUN(no_images);
  return check::finish();
}
