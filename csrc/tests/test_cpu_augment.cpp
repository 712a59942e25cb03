// The CPU kernel of the views: the same bits on every processor. tests/ops compares them with PIL; here a digest that was
// found with AVX2 stands for them.
#include "augment/augment.h"
#include "cpu_check.h"

namespace {

using namespace scan_fast;

int32_t bits(float value) {
  int32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

uint64_t digest(uint64_t hash, const std::vector<uint8_t>& bytes) {
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3ull;
  return hash;
}

// One view of each of 6 images: one operation in one half of them, three in the other. Only whole numbers and exact
// quotients are drawn, so that the recipes are the same everywhere.
uint64_t views(ViewFormat format) {
  check::Random random{7};
  const auto below = [&](int64_t bound) { return static_cast<int64_t>(random.bits() % static_cast<uint64_t>(bound)); };
  uint64_t hash = 0xcbf29ce484222325ull;
  for (int operation = 0; operation < static_cast<int>(Operation::kCount); ++operation) {
    const int64_t count = 6, height = 21, width = 26, side = operation % 2 ? 19 : 33, steps = operation % 3 ? 1 : 3;
    std::vector<uint8_t> images(count * height * width * 3);
    for (size_t i = 0; i < images.size(); ++i) {
      images[i] = static_cast<uint8_t>(i % 7 < 3 ? random.bits() : 100 + random.bits() % 30);
    }
    std::vector<int32_t> recipes;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t box_height = 1 + below(height), box_width = 1 + below(width);
      const int64_t top = below(side), left = below(side);
      for (const int64_t word : {below(height - box_height + 1), below(width - box_width + 1), box_height, box_width,
                                 below(2), top, left, top + below(side - top + 1), left + below(side - left + 1)}) {
        recipes.push_back(static_cast<int32_t>(word));
      }
      for (int64_t step = 0; step < steps; ++step) {
        const int kind = (operation + static_cast<int>(step * (1 + i))) % static_cast<int>(Operation::kCount);
        recipes.push_back(kind);
        for (int k = 0; k < 6; ++k) {
          const float share = static_cast<float>(below(1025)) / 1024;  // 0 to 1
          const bool diagonal = k == 0 || k == 4, shift = k % 3 == 2;
          switch (static_cast<Operation>(kind)) {
            case Operation::kNearest:
              recipes.push_back(static_cast<int32_t>(65536 * (k == 1 || k == 5 ? 1 : 0)) +
                                static_cast<int32_t>(below(40000)) - 20000);
              break;
            case Operation::kBilinear:
              recipes.push_back(bits((diagonal ? 1.0f : 0.0f) + (share - 0.5f) * (shift ? 10.0f : 0.5f)));
              break;
            case Operation::kPosterize: recipes.push_back(bits(static_cast<float>(below(9)))); break;
            case Operation::kSolarize: recipes.push_back(bits(256 * share)); break;
            case Operation::kHue: recipes.push_back(bits(share - 0.5f)); break;
            default: recipes.push_back(bits(2 * share));
          }
        }
      }
    }
    const size_t bytes = format == ViewFormat::kUint8 ? 1 : format == ViewFormat::kFloat32 ? 4 : 2;
    std::vector<uint8_t> out(static_cast<size_t>(count * side * side * 3) * bytes);
    augment_cpu({images.data(),
                 nullptr,
                 recipes.data(),
                 out.data(),
                 count,
                 height,
                 width,
                 side,
                 steps,
                 {0.017f, 0.021f, 0.019f},
                 {-2.1f, -1.9f, 0.3f},
                 format});
    hash = digest(hash, out);
  }
  return hash;
}

void same_bits_on_every_processor() {
  CHECK(views(ViewFormat::kUint8) == 0x398109c0c0130affull);
  CHECK(views(ViewFormat::kFloat32) == 0x711d391173ce43d1ull);
  CHECK(views(ViewFormat::kBFloat16) == 0x52878153e0e3e5cdull);
}

}  // namespace

int main() {
  SKIP_WITHOUT_ISA();
  RUN(same_bits_on_every_processor);
  return check::finish();
}
