// GPU kernels of the self-label loss: one launch forward, one backward.
//
// self_label.h has the formulas. A group of 8 or 32 lanes reads a row once and keeps a running maximum and sum per lane
// (four logits per step if rows are aligned). Only confident rows read their strong logits. The rows of each class are
// counted with integer atomics. The block that finishes last (by a ticket counter) turns the counts into weights and
// adds the weighted losses in a fixed order, so the bits are the same in every run. The limit is memory: at most 2 B C
// elements forward, 2 B C backward.
//
// Tested on the host with the emulator and compiled for every architecture. docs/gpu-status.md states whether it has
// run on a GPU.
#include "common/row_groups.cuh"
#include "self_label/self_label.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 128;

struct Softmax {
  float max, sum;
  int first;  // first class that has the maximum
};

// Processes one row by one group. If `active` is false (for the whole group), nothing is read, but the lanes take part
// in shuffles. If the maximum of a row is infinite or NaN, its sum is NaN, as in softmax.
template <typename T, int kGroup, bool kVector>
__device__ __forceinline__ Softmax softmax_of(const T* row, int classes, int lane, bool active) {
  Softmax mine{-infinity(), 0.0f, 0};
  const int count = active ? classes : 0;
  constexpr int kStep = kVector ? 4 : 1;
  for (int c = lane * kStep; c < count; c += kGroup * kStep) {
    float x[kStep];
    if constexpr (kVector) {
      load4(row + c, x);
    } else {
      x[0] = to_float(row[c]);
    }
    float best = mine.max;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (x[i] > best) {
        best = x[i];
        mine.first = c + i;
      }
    }
    if (best > mine.max) {
      mine.sum *= exp_negative(mine.max - best);  // from -infinity: 0 times 0
      mine.max = best;
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (x[i] != -infinity()) mine.sum += exp_negative(x[i] - mine.max);
    }
  }
  const float max = group_max<kGroup>(mine.max);
  // The sum of a lane without a finite value is 0, or NaN if the lane has read one.
  const float sum = group_sum<kGroup>(
      mine.max == max || mine.max == -infinity() ? mine.sum : mine.sum * exp_negative(mine.max - max));
  const int first = group_min<kGroup>(mine.max == max ? mine.first : 0x7fffffff);
  return {max, max == infinity() || max == -infinity() ? infinity() - infinity() : sum, first};
}

struct ForwardOutputs {
  float* loss;
  int64_t* n_confident;
  int32_t* target;
  float* row_weight;
  float* row_stats;
  float* losses;     // (rows)
  int* per_class;    // (classes), zero at launch
  unsigned* ticket;  // zero at launch
};

// Computes weights from counts, and the weighted sum, by the last block.
__device__ void finish(const ForwardOutputs& out, int64_t rows, int classes, bool balance, const Shared<int>& scratch,
                       const Shared<float>& float_scratch) {
  int counts[2] = {0, 0};  // classes that occur, confident rows
  for (int c = static_cast<int>(threadIdx.x); c < classes; c += kThreads) {
    counts[0] += out.per_class[c] > 0;
    counts[1] += out.per_class[c];
  }
  block_combine(counts, scratch, Add());
  float loss[1] = {0.0f};
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    if (out.row_weight[i] == 0.0f) continue;
    const float rows_like_it = static_cast<float>(balance ? out.per_class[out.target[i]] : counts[1]);
    const float weight = 1.0f / (balance ? rows_like_it * static_cast<float>(counts[0]) : rows_like_it);
    out.row_weight[i] = weight;
    loss[0] += weight * out.losses[i];
  }
  block_combine(loss, float_scratch, Add());
  if (threadIdx.x == 0) {
    *out.loss = loss[0];
    *out.n_confident = counts[1];
  }
}

template <typename T, int kGroup, bool kVector>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ weak, const T* __restrict__ strong, ForwardOutputs out, int64_t rows,
                   int classes, float threshold, bool balance) {
  constexpr int kGroups = kThreads / kGroup;
  SCAN_FAST_SHARED(int, scratch, 2 * kThreads / 32);
  SCAN_FAST_SHARED(float, float_scratch, kThreads / 32);
  const int group = static_cast<int>(threadIdx.x) / kGroup, lane = static_cast<int>(threadIdx.x) % kGroup;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const bool active = first + group < rows;
    const int64_t row = active ? first + group : first;
    const Softmax w = softmax_of<T, kGroup, kVector>(weak + row * classes, classes, lane, active);
    const bool confident = active && 1.0f / w.sum > threshold;
    Softmax s{0.0f, 0.0f, 0};
    if (__any_sync(kFullMask, confident)) {
      s = softmax_of<T, kGroup, kVector>(strong + row * classes, classes, lane, confident);
    }
    if (active && lane == 0) {
      const int target = w.first < classes ? w.first : 0;  // a row of NaN has no largest class
      out.target[row] = target;
      out.row_weight[row] = confident ? 1.0f : 0.0f;
      out.row_stats[row * kSelfLabelRowStats] = confident ? s.max : 0.0f;
      out.row_stats[row * kSelfLabelRowStats + 1] = confident ? 1.0f / s.sum : 0.0f;
      if (confident) {
        out.losses[row] = logf(s.sum) - (to_float(strong[row * classes + target]) - s.max);
        atomicAdd(out.per_class + target, 1);
      }
    }
  }
  if (is_last_block(out.ticket, gridDim.x)) finish(out, rows, classes, balance, scratch, float_scratch);
}

template <typename T, int kGroup, bool kVector>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* __restrict__ grad_loss, const T* __restrict__ strong,
                    const int32_t* __restrict__ target, const float* __restrict__ row_weight,
                    const float* __restrict__ row_stats, T* __restrict__ grad_strong, int64_t rows, int classes) {
  constexpr int kGroups = kThreads / kGroup, kStep = kVector ? 4 : 1;
  const int group = static_cast<int>(threadIdx.x) / kGroup, lane = static_cast<int>(threadIdx.x) % kGroup;
  const float upstream = *grad_loss;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kGroups + group; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kGroups) {
    const float weight = row_weight[row], scale = upstream * weight;
    const float max = row_stats[row * kSelfLabelRowStats], factor = scale * row_stats[row * kSelfLabelRowStats + 1];
    const int label = target[row];
    for (int c = lane * kStep; c < classes; c += kGroup * kStep) {
      float x[kStep] = {};
      if (weight != 0.0f) {
        if constexpr (kVector) {
          load4(strong + row * classes + c, x);
        } else {
          x[0] = to_float(strong[row * classes + c]);
        }
#pragma unroll
        for (int i = 0; i < kStep; ++i) x[i] = factor * exp_negative(x[i] - max) - (c + i == label ? scale : 0.0f);
      }
      if constexpr (kVector) {
        store4(grad_strong + row * classes + c, x);
      } else {
        grad_strong[row * classes + c] = from_float<T>(x[0]);
      }
    }
  }
}

dim3 grid_of(const SelfLabelShape& shape) {
  const int64_t turn = shape.classes <= 32 ? kThreads / 8 : kThreads / 32;
  const int64_t wanted = (shape.rows + turn - 1) / turn, most = static_cast<int64_t>(multiprocessors()) * 8;
  return dim3(static_cast<unsigned>(wanted < most ? wanted : most));
}

// Calls launch.operator()<kGroup, kVector>().
template <typename Launch>
void with_row_layout(int64_t classes, bool vectors, Launch launch) {
  if (classes <= 32) {
    launch.template operator()<8, false>();
  } else {
    vectors ? launch.template operator()<32, true>() : launch.template operator()<32, false>();
  }
}

}  // namespace

size_t self_label_cuda_workspace(const SelfLabelShape& shape) {
  return static_cast<size_t>(shape.rows) * sizeof(float) + static_cast<size_t>(shape.classes + 1) * sizeof(int);
}

void self_label_forward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelForward& arguments,
                             StreamHandle stream) {
  float* losses = static_cast<float*>(arguments.workspace);
  int* per_class = reinterpret_cast<int*>(losses + shape.rows);
  const ForwardOutputs out{arguments.loss,      arguments.n_confident,
                           arguments.target,    arguments.row_weight,
                           arguments.row_stats, losses,
                           per_class,           reinterpret_cast<unsigned*>(per_class + shape.classes)};
  zero_async(per_class, static_cast<size_t>(shape.classes + 1) * sizeof(int), stream);
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* weak = static_cast<const T*>(arguments.weak);
    const T* strong = static_cast<const T*>(arguments.strong);
    const bool vectors = aligned_rows<T>(weak, shape.classes) && aligned_rows<T>(strong, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, bool kVector>() {
      launch(forward_kernel<T, kGroup, kVector>, grid_of(shape), dim3(kThreads), 0, stream, weak, strong, out,
             shape.rows, static_cast<int>(shape.classes), arguments.threshold, arguments.balance);
    });
  });
}

void self_label_backward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelBackward& arguments,
                              StreamHandle stream) {
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* strong = static_cast<const T*>(arguments.strong);
    T* grad = static_cast<T*>(arguments.grad_strong);
    const bool vectors = aligned_rows<T>(strong, shape.classes) && aligned_rows<T>(grad, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, bool kVector>() {
      launch(backward_kernel<T, kGroup, kVector>, grid_of(shape), dim3(kThreads), 0, stream, arguments.grad_loss,
             strong, arguments.target, arguments.row_weight, arguments.row_stats, grad, shape.rows,
             static_cast<int>(shape.classes));
    });
  });
}

}  // namespace scan_fast
