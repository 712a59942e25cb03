// GPU kernels of the self-label loss: forward two launches, backward one.
//
// self_label.h has the formulas. A group of 8 or 32 lanes loads up to 1024 classes of a row at once, into registers, and
// keeps a running maximum and sum per lane. Rows of more than 32 classes read their strong logits only if they are
// confident; shorter ones load both views together, which saves a round trip to memory. The second kernel, one block,
// counts the rows of each class with integer atomics in shared memory, turns the counts into weights and adds the
// weighted losses in a fixed order, so the bits are the same in every run. Its launch overlaps the first kernel
// (launch_after). The limit is memory: at most 2 B C elements forward, 2 B C backward.
//
// Predictions for an H200 (132 multiprocessors, 4.3 TB/s), not measured:
//   1024x1000 float32   52 registers, 256 blocks, two round trips; 256 threads with 4 rows each; backward 92 registers,
//                       two round trips. 16 MB, limit 3.8 us: 4.0 + 2.0 + 3.5 us, 40 % of the limit.
//   1000x10 float32     63 blocks. Latency only: per kernel one round trip, the second about 700 cycles of shared memory
//                       and barriers. 2.3 + 2.0 + 2.2 us.
//
// Tested on the host with the emulator and compiled for every architecture. docs/gpu-status.md states whether it has
// run on a GPU.
#include <type_traits>

#include "common/row_groups.cuh"
#include "self_label/self_label.h"

namespace scan_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kFinishThreads = 1024;                 // at most
constexpr int kRowsPerThread = 4;                    // of finish_kernel, in flight
constexpr size_t kSharedCounts = size_t{96} * 1024;  // if the counts need more, they are in global memory

struct Softmax {
  float max, sum;
  int first;  // first class that has the maximum
};

// The softmax of the classes that a lane has seen so far. Without any, it is {-infinity(), 0, 0}.
template <int kGroup, int kPer, bool kVector>
__device__ __forceinline__ void add_classes(Softmax& mine, const float (&x)[kPer], int base, int lane) {
  float best = mine.max;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (x[i] > best) {
      best = x[i];
      mine.first = base + class_of<kGroup, kVector>(lane, i);
    }
  }
  if (best > mine.max) {
    mine.sum *= exp_negative(mine.max - best);  // from -infinity: 0 times 0
    mine.max = best;
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (x[i] != -infinity()) mine.sum += exp_negative(x[i] - mine.max);
  }
}

// Combines the lanes of a group. If the maximum of a row is infinite or NaN, its sum is NaN, as in softmax. All lanes
// of the warp must take part.
template <int kGroup>
__device__ __forceinline__ Softmax combined(const Softmax& mine) {
  const float max = group_max<kGroup>(mine.max);
  // The sum of a lane without a finite value is 0, or NaN if the lane has read one.
  const float sum = group_sum<kGroup>(
      mine.max == max || mine.max == -infinity() ? mine.sum : mine.sum * exp_negative(mine.max - max));
  const int first = group_min<kGroup>(mine.max == max ? mine.first : 0x7fffffff);
  return {max, max == infinity() || max == -infinity() ? infinity() - infinity() : sum, first};
}

// Processes one row by one group, kGroup * kPer classes at a time, which are in flight together. If `active` is false
// (for the whole group), nothing is read, but the lanes take part in shuffles.
template <typename T, int kGroup, int kPer, bool kVector>
__device__ __forceinline__ Softmax softmax_of(const T* row, int classes, int lane, bool active) {
  Softmax mine{-infinity(), 0.0f, 0};
  for (int base = 0; base < (active ? classes : 0); base += kGroup * kPer) {
    float x[kPer];
    load_row<T, kGroup, kPer, kVector>(row + base, classes - base, lane, -infinity(), x);
    add_classes<kGroup, kPer, kVector>(mine, x, base, lane);
  }
  return combined<kGroup>(mine);
}

struct ForwardOutputs {
  float* loss;
  int64_t* n_confident;
  int32_t* target;
  float* row_weight;
  float* row_stats;
  int2* results;   // (rows): the label, or -1 if the row is not confident, and the bits of its loss
  int* per_class;  // (classes), used if the counts do not fit into shared memory
};

template <typename T, int kGroup, int kPer, bool kVector>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ weak, const T* __restrict__ strong, ForwardOutputs out, int64_t rows,
                   int classes, float threshold) {
  constexpr int kGroups = kThreads / kGroup;
  constexpr bool kWhole = kGroup == 8;  // a row fits into registers, and those of both views are loaded at once
  let_next_kernel_start();
  const int group = static_cast<int>(threadIdx.x) / kGroup, lane = static_cast<int>(threadIdx.x) % kGroup;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const bool active = first + group < rows;
    const int64_t row = active ? first + group : first;
    const T *weak_row = weak + row * classes, *strong_row = strong + row * classes;
    Softmax w, s{0.0f, 0.0f, 0};
    bool confident;
    if constexpr (kWhole) {
      float x[kPer], y[kPer];
      load_row<T, kGroup, kPer, kVector>(weak_row, classes, lane, -infinity(), x);
      load_row<T, kGroup, kPer, kVector>(strong_row, classes, lane, -infinity(), y);
      w = s = {-infinity(), 0.0f, 0};
      add_classes<kGroup, kPer, kVector>(w, x, 0, lane);
      add_classes<kGroup, kPer, kVector>(s, y, 0, lane);
      w = combined<kGroup>(w);
      s = combined<kGroup>(s);
      confident = active && 1.0f / w.sum > threshold;
    } else {
      w = softmax_of<T, kGroup, kPer, kVector>(weak_row, classes, lane, active);
      confident = active && 1.0f / w.sum > threshold;
      if (__any_sync(kFullMask, confident)) {
        s = softmax_of<T, kGroup, kPer, kVector>(strong_row, classes, lane, confident);
      }
    }
    if (active && lane == 0) {
      const int target = w.first < classes ? w.first : 0;  // a row of NaN has no largest class
      float loss = 0.0f;
      if (confident) loss = logf(s.sum) - (to_float(strong_row[target]) - s.max);
      out.target[row] = target;
      out.row_stats[row * kSelfLabelRowStats] = confident ? s.max : 0.0f;
      out.row_stats[row * kSelfLabelRowStats + 1] = confident ? 1.0f / s.sum : 0.0f;
      st_global(out.results + row, make_int2(confident ? target : -1, __float_as_int(loss)));
    }
  }
}

// Counts the confident rows of each class, then computes the weights and adds the weighted losses; one block.
template <bool kInShared>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(ForwardOutputs out, int64_t rows, int classes, bool balance) {
  using Counts = std::conditional_t<kInShared, Shared<int>, int*>;
  SCAN_FAST_DYNAMIC_SHARED(memory);
  SCAN_FAST_SHARED(int, scratch, 2 * kFinishThreads / 32);
  SCAN_FAST_SHARED(float, float_scratch, kFinishThreads / 32);
  Counts per_class;
  if constexpr (kInShared) {
    per_class = memory.as<int>();
  } else {
    per_class = out.per_class;
    wait_for_previous_kernel();
  }
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (balance) {
    for (int c = thread; c < classes; c += threads) per_class[c] = 0;
    __syncthreads();
  }
  if constexpr (kInShared) wait_for_previous_kernel();
  int counts[2] = {0, 0};  // classes that occur, confident rows
  // Calls body(row, label, loss) for the rows of this thread. The loads of kRowsPerThread rows are in flight together.
  const auto for_rows = [&](auto body) {
    for (int64_t begin = thread; begin < rows; begin += static_cast<int64_t>(kRowsPerThread) * threads) {
      int2 result[kRowsPerThread];
#pragma unroll
      for (int j = 0; j < kRowsPerThread; ++j) {
        const int64_t row = begin + static_cast<int64_t>(j) * threads;
        result[j] = row < rows ? ld_coherent<int2>(out.results + row) : make_int2(-1, 0);
      }
#pragma unroll
      for (int j = 0; j < kRowsPerThread; ++j) {
        const int64_t row = begin + static_cast<int64_t>(j) * threads;
        if (row < rows) body(row, result[j].x, __int_as_float(result[j].y));
      }
    }
  };
  for_rows([&](int64_t, int label, float) {
    if (label < 0) return;
    ++counts[1];
    if (!balance) return;
    if constexpr (kInShared) {
      atomicAdd((per_class + static_cast<int64_t>(label)).get(), 1);
    } else {
      atomicAdd(per_class + label, 1);
    }
  });
  if (balance) {
    __syncthreads();
    for (int c = thread; c < classes; c += threads) {
      const int count = per_class[c];
      counts[0] += count > 0;
    }
  }
  block_combine(counts, scratch, Add());
  float loss[1] = {0.0f};
  for_rows([&](int64_t row, int label, float row_loss) {
    float weight = 0.0f;
    if (label >= 0) {
      int like_it = counts[1];
      if (balance) like_it = per_class[label];
      const float divisor = static_cast<float>(like_it);
      weight = 1.0f / (balance ? divisor * static_cast<float>(counts[0]) : divisor);
      loss[0] += weight * row_loss;
    }
    out.row_weight[row] = weight;
  });
  block_combine(loss, float_scratch, Add());
  if (thread == 0) {
    *out.loss = loss[0];
    *out.n_confident = counts[1];
  }
}

template <typename T, int kGroup, int kPer, bool kVector>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const float* __restrict__ grad_loss, const T* __restrict__ strong,
                    const int32_t* __restrict__ target, const float* __restrict__ row_weight,
                    const float* __restrict__ row_stats, T* __restrict__ grad_strong, int64_t rows, int classes) {
  constexpr int kGroups = kThreads / kGroup;
  const int group = static_cast<int>(threadIdx.x) / kGroup, lane = static_cast<int>(threadIdx.x) % kGroup;
  const float upstream = *grad_loss;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kGroups + group; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kGroups) {
    const float weight = row_weight[row], scale = upstream * weight;
    const float max = row_stats[row * kSelfLabelRowStats], factor = scale * row_stats[row * kSelfLabelRowStats + 1];
    const int label = target[row];
    const T* logits = strong + row * classes;
    T* grad = grad_strong + row * classes;
    // The whole row if classes <= 32: the compiler must know that the loop ends after one turn.
    for (int base = 0; base < (kGroup == 8 ? 1 : classes); base += kGroup * kPer) {
      float x[kPer] = {};
      // Rows of few classes are loaded together with their weights, others only if they have one.
      if (kGroup == 8 || weight != 0.0f) {
        load_row<T, kGroup, kPer, kVector>(logits + base, classes - base, lane, 0.0f, x);
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int c = base + class_of<kGroup, kVector>(lane, i);
        x[i] = weight != 0.0f ? factor * exp_negative(x[i] - max) - (c == label ? scale : 0.0f) : 0.0f;
      }
      store_row<T, kGroup, kPer, kVector>(grad + base, classes - base, lane, x);
    }
  }
}

// The blocks that run at the same time, if the rows are enough.
template <typename Kernel>
dim3 grid_of(const SelfLabelShape& shape, Kernel kernel) {
  const int64_t turn = shape.classes <= 32 ? kThreads / 8 : kThreads / 32;
  const int64_t wanted = (shape.rows + turn - 1) / turn;
  const int64_t most = static_cast<int64_t>(multiprocessors()) * resident_blocks(kernel, kThreads, 0);
  return dim3(static_cast<unsigned>(wanted < most ? wanted : most));
}

// Calls launch.operator()<kGroup, kPer, kVector>().
template <typename Launch>
void with_row_layout(int64_t classes, bool vectors, Launch launch) {
  if (classes <= 32) {
    launch.template operator()<8, 4, false>();
  } else if (!vectors) {
    launch.template operator()<32, 8, false>();  // more would take 250 registers in the backward pass
  } else if (classes <= 256) {
    launch.template operator()<32, 8, true>();
  } else {
    launch.template operator()<32, 32, true>();
  }
}

}  // namespace

size_t self_label_cuda_workspace(const SelfLabelShape& shape) {
  return static_cast<size_t>(shape.rows) * sizeof(int2) + static_cast<size_t>(shape.classes) * sizeof(int);
}

void self_label_forward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelForward& arguments,
                             StreamHandle stream) {
  int2* results = static_cast<int2*>(arguments.workspace);
  const ForwardOutputs out{arguments.loss,
                           arguments.n_confident,
                           arguments.target,
                           arguments.row_weight,
                           arguments.row_stats,
                           results,
                           reinterpret_cast<int*>(results + shape.rows)};
  const int classes = static_cast<int>(shape.classes);
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* weak = static_cast<const T*>(arguments.weak);
    const T* strong = static_cast<const T*>(arguments.strong);
    const bool vectors = aligned_rows<T>(weak, shape.classes) && aligned_rows<T>(strong, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, int kPer, bool kVector>() {
      const auto kernel = forward_kernel<T, kGroup, kPer, kVector>;
      launch(kernel, grid_of(shape, kernel), dim3(kThreads), 0, stream, weak, strong, out, shape.rows, classes,
             arguments.threshold);
    });
  });
  const int threads = block_threads((shape.rows + kRowsPerThread - 1) / kRowsPerThread, kFinishThreads);
  const size_t bytes = arguments.balance ? static_cast<size_t>(shape.classes) * sizeof(int) : 0;
  const bool in_shared = bytes + 4096 <= shared_memory_limit() && bytes <= kSharedCounts;
  launch_after(in_shared ? finish_kernel<true> : finish_kernel<false>, dim3(1), dim3(static_cast<unsigned>(threads)),
               in_shared ? bytes : 0, stream, out, shape.rows, classes, arguments.balance);
}

void self_label_backward_cuda(DType dtype, const SelfLabelShape& shape, const SelfLabelBackward& arguments,
                              StreamHandle stream) {
  dispatch_dtype(dtype, [&]<typename T>() {
    const T* strong = static_cast<const T*>(arguments.strong);
    T* grad = static_cast<T*>(arguments.grad_strong);
    const bool vectors = aligned_rows<T>(strong, shape.classes) && aligned_rows<T>(grad, shape.classes);
    with_row_layout(shape.classes, vectors, [&]<int kGroup, int kPer, bool kVector>() {
      const auto kernel = backward_kernel<T, kGroup, kPer, kVector>;
      launch(kernel, grid_of(shape, kernel), dim3(kThreads), 0, stream, arguments.grad_loss, strong, arguments.target,
             arguments.row_weight, arguments.row_stats, grad, shape.rows, static_cast<int>(shape.classes));
    });
  });
}

}  // namespace scan_fast
