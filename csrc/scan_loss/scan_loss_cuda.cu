// GPU kernels of the SCAN loss: forward two launches (up to 2 turns of a block one, in slices three), backward one, each
// for all heads.
//
// scan_loss.h has the formulas. The forward pass reads each logit once (2 H B C elements) and writes six floats per row
// and C + 1 floats per block. The backward pass reads the logits again and writes both gradients (4 H B C). The limit
// is memory: 6 H B C elements over the bandwidth. Two exponentials per class and direction stay below the rate of the
// exponential unit.
//
// Up to 1024 classes, a group of 8 or 32 lanes holds a row of both views in registers (common/row_groups.cuh), and
// lanes keep the column sums of their classes in registers over all rows of the block. Each block writes its sums to
// its own slot. A second kernel adds the slots in a fixed order, so the bits are the same in every run. It needs no
// ticket, which would have to be zeroed before, and its launch overlaps the first kernel (launch_after). <p, q> is the
// sum of products of the two exponentials; a warp with a row in which it underflows computes a + n a second time.
// Beyond 1024 classes a block processes one row at a time and rereads it from the caches.
//
// The grids have as many blocks as run at the same time, by the registers of the build. Predictions for an H200 (132
// multiprocessors, 4.3 TB/s), not measured:
//   10x1024x1000 float32   forward: 124 registers, 520 blocks on 528 places, 5 turns, 82 MB, 23 us (limit 19). Second
//                          kernel: 10 blocks of 1024 threads, 208 KB and 13 loads per thread in two batches, 3.5 us.
//                          Backward: 168 registers, 390 blocks on 396 places, 7 turns, 164 MB, 44 us (limit 38).
//                          Together 70 us, 80 % of the limit.
//   1x1024x10 float32      64 blocks with one turn each, then one warp with 8 loads per lane. Latency only: per kernel
//                          one round trip to memory and 9 shuffles in a row. 2.5 + 1.3 + 2.5 us.
//
// Tested on the host with the emulator and compiled for every architecture. docs/gpu-status.md states whether it has
// run on a GPU.
#include "common/row_groups.cuh"
#include "scan_loss/scan_loss.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 128;         // kernels that hold rows in registers
constexpr int kWideThreads = 256;     // kernels with one block per row
constexpr int kFinishThreads = 1024;  // at most
constexpr int kMostInRegisters = 1024;
constexpr int kMostResident = 8;            // forward blocks per multiprocessor, for the size of the workspace
constexpr int64_t kWideShared = 96 * 1024;  // if the column sums need more, they are in global memory
constexpr int64_t kOneSlice = 1 << 16;      // partial sums of a head that one block adds up
constexpr int kSliceVectors = 16;           // otherwise a block adds those of 64 classes
constexpr int kLoads = 8;                   // of partial sums in flight, per thread

struct Finish {
  float* columns;        // (heads, blocks, padded): column sums, with zeros beyond the classes
  float* losses;         // (heads, blocks): sums of the consistencies
  float* slice_entropy;  // (heads, slices)
  float* slice_loss;     // (heads, slices): the head's sum of the consistencies in slice 0, zero in the others
  float *total, *consistency, *entropy, *mean_prob;
  float entropy_weight;
  int padded;  // classes, rounded up to a multiple of 4
};

// Writes the mean prediction of a class and returns its part of the entropy.
__device__ __forceinline__ float finish_class(const Finish& f, int64_t head, int c, float sum, int64_t rows,
                                              int classes) {
  const float mean = sum / static_cast<float>(rows);
  f.mean_prob[head * classes + c] = mean;
  const float clamped = mean < kScanLossFloor ? kScanLossFloor : mean;  // NaN stays NaN
  return -clamped * logf(clamped);
}

__device__ __forceinline__ void finish_head(const Finish& f, int64_t head, float loss, float entropy, int64_t rows) {
  const float consistency = loss / static_cast<float>(rows);
  f.consistency[head] = consistency;
  f.entropy[head] = entropy;
  f.total[head] = consistency - f.entropy_weight * entropy;
}

// Adds the partial sums of all blocks, for `slice_vectors` times four classes of a head. A head of one slice is done
// then. A thread adds the slots of every groups-th block for four classes, the first threads add those sums.
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(Finish f, int64_t rows, int classes, int blocks, int slices, int slice_vectors, int groups) {
  SCAN_FAST_SHARED(float, sums, 4 * kFinishThreads);
  SCAN_FAST_SHARED(float, scratch, 2 * kFinishThreads / 32);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t head = blockIdx.x / slices;
  const int slice = static_cast<int>(blockIdx.x % slices), first = slice * slice_vectors;
  const int vectors = min(slice_vectors, f.padded / 4 - first), group = thread / vectors;
  float result[2] = {0.0f, 0.0f};  // entropy, loss
  if (slice == 0) {
    for (int b = thread; b < blocks; b += threads) result[1] += f.losses[head * blocks + b];
  }
  if (group < groups) {
    const float* column = f.columns + head * blocks * f.padded + 4 * (first + thread % vectors);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int begin = group; begin < blocks; begin += kLoads * groups) {
      float4 x[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int b = begin + j * groups;
        x[j] = b < blocks ? ld_coherent<float4>(column + static_cast<int64_t>(b) * f.padded)
                          : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        sum = make_float4(sum.x + x[j].x, sum.y + x[j].y, sum.z + x[j].z, sum.w + x[j].w);
      }
    }
    st_shared(sums + 4 * thread, sum);
  }
  __syncthreads();
  for (int i = thread; i < 4 * vectors; i += threads) {
    const int c = 4 * first + i;
    if (c >= classes) break;
    float sum = 0.0f;
#pragma unroll 4
    for (int g = 0; g < groups; ++g) sum += sums[4 * vectors * g + i];
    result[0] += finish_class(f, head, c, sum, rows, classes);
  }
  block_combine(result, scratch, Add());
  if (thread != 0) return;
  if (slices == 1) {
    finish_head(f, head, result[1], result[0], rows);
  } else {
    f.slice_entropy[head * slices + slice] = result[0];
    f.slice_loss[head * slices + slice] = result[1];
  }
}

// Adds the slices of a head; one warp per head.
__global__ void __launch_bounds__(32) total_kernel(Finish f, int64_t rows, int slices) {
  wait_for_previous_kernel();
  const int64_t head = blockIdx.x;
  float entropy = 0.0f, loss = 0.0f;
  for (int slice = static_cast<int>(threadIdx.x); slice < slices; slice += 32) {
    entropy += f.slice_entropy[head * slices + slice];
    loss += f.slice_loss[head * slices + slice];
  }
  entropy = warp_sum(entropy);
  loss = warp_sum(loss);
  if (threadIdx.x == 0) finish_head(f, head, loss, entropy, rows);
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
  SCAN_FAST_SHARED(float, scratch, kThreads / 32);
  let_next_kernel_start();
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
  float* partial = finish.columns + (head * blocks + block) * finish.padded;
  float entropy[1] = {0.0f};
  for (int c = static_cast<int>(threadIdx.x); c < finish.padded; c += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sum += sums[g * kSlots + c];
    if (blocks > 1) {
      partial[c] = sum;
    } else if (c < classes) {
      entropy[0] += finish_class(finish, head, c, sum, rows, classes);
    }
  }
  loss = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) loss += losses[g];
  if (blocks > 1) {
    if (threadIdx.x == 0) finish.losses[head * blocks + block] = loss;
    return;
  }
  block_combine(entropy, scratch, Add());
  if (threadIdx.x == 0) finish_head(finish, head, loss, entropy[0], rows);
}

template <typename T>
__global__ void __launch_bounds__(kWideThreads)
    forward_wide_kernel(const T* __restrict__ anchors, const T* __restrict__ neighbors, float* row_stats, Finish finish,
                        int64_t rows, int classes, int blocks, bool columns_shared) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  SCAN_FAST_SHARED(float, scratch, 3 * kWideThreads / 32);
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.x / blocks;
  const int block = static_cast<int>(blockIdx.x % blocks);
  float* partial = finish.columns + (head * blocks + block) * finish.padded;
  // Each thread adds to its own classes only, so no barrier is needed.
  float* column = columns_shared ? dynamic.as<float>().get() : partial;
  for (int c = thread; c < finish.padded; c += kWideThreads) column[c] = 0.0f;
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
  if (blocks > 1) {
    if (columns_shared) {
      for (int c = thread; c < finish.padded; c += kWideThreads) partial[c] = column[c];
    }
    if (thread == 0) finish.losses[head * blocks + block] = loss;
    return;
  }
  float entropy[1] = {0.0f};
  for (int c = thread; c < classes; c += kWideThreads) {
    entropy[0] += finish_class(finish, head, c, column[c], rows, classes);
  }
  block_combine(entropy, scratch, Add());
  if (thread == 0) finish_head(finish, head, loss, entropy[0], rows);
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
  // Rows of few classes: after the loads of the first row, so that the latencies overlap. It would take registers that
  // long rows do not have.
  constexpr bool kLate = kPer == 4 || (kPer == 8 && kVector);
  float slope[kPer] = {};
  const auto load_slope = [&] {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int c = class_of<kGroup, kVector>(lane, i);
      slope[i] = c < classes ? entropy_slope(upstream.mean_prob[head * classes + c]) : 0.0f;
    }
  };
  if constexpr (!kLate) load_slope();
  const int64_t begin = static_cast<int64_t>(block) * kGroups;
  for (int64_t first = begin; first < rows; first += static_cast<int64_t>(blocks) * kGroups) {
    const bool active = first + group < rows;
    const int64_t row = head * rows + (active ? first + group : first);
    const float* stats = row_stats + row * kScanLossRowStats;
    const float max_a = stats[0], inverse_a = stats[1], max_n = stats[2], inverse_n = stats[3], shift = stats[4],
                inverse_joint = stats[5];
    float p[kPer], r[kPer], dot = 0.0f;
    load_row<T, kGroup, kPer, kVector>(anchors + row * classes, classes, lane, -infinity(), p);
    load_row<T, kGroup, kPer, kVector>(neighbors + row * classes, classes, lane, -infinity(), r);
    if (kLate && first == begin) load_slope();
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

int64_t rows_per_turn(const ScanLossShape& shape) {
  return shape.classes > kMostInRegisters ? 1 : shape.classes <= 32 ? 16 : 4;
}

// Blocks per head of a kernel of which a multiprocessor holds `resident` blocks: all blocks of all heads run at the
// same time, because a second wave with few blocks would take as long as the first. A block has at least one turn of
// its loop over rows.
int blocks_per_head(const ScanLossShape& shape, int resident) {
  const int64_t wanted = (shape.rows + rows_per_turn(shape) - 1) / rows_per_turn(shape);
  const int64_t share = static_cast<int64_t>(multiprocessors()) * resident / shape.heads;
  return static_cast<int>(wanted < share ? wanted : share > 1 ? share : 1);
}

// In the forward pass, two turns of one block are faster than a kernel that adds the sums of two.
int forward_blocks(const ScanLossShape& shape, int resident) {
  if (shape.rows <= 2 * rows_per_turn(shape)) return 1;
  return blocks_per_head(shape, resident < kMostResident ? resident : kMostResident);
}

int64_t padded_classes(const ScanLossShape& shape) { return (shape.classes + 3) / 4 * 4; }

struct Slices {
  int count, vectors;
};

Slices slices_of(const ScanLossShape& shape, int blocks) {
  const int64_t padded = padded_classes(shape);
  if (padded <= kFinishThreads && padded * blocks <= kOneSlice) return {1, static_cast<int>(padded / 4)};
  return {static_cast<int>((padded / 4 + kSliceVectors - 1) / kSliceVectors), kSliceVectors};
}

size_t workspace_floats(const ScanLossShape& shape, int blocks) {
  return static_cast<size_t>(shape.heads * (blocks * (padded_classes(shape) + 1) + 2 * slices_of(shape, blocks).count));
}

// Adds the results of the blocks of a forward kernel, which was launched before.
void launch_finish(const Finish& finish, const ScanLossShape& shape, int blocks, StreamHandle stream) {
  if (blocks == 1) return;
  const Slices slices = slices_of(shape, blocks);
  const int most = kFinishThreads / slices.vectors, wanted = (blocks + kLoads - 1) / kLoads;
  const int groups = wanted < most ? wanted : most;
  launch_after(finish_kernel, dim3(static_cast<unsigned>(shape.heads * slices.count)),
               dim3(static_cast<unsigned>(block_threads(groups * slices.vectors, kFinishThreads))), 0, stream, finish,
               shape.rows, static_cast<int>(shape.classes), blocks, slices.count, slices.vectors, groups);
  if (slices.count == 1) return;
  launch_after(total_kernel, dim3(static_cast<unsigned>(shape.heads)), dim3(32), 0, stream, finish, shape.rows,
               slices.count);
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

}  // namespace

// Suffices for the most blocks that any forward kernel may have on this device.
size_t scan_loss_cuda_workspace(const ScanLossShape& shape) {
  return workspace_floats(shape, forward_blocks(shape, kMostResident)) * sizeof(float);
}

void scan_loss_forward_cuda(DType dtype, const ScanLossShape& shape, const ScanLossForward& arguments,
                            StreamHandle stream) {
  const int classes = static_cast<int>(shape.classes);
  const auto finish_of = [&](int blocks) {
    float* columns = static_cast<float*>(arguments.workspace);
    float* losses = columns + shape.heads * blocks * padded_classes(shape);
    float* slice_entropy = losses + shape.heads * blocks;
    return Finish{columns,
                  losses,
                  slice_entropy,
                  slice_entropy + shape.heads * slices_of(shape, blocks).count,
                  arguments.total,
                  arguments.consistency,
                  arguments.entropy,
                  arguments.mean_prob,
                  arguments.entropy_weight,
                  static_cast<int>(padded_classes(shape))};
  };
  const auto grid = [&](int blocks) { return dim3(static_cast<unsigned>(shape.heads * blocks)); };
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* a = static_cast<const T*>(arguments.anchors);
    const T* n = static_cast<const T*>(arguments.neighbors);
    if (shape.classes > kMostInRegisters) {
      size_t bytes = static_cast<size_t>(padded_classes(shape)) * sizeof(float);
      const bool columns_shared = bytes <= static_cast<size_t>(kWideShared);
      if (!columns_shared) bytes = 0;
      const int blocks = forward_blocks(shape, resident_blocks(forward_wide_kernel<T>, kWideThreads, bytes));
      const Finish finish = finish_of(blocks);
      launch(forward_wide_kernel<T>, grid(blocks), dim3(kWideThreads), bytes, stream, a, n, arguments.row_stats, finish,
             shape.rows, classes, blocks, columns_shared);
      launch_finish(finish, shape, blocks, stream);
      return;
    }
    const bool vectors = aligned_rows<T>(a, shape.classes) && aligned_rows<T>(n, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, int kPer, bool kVector>() {
      const auto kernel = forward_kernel<T, kGroup, kPer, kVector>;
      const int blocks = forward_blocks(shape, resident_blocks(kernel, kThreads, 0));
      const Finish finish = finish_of(blocks);
      launch(kernel, grid(blocks), dim3(kThreads), 0, stream, a, n, arguments.row_stats, finish, shape.rows, classes,
             blocks);
      launch_finish(finish, shape, blocks, stream);
    });
  });
}

void scan_loss_backward_cuda(DType dtype, const ScanLossShape& shape, const ScanLossBackward& arguments,
                             StreamHandle stream) {
  const int classes = static_cast<int>(shape.classes);
  const Upstream upstream{arguments.grad_total, arguments.grad_consistency, arguments.grad_entropy, arguments.mean_prob,
                          arguments.entropy_weight};
  const auto grid = [&](int blocks) { return dim3(static_cast<unsigned>(shape.heads * blocks)); };
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* a = static_cast<const T*>(arguments.anchors);
    const T* n = static_cast<const T*>(arguments.neighbors);
    T* grad_a = static_cast<T*>(arguments.grad_anchors);
    T* grad_n = static_cast<T*>(arguments.grad_neighbors);
    if (shape.classes > kMostInRegisters) {
      const int blocks = blocks_per_head(shape, resident_blocks(backward_wide_kernel<T>, kWideThreads, 0));
      launch(backward_wide_kernel<T>, grid(blocks), dim3(kWideThreads), 0, stream, a, n, arguments.row_stats, upstream,
             grad_a, grad_n, shape.rows, classes, blocks);
      return;
    }
    const bool vectors = aligned_rows<T>(a, shape.classes) && aligned_rows<T>(n, shape.classes) &&
                         aligned_rows<T>(grad_a, shape.classes) && aligned_rows<T>(grad_n, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, int kPer, bool kVector>() {
      const auto kernel = backward_kernel<T, kGroup, kPer, kVector>;
      const int blocks = blocks_per_head(shape, resident_blocks(kernel, kThreads, 0));
      launch(kernel, grid(blocks), dim3(kThreads), 0, stream, a, n, arguments.row_stats, upstream, grad_a, grad_n,
             shape.rows, classes, blocks);
    });
  });
}

}  // namespace scan_fast
