// GPU kernels of the augment family: one block per image, with the image in shared memory as one 32-bit word per pixel.
//
//   cuda_resize.cuh       tabulate_filters: one thread per (image, axis, output position) computes PIL's filter taps in
//                         22-bit fixed point; crop_resize reads the source
//   cuda_operations.cuh   the operations of a recipe, in sequence
//   this file             render_views: all of the above for an image, then normalisation, cutout and the store
//
// render_views keeps two copies of an image. Sums and histograms are integers, so results do not depend on the order of
// threads. The side of the view selects the variant:
//   up to 32 x 32     a block of four warps, with up to 8 KiB and 4 KiB of tables. A multiprocessor holds eight, so that
//                     a batch of 1024 images runs at once and other images hide the latency of one.
//   up to 113 x 113   a block of 256 threads, up to 100 KiB. If a block may use 99 KiB, tables included, the limit is
//                     110 x 110.
//   above             the same, but the two copies are in global memory. A limited number of blocks share them out, so
//                     that they stay in the L2 cache.
// If a variant does not fit into the shared memory of the current GPU, the next one is used.
//
// Limit: global memory traffic is 3 bytes of source and 3, 6 or 12 bytes of view per pixel. The larger part of the time
// is arithmetic. Prediction for SimCLR views of 1024x32x32 in bfloat16 on an H200, not measured: 64 registers, 1024
// blocks on 1056 places, about 300 instructions per pixel (crop 70, each operation 30 to 90, store 25) at 2.5
// instructions per cycle and multiprocessor: 15 us of issue, 30 us with the spread between recipes; 7 % of the limit of
// 9.4 MB. The pixel values equal those of the CPU, see pixel.h.
#include <type_traits>

#include "augment/augment.h"
#include "augment/cuda_group.cuh"
#include "augment/cuda_operations.cuh"
#include "augment/cuda_resize.cuh"
#include "common/device.h"

namespace scan_fast {
namespace {

constexpr int kSmallSide = 32;               // largest side for a block of four warps
constexpr size_t kSharedBytes = 100 * 1024;  // upper limit for the two copies of an image
constexpr int kBlocksPerMultiprocessor = 4;  // if the images are in global memory

__device__ __forceinline__ uint4 four_pixels(const Shared<uint32_t>& image, int quad) {
  return ld_shared<uint4>(image + 4 * quad);
}
__device__ __forceinline__ uint4 four_pixels(const uint32_t* image, int quad) {
  return ld_coherent<uint4>(image + 4 * quad);
}

// Normalises the values of a pixel; zero if it is cut out.
__device__ __forceinline__ void normalise(const ViewBatch& batch, uint32_t word, bool cut, float* values) {
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const float value = static_cast<float>(word >> (8 * c) & 255);
    values[c] = cut ? 0.0f : product(value, batch.scale[c]) + batch.shift[c];
  }
}

// Stores the image, four pixels per thread and step if rows consist of whole quads. Begins with a barrier.
template <typename G, typename T, typename Words>
__device__ __forceinline__ void write(const ViewBatch& batch, const Words& image, int64_t number,
                                      const int32_t* cutout) {
  const int side = static_cast<int>(batch.side), pixels = side * side;
  T* out = static_cast<T*>(batch.out) + number * pixels * 3;
  const int top = cutout[0], left = cutout[1], bottom = cutout[2], right = cutout[3];
  G::sync();
  if (side % 4 != 0 || reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) != 0) {
    for (Walk<G> at(side); at.i < pixels; at.next()) {
      const uint32_t word = image[at.i];
      T* to = out + 3 * at.i;
      if constexpr (std::is_same_v<T, uint8_t>) {
#pragma unroll
        for (int c = 0; c < 3; ++c) to[c] = static_cast<uint8_t>(word >> (8 * c) & 255);
      } else {
        float values[3];
        normalise(batch, word, at.y >= top && at.y < bottom && at.x >= left && at.x < right, values);
#pragma unroll
        for (int c = 0; c < 3; ++c) to[c] = from_float<T>(values[c]);
      }
    }
    return;
  }
  for (Walk<G> at(side / 4); at.i < pixels / 4; at.next()) {
    const uint4 quad = four_pixels(image, at.i);
    T* to = out + 12 * at.i;
    if constexpr (std::is_same_v<T, uint8_t>) {
      st_global(to, quad.x | quad.y << 24);
      st_global(to + 4, quad.y >> 8 | quad.z << 16);
      st_global(to + 8, quad.z >> 16 | quad.w << 8);
    } else {
      const bool rows_cut = at.y >= top && at.y < bottom;
      const auto cut = [&](int j) { return rows_cut && 4 * at.x + j >= left && 4 * at.x + j < right; };
      float v[12];
      normalise(batch, quad.x, cut(0), v);
      normalise(batch, quad.y, cut(1), v + 3);
      normalise(batch, quad.z, cut(2), v + 6);
      normalise(batch, quad.w, cut(3), v + 9);
#pragma unroll
      for (int k = 0; k < 12; k += 4) {
        if constexpr (sizeof(T) == 4) {
          st_global(to + k, make_float4(v[k], v[k + 1], v[k + 2], v[k + 3]));
        } else {
          st_global(to + k, make_uint2(pack2<T>(v[k], v[k + 1]), pack2<T>(v[k + 2], v[k + 3])));
        }
      }
    }
  }
}

using Small = Group<4>;
using Large = Group<kThreads / 32>;

// Bytes of static shared memory in render_views.
template <typename G>
constexpr size_t kTableBytes = 3 * kValues * sizeof(int) + kValues * sizeof(uint32_t) + 6 * G::kWarps * sizeof(int) +
                               G::kWarps * sizeof(long long);

template <typename G, typename T, bool kInShared>
__global__ void __launch_bounds__(G::kSize, G::kWarps == 4 ? 8 : 3) render_views(ViewBatch batch, Workspace work) {
  using Words = std::conditional_t<kInShared, Shared<uint32_t>, uint32_t*>;
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(int, counts, 3 * kValues);
  SCAN_FAST_SHARED(uint32_t, lookup, kValues);
  SCAN_FAST_SHARED(int, partial, 6 * G::kWarps);
  SCAN_FAST_SHARED(long long, sums, G::kWarps);
  const int side = static_cast<int>(batch.side);
  const int64_t pixels = batch.side * batch.side;
  const Tables tables{counts, lookup, partial, sums};
  Words images;
  if constexpr (kInShared) {
    images = memory.template as<uint32_t>();
  } else {
    images = work.images + static_cast<int64_t>(blockIdx.x) * 2 * pixels;
  }
  for (int64_t image = blockIdx.x; image < batch.count; image += gridDim.x) {
    const int32_t* recipe = batch.recipes + image * (kRecipeHeader + batch.steps * kRecipeStep);
    Words now = images, other = images + pixels;
    G::sync();  // the previous image has been written
    crop_resize<G>(batch, work, image, recipe, now, other);
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
  bool small, in_shared;
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
  plan.small = batch.side <= kSmallSide;
  plan.in_shared = pair <= kSharedBytes && pair + kTableBytes<Large> <= limit;
  plan.shared = plan.in_shared ? pair : 0;
  const int longest = static_cast<int>(batch.height > batch.width ? batch.height : batch.width);
  plan.work.taps = most_taps(longest, static_cast<int>(batch.side));
  const int64_t most = plan.in_shared ? 65535 : kBlocksPerMultiprocessor * multiprocessors();
  plan.work.blocks = batch.count < most ? batch.count : most;
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
  const auto kernel = plan.small       ? render_views<Small, T, true>
                      : plan.in_shared ? render_views<Large, T, true>
                                       : render_views<Large, T, false>;
  const int threads = plan.small ? Small::kSize : Large::kSize;
  launch(kernel, dim3(static_cast<unsigned>(plan.work.blocks)), dim3(static_cast<unsigned>(threads)), plan.shared,
         stream, batch, plan.work);
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
