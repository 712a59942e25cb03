// The views on the GPU: a warp or a block per image, the image as one 32-bit word per pixel in shared memory.
//
//   cuda_resize.cuh       tabulate_filters  thread per (image, axis, output position): PIL's filter taps in 22-bit fixed
//                         point; crop, resize and mirror from the source
//   cuda_operations.cuh   the recipe's operations, one after another
//   below                 render_views      all of it for an image, then normalisation, cutout and the write
//
// render_views keeps two images. Sums and histograms are integers, so nothing depends on the order of threads.
//   up to 32 x 32     a warp per image, eight images a block, and no barrier of the block: images in one block may follow
//                     quite different recipes. Per image 8 KiB and 4 KiB of tables.
//   up to 113 x 113   a block of 256 threads per image, up to 100 KiB. Where a block may have 99 KiB, tables included, that
//                     is up to 110 x 110.
//   above             likewise, but the pair of images lies in global memory, one for each of a limited number of blocks,
//                     where the second cache holds it.
// What does not fit into a block of the GPU at hand takes the next form.
//
// Limit: memory sees 3 bytes of source and 3, 6 or 12 of view per pixel; the arithmetic, a few hundred instructions per
// pixel at four or five operations, is the larger part. The levels are those of the CPU, see pixel.h.
#include <type_traits>

#include "augment/augment.h"
#include "augment/cuda_group.cuh"
#include "augment/cuda_operations.cuh"
#include "augment/cuda_resize.cuh"
#include "common/device.h"

namespace scan_fast {
namespace {

constexpr int kWarpSide = 32;  // up to here a warp has an image
constexpr size_t kSharedBytes = 100 * 1024;  // of a pair of images, at most
constexpr int kBlocksPerMultiprocessor = 4;  // where images lie in global memory

// Consecutive threads write consecutive values.
template <typename G, typename T, typename Words>
__device__ __forceinline__ void write(const ViewBatch& batch, const Words& image, int64_t number,
                                      const int32_t* cutout) {
  const int side = static_cast<int>(batch.side), values = 3 * side * side;
  T* out = static_cast<T*>(batch.out) + number * values;
  G::sync();
#pragma unroll 2
  for (int k = G::thread(); k < values; k += G::kSize) {
    const int i = k / 3, c = k % 3;
    const uint32_t word = image[i];
    const int level = static_cast<int>(word >> (8 * c) & 255);
    if constexpr (std::is_same_v<T, uint8_t>) {
      out[k] = static_cast<uint8_t>(level);
    } else {
      const float scale = c == 0 ? batch.scale[0] : c == 1 ? batch.scale[1] : batch.scale[2];
      const float shift = c == 0 ? batch.shift[0] : c == 1 ? batch.shift[1] : batch.shift[2];
      const int y = i / side, x = i % side;
      const bool cut = y >= cutout[0] && y < cutout[2] && x >= cutout[1] && x < cutout[3];
      out[k] = from_float<T>(cut ? 0.0f : product(static_cast<float>(level), scale) + shift);
    }
  }
}

using Warps = Group<1>;
using Block = Group<kThreads / 32>;

constexpr int kPartials = 6 * kThreads / 32, kSums = kThreads / 32;

// Bytes of static shared memory in render_views.
template <typename G>
constexpr size_t kTableBytes = G::kImages * (3 * kLevels * sizeof(int) + kLevels * sizeof(uint32_t)) +
                               kPartials * sizeof(int) + kSums * sizeof(long long);

template <typename G, typename T, bool kInShared>
__global__ void __launch_bounds__(kThreads, G::kWarps == 1 ? 2 : 3) render_views(ViewBatch batch, Workspace work) {
  using Words = std::conditional_t<kInShared, Shared<uint32_t>, uint32_t*>;
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(int, counts, G::kImages * 3 * kLevels);
  SCAN_FAST_SHARED(uint32_t, levels, G::kImages * kLevels);
  SCAN_FAST_SHARED(int, partial, kPartials);
  SCAN_FAST_SHARED(long long, sums, kSums);
  const int side = static_cast<int>(batch.side), group = G::number();
  const int64_t pixels = batch.side * batch.side;
  const Tables tables{counts + group * 3 * kLevels, levels + group * kLevels, partial, sums};
  Words images;
  if constexpr (kInShared) {
    images = memory.template as<uint32_t>() + group * 2 * pixels;
  } else {
    images = work.images + static_cast<int64_t>(blockIdx.x) * 2 * pixels;
  }
  for (int64_t image = static_cast<int64_t>(blockIdx.x) * G::kImages + group; image < batch.count;
       image += static_cast<int64_t>(gridDim.x) * G::kImages) {
    const int32_t* recipe = batch.recipes + image * (kRecipeHeader + batch.steps * kRecipeStep);
    Words now = images, other = images + pixels;
    G::sync();  // the last image has been written out
    crop_resize<G>(batch, work, image, recipe, now);
    for (int64_t step = 0; step < batch.steps; ++step) {
      if (apply<G>(recipe + kRecipeHeader + step * kRecipeStep, now, other, side, tables)) {
        const Words swapped = now;
        now = other;
        other = swapped;
      }
    }
    write<G, T>(batch, now, image, recipe + 5);
  }
}

// How a batch is rendered.
struct Plan {
  int images;  // of a block
  bool in_shared;
  size_t shared;  // bytes of dynamic shared memory
  Workspace work;
  size_t bytes;  // of the workspace
};

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// With the workspace at `memory`, which may be null where only the size is of interest.
Plan make_plan(const ViewBatch& batch, void* memory) {
  Plan plan{};
  const size_t pair = static_cast<size_t>(batch.side * batch.side) * 2 * sizeof(uint32_t);
  const size_t limit = shared_memory_limit();
  plan.images = batch.side <= kWarpSide && pair * Warps::kImages + kTableBytes<Warps> <= limit ? Warps::kImages : 1;
  plan.in_shared = plan.images > 1 || (pair <= kSharedBytes && pair + kTableBytes<Block> <= limit);
  plan.shared = plan.in_shared ? pair * static_cast<size_t>(plan.images) : 0;
  const int longest = static_cast<int>(batch.height > batch.width ? batch.height : batch.width);
  plan.work.taps = most_taps(longest, static_cast<int>(batch.side));
  const int64_t wanted = (batch.count + plan.images - 1) / plan.images;
  const int64_t most = plan.in_shared ? 65535 : kBlocksPerMultiprocessor * multiprocessors();
  plan.work.blocks = wanted < most ? wanted : most;
  const size_t filters =
      rounded(static_cast<size_t>(batch.count * 2 * batch.side * (2 + plan.work.taps)) * sizeof(int32_t));
  plan.bytes = filters + (plan.in_shared ? 0 : static_cast<size_t>(plan.work.blocks) * pair);
  unsigned char* bytes = static_cast<unsigned char*>(memory);
  plan.work.filters = reinterpret_cast<int32_t*>(bytes);
  plan.work.images = plan.in_shared || bytes == nullptr ? nullptr : reinterpret_cast<uint32_t*>(bytes + filters);
  return plan;
}

template <typename T>
void render(const ViewBatch& batch, const Plan& plan, StreamHandle stream) {
  const auto kernel = plan.images > 1  ? render_views<Warps, T, true>
                      : plan.in_shared ? render_views<Block, T, true>
                                       : render_views<Block, T, false>;
  launch(kernel, dim3(static_cast<unsigned>(plan.work.blocks)), dim3(kThreads), plan.shared, stream, batch, plan.work);
}

}  // namespace

size_t augment_cuda_workspace(const ViewBatch& batch) { return make_plan(batch, nullptr).bytes; }

void augment_cuda(const ViewBatch& batch, void* workspace, StreamHandle stream) {
  if (batch.count == 0) return;
  const Plan plan = make_plan(batch, workspace);
  const int64_t positions = batch.count * 2 * batch.side;
  const dim3 blocks(static_cast<unsigned>((positions + kThreads - 1) / kThreads));
  launch(tabulate_filters, blocks, dim3(kThreads), 0, stream, batch, plan.work);
  switch (batch.format) {
    case ViewFormat::kUint8: render<uint8_t>(batch, plan, stream); return;
    case ViewFormat::kFloat32: render<float>(batch, plan, stream); return;
    case ViewFormat::kBFloat16: render<bf16_t>(batch, plan, stream); return;
  }
}

}  // namespace scan_fast
