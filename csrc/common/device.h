// Device layer: one kernel source, compiled by nvcc for the GPU and by a C++ compiler (-DSCAN_FAST_EMULATE) for tests.
//
// A .cu file includes this header, <common/types.h> and its own contract; no torch header. It is ordinary CUDA C++:
//
//   template <typename T>
//   __global__ void __launch_bounds__(256) row_sum(const T* __restrict__ x, float* __restrict__ y, int c) {
//     SCAN_FAST_SHARED(float, partial, 8);                       // static shared memory: Shared<float>
//     float sum = 0;
//     for (int i = threadIdx.x; i < c; i += blockDim.x) sum += to_float(x[int64_t(blockIdx.x) * c + i]);
//     sum = warp_sum(sum);
//     if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
//     __syncthreads();
//     ...
//   }
//   launch(row_sum<half_t>, dim3(rows), dim3(256), /*smem=*/0, stream, x, y, c);
//
// CUDA's own spellings exist in both forms: threadIdx, blockIdx, blockDim, gridDim, dim3, float2/float4/uint2/uint4/
// int2/int4 and make_*, __syncthreads, __syncwarp, __shfl_{xor,down,up,idx}_sync (4- and 8-byte values, with width),
// __ballot_sync, __any_sync, __all_sync, __reduce_add_sync (int), atomicAdd/Max/Min/Exch/CAS/Or (int, unsigned,
// unsigned long long), __threadfence, __ldg, __float_as_uint and back, __popc, __ffs, __clz, min, max, rsqrtf, the C
// float functions.
//
// This layer adds, in namespace scan_fast:
//   Shared<T>                        pointer to shared memory; s[i] reads and writes, s + n, s.as<U>(), s.get().
//                                    On the host s[i] is a proxy: name the type, `const float v = s[i];`, not auto.
//   SCAN_FAST_SHARED(T, name, n)     static shared array of n elements (n constant)
//   SCAN_FAST_DYNAMIC_SHARED(name)   the launch's dynamic shared memory as Shared<unsigned char>, 128-byte aligned
//   ld_shared<V>(p), st_shared(p, v) vector access (V = uint4, float4, ...) to shared memory, p a raw T* or Shared<T>
//   ld_global<V>(p), st_global(p, v) vector access to global memory; p must be aligned to sizeof(V)
//   ld_coherent<V>(p)                ld_global for memory that is written while the grid exists: by other threads, or by
//                                    the kernel before if launch_after started this one
//   cp_async_16(dst, src, bytes=16)  16-byte asynchronous copy global -> shared; only the first `bytes` are read, the
//   cp_async_commit(), cp_async_wait<N>()   rest is filled with zeros. Other threads read after a __syncthreads().
//   ldmatrix_x4(r, p), ldmatrix_x4_trans(r, p)   p: this lane's 16-byte row (lane l gives row l%8 of matrix l/8)
//   mma_16816<T>(d, a, b)            d[4] += a[4] x b[2], mma.sync.m16n8k16 row.col, T = half_t or bf16_t, float32 sums
//   exp2_approx, log2_approx, rsqrt_approx, rcp_approx      the unit's .approx.ftz instructions
//   exp2_polynomial(x)               2^x on the units for additions and products, see below
//   max_nan(x, y)                    the larger one; NaN if one of them is NaN
//   half_t, bf16_t; to_float(x), from_float<T>(f), pack2<T>(lo, hi) -> uint32_t, unpack2<T>(u) -> float2
//   warp_sum, warp_max, warp_min     butterfly over 32 lanes in a fixed order (float, int); every lane gets the result
//   launch(kernel, grid, block, smem, stream, args...)   throws std::runtime_error with CUDA's message
//   launch_after(...)                launch(...) of a kernel whose launch overlaps the kernel before, see below
//   wait_for_previous_kernel(), let_next_kernel_start()     device functions for launch_after
//   zero_async(ptr, bytes, stream), multiprocessors(), compute_capability(), shared_memory_limit()
//   resident_blocks(kernel, threads, smem)   blocks that a multiprocessor holds at a time, by the registers of the build
//   dispatch_dtype(dtype, []<typename T>() {...})
//
// The host form (testing/emulator.h) runs one block after the other. The threads of a block are fibers, each of which
// runs until its next barrier or warp collective. It detects errors that a GPU accepts silently:
//   - access out of range (AddressSanitizer; shared memory is allocated to its exact size)
//   - reads of shared memory that was never written (it is filled with NaN)
//   - a missing cp_async_wait (copies land only at the wait)
//   - collectives that some lanes never reach, and misaligned vectors
//   - with emu::options().detect_races, races on shared memory, accessed through Shared<T>, ld_shared/st_shared,
//     cp_async, ldmatrix and atomics
//   - launches that the emulated GPU (emu::options()) would refuse: too much shared memory, or more than 48 KB that
//     were not requested. A static array counts from its first use on; nvcc counts all arrays of the kernel.
//   - a thread that launch_after started and that never waits for the kernel before, or accesses global memory through
//     this layer before it does
// emu::options().seed permutes the order of blocks and threads.
//
// Limits: a block may not wait for another block (no grid barrier, no clusters). There is one stream. Matrix products
// are summed in float32 in ascending k, an order that the hardware does not guarantee; with emu::options().truncate
// they are summed as aligned addends that are truncated to 24 bits. Times are meaningless.
//
// Hopper's bulk copies, memory barriers and warpgroup products: hopper.cuh. The main loop on them: tile_products.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "common/types.h"

#if !defined(SCAN_FAST_EMULATE)
#include "common/launch_trace.h"
#endif

#if defined(SCAN_FAST_EMULATE)
#include "testing/emulator.h"
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#error "device.h is for kernels: compile with nvcc, or for the host with -DSCAN_FAST_EMULATE"
#endif

namespace scan_fast {

constexpr unsigned kFullMask = 0xffffffffu;

#if !defined(SCAN_FAST_EMULATE)

// ---- the GPU form ------------------------------------------------------------------------------------------------

using half_t = __half;
using bf16_t = __nv_bfloat16;

template <typename T>
struct Shared {
  T* pointer;
  __device__ __forceinline__ T& operator[](int64_t i) const { return pointer[i]; }
  __device__ __forceinline__ T& operator[](int i) const { return pointer[i]; }
  __device__ __forceinline__ T& operator[](unsigned i) const { return pointer[i]; }
  __device__ __forceinline__ Shared operator+(int64_t i) const { return {pointer + i}; }
  template <typename U>
  __device__ __forceinline__ Shared<U> as() const {
    return {reinterpret_cast<U*>(pointer)};
  }
  __device__ __forceinline__ T* get() const { return pointer; }
};

#define SCAN_FAST_SHARED(T, name, count)            \
  __shared__ __align__(16) T name##_storage[count]; \
  const ::scan_fast::Shared<T> name { name##_storage }
#define SCAN_FAST_DYNAMIC_SHARED(name)                                               \
  extern __shared__ __align__(128) unsigned char scan_fast_dynamic_shared_storage[]; \
  const ::scan_fast::Shared<unsigned char> name { scan_fast_dynamic_shared_storage }

template <typename V, typename T>
__device__ __forceinline__ V ld_shared(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <typename T, typename V>
__device__ __forceinline__ void st_shared(T* p, const V& value) {
  *reinterpret_cast<V*>(p) = value;
}
template <typename V, typename T>
__device__ __forceinline__ V ld_global(const T* p) {
  return __ldg(reinterpret_cast<const V*>(p));
}
template <typename V, typename T>
__device__ __forceinline__ V ld_coherent(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <typename T, typename V>
__device__ __forceinline__ void st_global(T* p, const V& value) {
  *reinterpret_cast<V*>(p) = value;
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void cp_async_16(void* dst, const void* src, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2 && __is_same(T, half_t)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(__is_same(T, bf16_t), "mma_16816 takes half_t or bf16_t");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float max_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16_t x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (__is_same(T, half_t)) {
    return __float2half_rn(x);
  } else if constexpr (__is_same(T, bf16_t)) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}
template <typename T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  if constexpr (__is_same(T, half_t)) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}
template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t bits) {
  if constexpr (__is_same(T, half_t)) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  }
}

inline void throw_on_error(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clears the error, which the next launch, perhaps PyTorch's, would report again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  throw_on_error(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline void set_dynamic_shared(const void* kernel, size_t bytes) {
  throw_on_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                 "a kernel's shared memory");
}

template <typename... Parameters, typename... Arguments>
void start_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, StreamHandle stream,
                  Arguments&&... arguments) {
  if (traces_launches().load(std::memory_order_relaxed)) note_launch(reinterpret_cast<const void*>(kernel));
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  throw_on_error(cudaGetLastError(), "a kernel launch");
}

template <typename... Parameters, typename... Arguments>
void start_kernel_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, StreamHandle stream,
                        Arguments&&... arguments) {
  if (traces_launches().load(std::memory_order_relaxed)) note_launch(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  throw_on_error(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "a kernel launch");
}

// Returns whether the kernel's code for the current device contains the wait. It does not if it was compiled from PTX
// for an older virtual architecture. Drivers before 12.3 cannot capture such a launch into a graph. The answers are
// kept.
inline bool can_wait(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> known;
  const std::pair key{current_device(), kernel};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  throw_on_error(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  int driver = 0;
  throw_on_error(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return known[key] = driver >= 12030 && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
}

// The answers are kept.
inline int query_resident_blocks(const void* kernel, int threads, size_t smem) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  const std::tuple key{current_device(), kernel, threads, smem};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int blocks = 0;
  throw_on_error(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, smem),
                 "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return known[key] = blocks;
}

inline void zero_async(void* pointer, size_t bytes, StreamHandle stream) {
  throw_on_error(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

// Returns the number of multiprocessors of the current device.
inline int multiprocessors() {
  int count = 0;
  throw_on_error(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
                 "cudaDeviceGetAttribute");
  return count;
}

// Returns the compute capability of the current device: 90 for 9.0.
inline int compute_capability() {
  const int device = current_device();
  int major = 0, minor = 0;
  throw_on_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  throw_on_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

// Returns the bytes of shared memory, static and dynamic, that a block may have on the current device.
inline size_t shared_memory_limit() {
  int bytes = 0;
  throw_on_error(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()),
                 "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

#endif

// ---- both forms --------------------------------------------------------------------------------------------------

// Allows a kernel `bytes` of dynamic shared memory on the current device. Without this a block has 48 KB, static arrays
// included. Only the compiler knows the size of the static arrays, so every kernel with a dynamic part calls this. The
// allowance never shrinks, because other threads may launch the kernel at the same time.
inline void allow_dynamic_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{current_device(), kernel}];
  if (bytes <= most) return;
  set_dynamic_shared(kernel, bytes);
  most = bytes;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, StreamHandle stream,
            Arguments&&... arguments) {
  if (smem > 0) allow_dynamic_shared(reinterpret_cast<const void*>(kernel), smem);
  start_kernel(kernel, grid, block, smem, stream, arguments...);
}

// Returns how many blocks of a kernel a multiprocessor of the current device holds at a time, at least 1. The runtime
// computes it from the registers and the shared memory of the build.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t smem) {
  const void* address = reinterpret_cast<const void*>(kernel);
  if (smem > 0) allow_dynamic_shared(address, smem);
  const int blocks = query_resident_blocks(address, threads, smem);
  return blocks > 1 ? blocks : 1;
}

// Like launch(), for a kernel that follows another one of the same host function directly on the same stream.
// Its blocks may start before the kernel before has ended (programmatic dependent launch, compute capability 9.0), so
// that the latency of the launch is hidden. Each thread must call wait_for_previous_kernel() before it accesses global
// memory; then everything before in the stream has ended and is visible. It returns at once on older GPUs.
//   - The kernel before calls let_next_kernel_start(), at its beginning. Without the call, the overlap begins when its
//     last blocks end.
//   - The first kernel of a chain is started by launch(), because only the kernels of one host function are known to
//     wait: the end of a kernel that did not wait says nothing about the kernels before it.
//   - Memory that the kernel before writes is read by plain loads or ld_coherent. Through ld_global, __ldg and
//     const __restrict__ parameters the compiler may load before the wait.
template <typename... Parameters, typename... Arguments>
void launch_after(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, StreamHandle stream,
                  Arguments&&... arguments) {
  if (smem > 0) allow_dynamic_shared(reinterpret_cast<const void*>(kernel), smem);
  if (can_wait(reinterpret_cast<const void*>(kernel))) {
    start_kernel_early(kernel, grid, block, smem, stream, arguments...);
  } else {
    start_kernel(kernel, grid, block, smem, stream, arguments...);
  }
}

// Returns 2^x for x < 127.5: like exp2_approx, but on the units for additions and products. A multiprocessor has 128 of
// these and 16 units for exp2_approx, so a kernel that is limited by exponentials computes a part of them here.
//   - The relative error is at most 1.5 * 2^-23 if the result is a normal number; that of exp2_approx is 2 * 2^-23.
//   - Integers give exact powers. Below 2^-126 the error is at most 2^-126; from -126.5 downwards the result is 0.
//   - NaN gives NaN, and minus infinity gives 0. Arguments from 127.5 on are not allowed.
// x = j + r with an integer j and |r| <= 1/2. Adding 1.5 * 2^23 rounds to an integer, and 127 more leaves the exponent
// field of 2^j in the low bits of the sum. The polynomial approximates 2^r; its first coefficient is 1. The result is a
// product, so that NaN remains NaN; if sums follow, the compiler fuses it with them. Without it there are ten
// instructions: a maximum, three sums, five FFMA and a shift.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRounding = 12582912.0f + 127.0f;
  const float above = max_nan(x, -127.0f);
  const float rounded = above + kRounding;
  const float r = above - (rounded - kRounding);
  float of_r = fmaf(0.00132647273f, r, 0.00967151299f);
  of_r = fmaf(of_r, r, 0.0555073358f);
  of_r = fmaf(of_r, r, 0.240222424f);
  of_r = fmaf(of_r, r, 0.693147004f);
  of_r = fmaf(of_r, r, 1.0f);
  return of_r * __uint_as_float(__float_as_uint(rounded) << 23);
}

template <typename V, typename T>
__device__ __forceinline__ V ld_shared(const Shared<T>& p) {
  return ld_shared<V>(p.get());
}
template <typename T, typename V>
__device__ __forceinline__ void st_shared(const Shared<T>& p, const V& value) {
  st_shared(p.get(), value);
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullMask, value, offset);
    value = value < other ? other : value;
  }
  return value;
}
template <typename T>
__device__ __forceinline__ T warp_min(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullMask, value, offset);
    value = other < value ? other : value;
  }
  return value;
}

// Calls body.template operator()<T>() with the element type of dtype.
template <typename Body>
void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: body.template operator()<float>(); return;
    case DType::kBFloat16: body.template operator()<bf16_t>(); return;
    case DType::kFloat16: body.template operator()<half_t>(); return;
  }
  throw std::runtime_error("unknown element type " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace scan_fast
