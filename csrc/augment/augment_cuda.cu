// GPU kernels of the augment family: one warp or one block per image, with the image in shared memory as one 32-bit
// word per pixel.
//
//   cuda_resize.cuh       tabulate_filters: one thread per (image, axis, output position) computes PIL's filter taps in
//                         22-bit fixed point; crop_resize reads the source
//   cuda_operations.cuh   the operations of a recipe, in sequence
//   this file             render_views: all of the above for an image, then normalisation, cutout and the store
//
// render_views keeps two copies of an image. Sums and histograms are integers, so results do not depend on the order of
// threads. The side of the view selects the variant:
//   up to 32 x 32     one warp per image, eight images per block and no block barrier, because images of one block may
//                     have quite different recipes. Per image 8 KiB and 4 KiB of tables.
//   up to 113 x 113   a block of 256 threads per image, up to 100 KiB. If a block may use 99 KiB, tables included, the
//                     limit is 110 x 110.
//   above             the same, but the two copies are in global memory. A limited number of blocks share them out, so
//                     that they stay in the L2 cache.
// If a variant does not fit into the shared memory of the current GPU, the next one is used.
//
// Limit: global memory traffic is 3 bytes of source and 3, 6 or 12 bytes of view per pixel. The larger part of the time
// is arithmetic, a few hundred instructions per pixel at four or five operations. The pixel values equal those of the
// CPU, see pixel.h.
#include <type_traits>

#include "augment/augment.h"
#include "augment/cuda_group.cuh"
#include "augment/cuda_operations.cuh"
#include "augment/cuda_resize.cuh"
#include "common/device.h"

namespace scan_fast {
namespace {

constexpr int kWarpSide = 32;                // largest side for one warp per image
constexpr size_t kSharedBytes = 100 * 1024;  // upper limit for the two copies of an image
constexpr int kBlocksPerMultiprocessor = 4;  // if the images are in global memory

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
    const int value = static_cast<int>(word >> (8 * c) & 255);
    if constexpr (std::is_same_v<T, uint8_t>) {
      out[k] = static_cast<uint8_t>(value);
    } else {
      const float scale = c == 0 ? batch.scale[0] : c == 1 ? batch.scale[1] : batch.scale[2];
      const float shift = c == 0 ? batch.shift[0] : c == 1 ? batch.shift[1] : batch.shift[2];
      const int y = i / side, x = i % side;
      const bool cut = y >= cutout[0] && y < cutout[2] && x >= cutout[1] && x < cutout[3];
      out[k] = from_float<T>(cut ? 0.0f : product(static_cast<float>(value), scale) + shift);
    }
  }
}

using Warps = Group<1>;
using Block = Group<kThreads / 32>;

constexpr int kPartials = 6 * kThreads / 32, kSums = kThreads / 32;

// Bytes of static shared memory in render_views.
template <typename G>
constexpr size_t kTableBytes = G::kImages * (3 * kValues * sizeof(int) + kValues * sizeof(uint32_t)) +
                               kPartials * sizeof(int) + kSums * sizeof(long long);

template <typename G, typename T, bool kInShared>
__global__ void __launch_bounds__(kThreads, G::kWarps == 1 ? 2 : 3) render_views(ViewBatch batch, Workspace work) {
  using Words = std::conditional_t<kInShared, Shared<uint32_t>, uint32_t*>;
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(int, counts, G::kImages * 3 * kValues);
  SCAN_FAST_SHARED(uint32_t, lookup, G::kImages* kValues);
  SCAN_FAST_SHARED(int, partial, kPartials);
  SCAN_FAST_SHARED(long long, sums, kSums);
  const int side = static_cast<int>(batch.side), group = G::number();
  const int64_t pixels = batch.side * batch.side;
  const Tables tables{counts + group * 3 * kValues, lookup + group * kValues, partial, sums};
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
    G::sync();  // the previous image has been written
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

// Launch configuration and workspace of a batch.
struct Plan {
  int images;  // per block
  bool in_shared;
  size_t shared;  // bytes of dynamic shared memory
  Workspace work;
  size_t bytes;  // size of the workspace
};

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// `memory` is the workspace. It may be null if only the size is needed.
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
