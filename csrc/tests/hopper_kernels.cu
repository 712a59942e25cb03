#include "tests/hopper_kernels.h"

#include "common/tile_products.cuh"

namespace scan_fast::hopper_test {
namespace {

template <typename T>
__global__ void __launch_bounds__(256, 1)
    chained_products_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out,
                            float* __restrict__ out2, Fault fault) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  const Shared<unsigned char> memory = aligned_to_panels(dynamic);
  unsigned char* const tile_a = memory.get();
  unsigned char* const tile_b = tile_a + kPanelBytes;
  MBarrier* const full = (memory + 2 * kPanelBytes).as<MBarrier>().get();
  MBarrier* const empty = full + 1;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 4);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if (threadIdx.x == 0) {
      mbarrier_expect(full, 2 * kPanelBytes);
      bulk_copy(tile_a, a, kPanelBytes, full);
      bulk_copy(tile_b, b, kPanelBytes, full);
      mbarrier_wait(empty, 0);
      mbarrier_expect(full, kPanelBytes);
      bulk_copy(tile_a, b, kPanelBytes, full);
      mbarrier_wait(full, 1);
    }
    return;
  }
  if (fault != Fault::kNoDataWait) mbarrier_wait(full, 0);
  float c[32], c2[32];
  if (fault != Fault::kNoFence) wgmma_fence(c);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma<T, 64>(c, advance(k_major(tile_a), 32 * k), advance(k_major(tile_b), 32 * k), k > 0);
  wgmma_commit();
  if (fault == Fault::kEarlyRelease && threadIdx.x % 32 == 0) mbarrier_arrive(empty);
  if (fault == Fault::kWrittenInFlight) c[3] = 1.0f;
  if (fault != Fault::kNoResultWait) wgmma_wait<0>(c);
  if (fault != Fault::kEarlyRelease && threadIdx.x % 32 == 0) mbarrier_arrive(empty);
  uint32_t fragments[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int q = 0; q < 4; ++q) fragments[k][q] = pack2<T>(c[8 * k + 2 * q], c[8 * k + 2 * q + 1]);
  }
  wgmma_fence(c2);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma<T, 64, true>(c2, fragments[k], advance(mn_major(tile_b, kPanelBytes), 2048 * k), k > 0);
  wgmma_commit();
  if (fault != Fault::kNotWaitedFor) wgmma_wait<0>(c2);
#pragma unroll
  for (int r = 0; r < 32; ++r) {
    out[accumulator_row(r) * 64 + accumulator_column(r)] = c[r];
    out2[accumulator_row(r) * 64 + accumulator_column(r)] = c2[r];
  }
}

// Every block takes every gridDim-th fixed tile, and cuts the moving tiles into runs of at most two.
struct EveryPair {
  struct Run {
    int fixed, begin, end;
  };
  int fixed_tiles, moving_tiles, fixed, begin;
  __device__ EveryPair(int fixed_tiles_, int moving_tiles_)
      : fixed_tiles(fixed_tiles_), moving_tiles(moving_tiles_), fixed(static_cast<int>(blockIdx.x)), begin(0) {}
  __device__ bool next(Run& run) {
    if (fixed >= fixed_tiles) return false;
    run = {fixed, begin, begin + 2 < moving_tiles ? begin + 2 : moving_tiles};
    begin = run.end;
    if (begin == moving_tiles) {
      begin = 0;
      fixed += static_cast<int>(gridDim.x);
    }
    return true;
  }
};

template <typename P>
struct StoreAll {
  float* out;
  int64_t width;
  __device__ void begin(const EveryPair::Run&) {}
  __device__ void tile(float (&c)[P::kColumns / 2], const EveryPair::Run& run, int moving) {
    const bool columns_fixed = P::kResident == Resident::kColumns;
    const int64_t row_tile = columns_fixed ? moving : run.fixed, column_tile = columns_fixed ? run.fixed : moving;
#pragma unroll
    for (int r = 0; r < P::kColumns / 2; ++r) {
      out[(row_tile * kPanelRows + tile_row(r)) * width + column_tile * P::kColumns + accumulator_column(r)] = c[r];
    }
  }
  __device__ void end(const EveryPair::Run&) {}
};

template <typename P>
__global__ void __launch_bounds__(kProductThreads, 1)
    tile_products_kernel(const typename P::T* __restrict__ rows, const typename P::T* __restrict__ columns, int panels,
                         int row_count, int column_count, float* __restrict__ out) {
  SCAN_FAST_DYNAMIC_SHARED(dynamic);
  StoreAll<P> epilogue{out, static_cast<int64_t>(column_count) * P::kColumns};
  const bool columns_fixed = P::kResident == Resident::kColumns;
  const EveryPair schedule(columns_fixed ? column_count : row_count, columns_fixed ? row_count : column_count);
  multiply_tiles<P>(aligned_to_panels(dynamic), PackedOperand<typename P::T>{rows, panels},
                    PackedOperand<typename P::T>{columns, panels}, schedule, epilogue);
}

template <typename P>
void run(const void* rows, const void* columns, int panels, int row_count, int column_count, float* out) {
  using T = typename P::T;
  launch(tile_products_kernel<P>, dim3(2), dim3(kProductThreads), P::kSharedBytes + 1024, nullptr,
         static_cast<const T*>(rows), static_cast<const T*>(columns), panels, row_count, column_count, out);
}

template <typename T, int kColumns>
void run(Mode mode, const void* rows, const void* columns, int panels, int row_count, int column_count, float* out) {
  constexpr int kFixed = kColumns == 128 ? 2 : 1;  // panels that fit
  switch (mode) {
    case Mode::kNone:
      return run<Products<T, kColumns, Resident::kNone, 0, 3>>(rows, columns, panels, row_count, column_count, out);
    case Mode::kRows:
      return run<Products<T, kColumns, Resident::kRows, 2, 3>>(rows, columns, panels, row_count, column_count, out);
    case Mode::kColumns:
      return run<Products<T, kColumns, Resident::kColumns, kFixed, 3>>(rows, columns, panels, row_count, column_count,
                                                                       out);
    case Mode::kSplitRows:
      return run<Products<T, kColumns, Resident::kRows, 2 * kFixed, 2 * kFixed, true>>(rows, columns, panels, row_count,
                                                                                       column_count, out);
    case Mode::kSplitColumns:
      return run<Products<T, kColumns, Resident::kColumns, 2 * kFixed, 2 * kFixed, true>>(rows, columns, panels,
                                                                                          row_count, column_count, out);
  }
}

}  // namespace

void chained_products(DType dtype, const void* a, const void* b, float* out, float* out2, Fault fault) {
  const auto launch_as = [&]<typename T>() {
    launch(chained_products_kernel<T>, dim3(1), dim3(256), 2 * kPanelBytes + 16 + 1024, nullptr,
           static_cast<const T*>(a), static_cast<const T*>(b), out, out2, fault);
  };
  if (dtype == DType::kBFloat16) {
    launch_as.operator()<bf16_t>();
  } else {
    launch_as.operator()<half_t>();
  }
}

void tile_products(Mode mode, DType dtype, int width, const void* rows, const void* columns, int panels, int row_count,
                   int column_count, float* out) {
  if (dtype == DType::kBFloat16) {
    run<bf16_t, 128>(mode, rows, columns, panels, row_count, column_count, out);
  } else if (width == 128) {
    run<half_t, 128>(mode, rows, columns, panels, row_count, column_count, out);
  } else {
    run<half_t, 256>(mode, rows, columns, panels, row_count, column_count, out);
  }
}

}  // namespace scan_fast::hopper_test
