// GPU kernels of the SCAN loss: one launch forward, one backward, each for all heads.
//
// scan_loss.h has the formulas. The forward pass reads each logit once (2 H B C elements) and writes six floats per row
// and C + 1 floats per block. The backward pass reads the logits again and writes both gradients (4 H B C). The limit
// is memory: 6 H B C elements over the bandwidth. Two exponentials per class and direction stay below the rate of the
// exponential unit.
//
// Up to 1024 classes, a group of 8 or 32 lanes holds a row of both views in registers (common/row_groups.cuh), and
// lanes keep the column sums of their classes in registers over all rows of the block. Each block writes its sums to
// its own slot. The block that finishes a head last (by a ticket counter) adds the slots in order, so the bits are the
// same in every run. <p, q> is the sum of products of the two exponentials; a warp with a row in which it underflows
// computes a + n a second time. Beyond 1024 classes a block processes one row at a time and rereads it from the caches.
//
// Tested on the host with the emulator and compiled for every architecture. docs/gpu-status.md states whether it has
// run on a GPU.
#include "common/row_groups.cuh"
#include "scan_loss/scan_loss.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 128;      // kernels that hold rows in registers
constexpr int kWideThreads = 256;  // kernels with one block per row
constexpr int kMostInRegisters = 1024;
constexpr int64_t kWideShared = 96 * 1024;  // if the column sums need more, they are in global memory

struct Finish {
  float* partial;     // (heads, blocks, classes + 1): column sums, then the sum of the consistencies
  unsigned* tickets;  // (heads), zero at launch
  float *total, *consistency, *entropy, *mean_prob;
  float entropy_weight;
};

// Computes the results of a head from the partial sums, by its last block.
__device__ void finish_head(const Finish& f, int64_t head, int blocks, int64_t rows, int classes,
                            const Shared<float>& scratch) {
  const float* partial = f.partial + head * blocks * (classes + 1);
  const float count = static_cast<float>(rows);
  float entropy[1] = {0.0f};
  for (int c = static_cast<int>(threadIdx.x); c < classes; c += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int b = 0; b < blocks; ++b) sum += partial[static_cast<int64_t>(b) * (classes + 1) + c];
    const float mean = sum / count;
    f.mean_prob[head * classes + c] = mean;
    const float clamped = mean < kScanLossFloor ? kScanLossFloor : mean;  // NaN stays NaN
    entropy[0] -= clamped * logf(clamped);
  }
  block_combine(entropy, scratch, Add());
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int b = 0; b < blocks; ++b) sum += partial[static_cast<int64_t>(b) * (classes + 1) + classes];
    const float consistency = sum / count;
    f.consistency[head] = consistency;
    f.entropy[head] = entropy[0];
    f.total[head] = consistency - f.entropy_weight * entropy[0];
  }
}

// Writes the row's statistics and returns its consistency.
__device__ __forceinline__ float finish_row(float max_a, float sum_a, float max_n, float sum_n, float shift,
                                            float sum_joint, bool write, float* stats) {
  const float inverse_a = 1.0f / sum_a, inverse_n = 1.0f / sum_n;
  if (write) {
    stats[0] = max_a;
    stats[1] = inverse_a;
    stats[2] = max_n;
    stats[3] = inverse_n;
    stats[4] = shift;
    stats[5] = 1.0f / sum_joint;
  }
  return -(logf(sum_joint * inverse_a * inverse_n) + shift);
}

template <typename T, int kGroup, int kPer, bool kVector>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ anchors, const T* __restrict__ neighbors, float* row_stats, Finish finish,
                   int64_t rows, int classes, int blocks) {
  constexpr int kGroups = kThreads / kGroup, kSlots = kGroup * kPer;
  SCAN_FAST_SHARED(float, sums, kGroups* kSlots);
  SCAN_FAST_SHARED(float, losses, kGroups);
  const int group = static_cast<int>(threadIdx.x) / kGroup, lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t head = blockIdx.x / blocks;
  const int block = static_cast<int>(blockIdx.x % blocks);
  float column[kPer] = {}, loss = 0.0f;
  // The loop bound is that of the block, not of the group, because every lane takes part in every shuffle.
  for (int64_t first = static_cast<int64_t>(block) * kGroups; first < rows;
       first += static_cast<int64_t>(blocks) * kGroups) {
    const bool active = first + group < rows;
    const int64_t row = head * rows + (active ? first + group : first);
    float a[kPer], n[kPer];
    load_row<T, kGroup, kPer, kVector>(anchors + row * classes, classes, lane, -infinity(), a);
    load_row<T, kGroup, kPer, kVector>(neighbors + row * classes, classes, lane, -infinity(), n);
    float max_a = -infinity(), max_n = -infinity();
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      max_a = fmaxf(max_a, a[i]);
      max_n = fmaxf(max_n, n[i]);
    }
    max_a = group_max<kGroup>(max_a);
    max_n = group_max<kGroup>(max_n);
    float sum_a = 0.0f, sum_n = 0.0f, sum_joint = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const bool inside = class_of<kGroup, kVector>(lane, i) < classes;
      a[i] = inside ? exp_negative(a[i] - max_a) : 0.0f;
      n[i] = inside ? exp_negative(n[i] - max_n) : 0.0f;
      sum_a += a[i];
      sum_n += n[i];
      sum_joint += a[i] * n[i];
    }
    sum_a = group_sum<kGroup>(sum_a);
    sum_n = group_sum<kGroup>(sum_n);
    sum_joint = group_sum<kGroup>(sum_joint);
    float shift = 0.0f;
    const bool underflow = sum_joint < kScanLossUnderflow;
    if (__any_sync(kFullMask, underflow)) {
      // Rare: the logits are read again, because the exponentials are still needed for the column sums.
      float best = -infinity(), sum = 0.0f;
      for (int c = lane; c < classes; c += kGroup) {
        best = fmaxf(best,
                     to_float(anchors[row * classes + c]) - max_a + (to_float(neighbors[row * classes + c]) - max_n));
      }
      best = group_max<kGroup>(best);
      if (best > -infinity()) {  // otherwise no class is possible for both views, the sum stays 0, the loss is infinite
        for (int c = lane; c < classes; c += kGroup) {
          sum += exp_negative(to_float(anchors[row * classes + c]) - max_a +
                              (to_float(neighbors[row * classes + c]) - max_n) - best);
        }
      }
      sum = group_sum<kGroup>(sum);
      if (underflow) {
        shift = best;
        sum_joint = sum;
      }
    }
    const float consistency = finish_row(max_a, sum_a, max_n, sum_n, shift, sum_joint, active && lane == 0,
                                         row_stats + row * kScanLossRowStats);
    if (active) {
      loss += consistency;
      const float inverse = 1.0f / sum_a;
#pragma unroll
      for (int i = 0; i < kPer; ++i) column[i] += a[i] * inverse;
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[group * kSlots + class_of<kGroup, kVector>(lane, i)] = column[i];
  if (lane == 0) losses[group] = loss;
  __syncthreads();
  float* partial = finish.partial + (head * blocks + block) * (classes + 1);
  for (int c = static_cast<int>(threadIdx.x); c < classes; c += kThreads) {
    float sum = 0.0f;
    for (int g = 0; g < kGroups; ++g) sum += sums[g * kSlots + c];
    partial[c] = sum;
  }
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int g = 0; g < kGroups; ++g) sum += losses[g];
    partial[classes] = sum;
  }
  if (is_last_block(finish.tickets + head, static_cast<unsigned>(blocks))) {
    finish_head(finish, head, blocks, rows, classes, losses);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWideThreads)
    forward_wide_kernel(const T* __restrict__ anchors, const T* __restrict__ neighbors, float* row_stats, Finish finish,
                        int64_t rows, int classes, int blocks, bool columns_shared) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  SCAN_FAST_SHARED(float, scratch, 3 * kWideThreads / 32);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.x / blocks;
  const int block = static_cast<int>(blockIdx.x % blocks);
  float* partial = finish.partial + (head * blocks + block) * (classes + 1);
  // Each thread adds to its own classes only, so no barrier is needed.
  float* column = columns_shared ? dynamic.as<float>().get() : partial;
  for (int c = thread; c < classes; c += kWideThreads) column[c] = 0.0f;
  float loss = 0.0f;
  for (int64_t i = block; i < rows; i += blocks) {
    const int64_t row = head * rows + i;
    const T* a = anchors + row * classes;
    const T* n = neighbors + row * classes;
    float max[2] = {-infinity(), -infinity()};
    for (int c = thread; c < classes; c += kWideThreads) {
      max[0] = fmaxf(max[0], to_float(a[c]));
      max[1] = fmaxf(max[1], to_float(n[c]));
    }
    block_combine(max, scratch, Larger());
    float sum[3] = {};
    for (int c = thread; c < classes; c += kWideThreads) {
      const float x = exp_negative(to_float(a[c]) - max[0]), y = exp_negative(to_float(n[c]) - max[1]);
      sum[0] += x;
      sum[1] += y;
      sum[2] += x * y;
    }
    block_combine(sum, scratch, Add());
    float shift = 0.0f;
    if (sum[2] < kScanLossUnderflow) {  // the same for the whole block
      float best[1] = {-infinity()}, joint[1] = {0.0f};
      for (int c = thread; c < classes; c += kWideThreads) {
        best[0] = fmaxf(best[0], to_float(a[c]) - max[0] + (to_float(n[c]) - max[1]));
      }
      block_combine(best, scratch, Larger());
      if (best[0] > -infinity()) {
        for (int c = thread; c < classes; c += kWideThreads) {
          joint[0] += exp_negative(to_float(a[c]) - max[0] + (to_float(n[c]) - max[1]) - best[0]);
        }
      }
      block_combine(joint, scratch, Add());
      shift = best[0];
      sum[2] = joint[0];
    }
    loss += finish_row(max[0], sum[0], max[1], sum[1], shift, sum[2], thread == 0, row_stats + row * kScanLossRowStats);
    const float inverse = 1.0f / sum[0];
    for (int c = thread; c < classes; c += kWideThreads) column[c] += exp_negative(to_float(a[c]) - max[0]) * inverse;
  }
  if (columns_shared) {
    for (int c = thread; c < classes; c += kWideThreads) partial[c] = column[c];
  }
  if (thread == 0) partial[classes] = loss;
  if (is_last_block(finish.tickets + head, static_cast<unsigned>(blocks))) {
    finish_head(finish, head, blocks, rows, classes, scratch);
  }
}

struct Upstream {
  const float *total, *consistency, *entropy;  // (heads), or null
  const float* mean_prob;
  float entropy_weight;

  __device__ __forceinline__ static float at(const float* p, int64_t head) { return p == nullptr ? 0.0f : p[head]; }
  __device__ __forceinline__ float consistency_scale(int64_t head, int64_t rows) const {
    return (at(total, head) + at(consistency, head)) / static_cast<float>(rows);
  }
  __device__ __forceinline__ float entropy_scale(int64_t head, int64_t rows) const {
    return (at(entropy, head) - entropy_weight * at(total, head)) / static_cast<float>(rows);
  }
};

// d entropy / d mean
__device__ __forceinline__ float entropy_slope(float mean) { return mean < kScanLossFloor ? 0.0f : -1.0f - logf(mean); }

template <typename T, int kGroup, int kPer, bool kVector>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ anchors, const T* __restrict__ neighbors, const float* __restrict__ row_stats,
                    Upstream upstream, T* __restrict__ grad_anchors, T* __restrict__ grad_neighbors, int64_t rows,
                    int classes, int blocks) {
  constexpr int kGroups = kThreads / kGroup;
  const int group = static_cast<int>(threadIdx.x) / kGroup, lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t head = blockIdx.x / blocks;
  const int block = static_cast<int>(blockIdx.x % blocks);
  const float k = upstream.consistency_scale(head, rows), e = upstream.entropy_scale(head, rows);
  float slope[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int c = class_of<kGroup, kVector>(lane, i);
    slope[i] = c < classes ? entropy_slope(upstream.mean_prob[head * classes + c]) : 0.0f;
  }
  for (int64_t first = static_cast<int64_t>(block) * kGroups; first < rows;
       first += static_cast<int64_t>(blocks) * kGroups) {
    const bool active = first + group < rows;
    const int64_t row = head * rows + (active ? first + group : first);
    const float* stats = row_stats + row * kScanLossRowStats;
    const float max_a = stats[0], inverse_a = stats[1], max_n = stats[2], inverse_n = stats[3], shift = stats[4],
                inverse_joint = stats[5];
    float p[kPer], r[kPer], dot = 0.0f;
    load_row<T, kGroup, kPer, kVector>(anchors + row * classes, classes, lane, -infinity(), p);
    load_row<T, kGroup, kPer, kVector>(neighbors + row * classes, classes, lane, -infinity(), r);
    T* out = grad_neighbors + row * classes;
#pragma unroll
    for (int i = 0; i < kPer; i += 4) {
      float grad[4];
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        const bool inside = class_of<kGroup, kVector>(lane, j) < classes;
        const float x = p[j] - max_a, y = r[j] - max_n;
        const float exp_a = inside ? exp_negative(x) : 0.0f, exp_n = inside ? exp_negative(y) : 0.0f;
        p[j] = exp_a * inverse_a;
        r[j] = (shift == 0.0f ? exp_a * exp_n : exp_negative(x + y - shift)) * inverse_joint;
        if (inside) dot += p[j] * slope[j];
        grad[j - i] = k * (exp_n * inverse_n - r[j]);
      }
      const int c = class_of<kGroup, kVector>(lane, i);
      if constexpr (kVector) {
        if (active && c < classes) store4(out + c, grad);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (active && c + j * kGroup < classes) out[c + j * kGroup] = from_float<T>(grad[j]);
        }
      }
    }
    dot = group_sum<kGroup>(dot);
#pragma unroll
    for (int i = 0; i < kPer; ++i) p[i] = k * (p[i] - r[i]) + e * p[i] * (slope[i] - dot);
    if (active) store_row<T, kGroup, kPer, kVector>(grad_anchors + row * classes, classes, lane, p);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWideThreads)
    backward_wide_kernel(const T* __restrict__ anchors, const T* __restrict__ neighbors,
                         const float* __restrict__ row_stats, Upstream upstream, T* __restrict__ grad_anchors,
                         T* __restrict__ grad_neighbors, int64_t rows, int classes, int blocks) {
  SCAN_FAST_SHARED(float, scratch, kWideThreads / 32);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.x / blocks;
  const float k = upstream.consistency_scale(head, rows), e = upstream.entropy_scale(head, rows);
  const float* mean = upstream.mean_prob + head * classes;
  for (int64_t i = blockIdx.x % blocks; i < rows; i += blocks) {
    const int64_t row = head * rows + i;
    const T* a = anchors + row * classes;
    const T* n = neighbors + row * classes;
    const float* stats = row_stats + row * kScanLossRowStats;
    const float max_a = stats[0], inverse_a = stats[1], max_n = stats[2], inverse_n = stats[3], shift = stats[4],
                inverse_joint = stats[5];
    float dot[1] = {0.0f};
    for (int c = thread; c < classes; c += kWideThreads) {
      dot[0] += exp_negative(to_float(a[c]) - max_a) * inverse_a * entropy_slope(mean[c]);
    }
    block_combine(dot, scratch, Add());
    for (int c = thread; c < classes; c += kWideThreads) {
      const float x = to_float(a[c]) - max_a, y = to_float(n[c]) - max_n;
      const float exp_a = exp_negative(x), exp_n = exp_negative(y), p = exp_a * inverse_a;
      const float r = (shift == 0.0f ? exp_a * exp_n : exp_negative(x + y - shift)) * inverse_joint;
      grad_neighbors[row * classes + c] = from_float<T>(k * (exp_n * inverse_n - r));
      grad_anchors[row * classes + c] = from_float<T>(k * (p - r) + e * p * (entropy_slope(mean[c]) - dot[0]));
    }
  }
}

// ---- launches ----------------------------------------------------------------------------------------------------

int64_t rows_at_once(int64_t classes) { return classes > kMostInRegisters ? 1 : classes <= 32 ? 16 : 4; }

// Blocks per head: at least two iterations over rows for each, and four blocks per multiprocessor. If one block can do
// the work in a few iterations, a single block, which needs no ticket. Four blocks are resident except for rows of more
// than 512 classes: there the registers (sm_90) allow four forward and three backward, or three and two for unaligned
// rows.
int blocks_per_head(const ScanLossShape& shape) {
  if (shape.rows * shape.classes <= 2048) return 1;
  const int64_t turn = rows_at_once(shape.classes), wanted = (shape.rows + 2 * turn - 1) / (2 * turn);
  const int64_t share = static_cast<int64_t>(multiprocessors()) * 4 / shape.heads;
  return static_cast<int>(wanted < share ? wanted : share > 1 ? share : 1);
}

// Calls launch.operator()<kGroup, kPer, kVector>() for a row that fits into registers.
template <typename Launch>
void with_row_layout(int64_t classes, bool vectors, Launch launch) {
  if (classes <= 32) {
    launch.template operator()<8, 4, false>();
  } else if (classes <= 256) {
    vectors ? launch.template operator()<32, 8, true>() : launch.template operator()<32, 8, false>();
  } else if (classes <= 512) {
    vectors ? launch.template operator()<32, 16, true>() : launch.template operator()<32, 16, false>();
  } else {
    vectors ? launch.template operator()<32, 32, true>() : launch.template operator()<32, 32, false>();
  }
}

size_t partial_floats(const ScanLossShape& shape, int blocks) {
  return static_cast<size_t>(shape.heads) * static_cast<size_t>(blocks) * static_cast<size_t>(shape.classes + 1);
}

}  // namespace

size_t scan_loss_cuda_workspace(const ScanLossShape& shape) {
  return partial_floats(shape, blocks_per_head(shape)) * sizeof(float) +
         static_cast<size_t>(shape.heads) * sizeof(unsigned);
}

void scan_loss_forward_cuda(DType dtype, const ScanLossShape& shape, const ScanLossForward& arguments,
                            StreamHandle stream) {
  const int blocks = blocks_per_head(shape), classes = static_cast<int>(shape.classes);
  float* partial = static_cast<float*>(arguments.workspace);
  unsigned* tickets = reinterpret_cast<unsigned*>(partial + partial_floats(shape, blocks));
  const Finish finish{partial,
                      tickets,
                      arguments.total,
                      arguments.consistency,
                      arguments.entropy,
                      arguments.mean_prob,
                      arguments.entropy_weight};
  if (blocks > 1) zero_async(tickets, static_cast<size_t>(shape.heads) * sizeof(unsigned), stream);
  const dim3 grid(static_cast<unsigned>(shape.heads * blocks));
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* a = static_cast<const T*>(arguments.anchors);
    const T* n = static_cast<const T*>(arguments.neighbors);
    if (shape.classes > kMostInRegisters) {
      const size_t bytes = static_cast<size_t>(shape.classes) * sizeof(float);
      const bool columns_shared = bytes <= static_cast<size_t>(kWideShared);
      launch(forward_wide_kernel<T>, grid, dim3(kWideThreads), columns_shared ? bytes : 0, stream, a, n,
             arguments.row_stats, finish, shape.rows, classes, blocks, columns_shared);
      return;
    }
    const bool vectors = aligned_rows<T>(a, shape.classes) && aligned_rows<T>(n, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, int kPer, bool kVector>() {
      launch(forward_kernel<T, kGroup, kPer, kVector>, grid, dim3(kThreads), 0, stream, a, n, arguments.row_stats,
             finish, shape.rows, classes, blocks);
    });
  });
}

void scan_loss_backward_cuda(DType dtype, const ScanLossShape& shape, const ScanLossBackward& arguments,
                             StreamHandle stream) {
  const int blocks = blocks_per_head(shape), classes = static_cast<int>(shape.classes);
  const Upstream upstream{arguments.grad_total, arguments.grad_consistency, arguments.grad_entropy, arguments.mean_prob,
                          arguments.entropy_weight};
  const dim3 grid(static_cast<unsigned>(shape.heads * blocks));
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* a = static_cast<const T*>(arguments.anchors);
    const T* n = static_cast<const T*>(arguments.neighbors);
    T* grad_a = static_cast<T*>(arguments.grad_anchors);
    T* grad_n = static_cast<T*>(arguments.grad_neighbors);
    if (shape.classes > kMostInRegisters) {
      launch(backward_wide_kernel<T>, grid, dim3(kWideThreads), 0, stream, a, n, arguments.row_stats, upstream, grad_a,
             grad_n, shape.rows, classes, blocks);
      return;
    }
    const bool vectors = aligned_rows<T>(a, shape.classes) && aligned_rows<T>(n, shape.classes) &&
                         aligned_rows<T>(grad_a, shape.classes) && aligned_rows<T>(grad_n, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, int kPer, bool kVector>() {
      launch(backward_kernel<T, kGroup, kPer, kVector>, grid, dim3(kThreads), 0, stream, a, n, arguments.row_stats,
             upstream, grad_a, grad_n, shape.rows, classes, blocks);
    });
  });
}

}  // namespace scan_fast
