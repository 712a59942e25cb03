// The sm_90a part of the device layer: thin wrappers of Hopper's copy engine, memory barriers and matrix units. They
// also have a host form (testing/hopper_emulator.h). A source that includes this header is compiled for sm_90a only.
//
// Operands. A matrix of 16-bit values is stored as tiles of 128 rows, a tile as panels of 64 dimensions, a panel as 128
// rows of 128 bytes (16 KB) whose 16-byte vectors are permuted within each row: vector ^ (row % 8). This 128-byte
// swizzle lets the matrix units read without bank conflicts. Panels have it in global memory already, because our
// preparation kernels write it (panel_at). So one thread copies a whole panel, or several consecutive ones, with one
// plain bulk copy. Tensor maps would let the copy engine swizzle a row-major operand. They are not used for three
// reasons: the operand must be rewritten in any case (float32 to scaled 16-bit), creating a map needs the driver's API
// in each call, and padding rows are simply zeros here.
//
//   panel_at(row, dim, panels)             index of an element of such a matrix; 128-row tiles of `panels` panels
//   panels_of(dim), row_tiles(rows), packed_size(rows, panels)
//   k_major(p)                             descriptor of rows x 16 dimensions at a panel's row and dimension, of A or B
//   mn_major(p, panel_bytes)               descriptor of B = (16 rows as k) x (N dimensions) of the same panels
//   wgmma<T, N>(d, a, b, accumulate)       d (64 x N, float[N / 2] a thread) (+)= A B^T; A and B descriptors
//   wgmma<T, N, kMnMajor>(d, a[4], b, accumulate)   A from registers, in the fragment layout of mma_16816
//   wgmma_fence(x...)                      before the first wgmma after any other use of its registers x
//   wgmma_commit(), wgmma_wait<N>(x...)    after the wait, the results x of all but the last N groups may be used; the
//                                          operands of a group (registers, shared memory) must not change before
//   mbarrier_init, mbarrier_init_fence, mbarrier_arrive, mbarrier_expect (arrive and expect bytes), mbarrier_wait
//   bulk_copy(dst, src, bytes, barrier)    global -> shared, multiples of 16 bytes; lands at the barrier
//   named_barrier_sync(id, threads), named_barrier_arrive(id, threads)    ids 1..15; 0 is __syncthreads
//   elect_one()                            true in one thread of a whole warp; warp_in_block(), warpgroup_index()
//   give_registers<N>(), take_registers<N>()    setmaxnreg; whole warpgroups, kernel bound by __launch_bounds__(t, 1)
//   async_proxy_fence()                    between ordinary stores to shared memory and wgmma or copies that read them
//
// Accumulators: element r of thread t of a warpgroup is row 16 (t / 32) + lane / 4 + 8 (r / 2 % 2), column
// 8 (r / 4) + 2 (lane % 4) + r % 2: accumulator_row and accumulator_column.
#pragma once

#include "common/device.h"
#include "common/panels.h"

#if defined(SCAN_FAST_EMULATE)
#include "testing/hopper_emulator.h"
#endif

namespace scan_fast {

using MBarrier = uint64_t;

#if !defined(SCAN_FAST_EMULATE)

// ---- barriers and copies --------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(MBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Called by the initialising thread, before the __syncthreads after which other threads use the barriers.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(MBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(MBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Returns once the phase of the given parity is complete; a new barrier is in phase 0, and passes for parity 1.
//
// With SCAN_FAST_WAIT_LIMIT a wait of two seconds traps: an error in a protocol ends as a launch failure instead of a
// hang. The process can then launch nothing more. The clock is read only after a first attempt has failed. There is no
// message, because a printf makes the compiler serialise all products (C7510) and spill. This is the only loop in our
// GPU code that waits for another thread. Waits inside the hardware cannot time out: named barriers, __syncthreads,
// setmaxnreg, wgmma's wait. But a thread that does not arrive there usually waits at a memory barrier, and traps.
__device__ __forceinline__ void mbarrier_wait(MBarrier* barrier, unsigned parity) {
#if defined(SCAN_FAST_WAIT_LIMIT)
  asm volatile(
      "{\n"
      ".reg .pred complete, late;\n"
      ".reg .u64 begin, now;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "mov.u64 begin, %%globaltimer;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "mov.u64 now, %%globaltimer;\n"
      "sub.u64 now, now, begin;\n"
      "setp.gt.u64 late, now, 2000000000;\n"  // nanoseconds
      "@!late bra again;\n"
      "trap;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
__device__ __forceinline__ void bulk_copy(void* dst, const void* src, int bytes, MBarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(dst)),
               "l"(src), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected)::"memory");
  return elected != 0;
}

// ---- matrix units ---------------------------------------------------------------------------------------------------

// Tells the compiler that x may have changed, so that it does not move uses of x across.
__device__ __forceinline__ void pin_register(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin_register(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename X, int kCount>
__device__ __forceinline__ void pin_register(X (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin_register(x[i]);
}

template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin_register(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, typename... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin_register(registers), ...);
}

#define SCAN_FAST_D8(d, i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SCAN_FAST_D32(d, i) SCAN_FAST_D8(d, i), SCAN_FAST_D8(d, i + 8), SCAN_FAST_D8(d, i + 16), SCAN_FAST_D8(d, i + 24)
#define SCAN_FAST_R32                                                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define SCAN_FAST_R64                                                                                                 \
  SCAN_FAST_R32                                                                                                       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define SCAN_FAST_R128                                                                                                \
  SCAN_FAST_R64                                                                                                       \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,"  \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// The operands follow the accumulators: A and B descriptors and the predicate's source; or four A registers, B's
// descriptor, the predicate's source, and whether B is MN-major.
#define SCAN_FAST_WGMMA_SS(type, n, registers, outputs, a_at, b_at, p_at)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p_at                                                            \
               ", 0;\n"                                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " a_at ", " b_at \
               ", p, 1, 1, 0, 0;\n}\n"                                                                             \
               : outputs                                                                                           \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define SCAN_FAST_WGMMA_RS(type, n, registers, outputs, a_at, b_at, p_at, t_at)                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p_at                                                            \
               ", 0;\n"                                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " a_at ", " b_at \
               ", p, 1, 1, " t_at ";\n}\n"                                                                         \
               : outputs                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),            \
                 "n"(kMnMajor ? 1 : 0))
#define SCAN_FAST_D64(d) SCAN_FAST_D32(d, 0), SCAN_FAST_D32(d, 32)
#define SCAN_FAST_D128(d) SCAN_FAST_D64(d), SCAN_FAST_D32(d, 64), SCAN_FAST_D32(d, 96)

template <typename T, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(__is_same(T, half_t) || __is_same(T, bf16_t), "wgmma takes half_t or bf16_t");
  static_assert(kN == 64 || kN == 128 || kN == 256, "wgmma is written for N of 64, 128 and 256");
  if constexpr (__is_same(T, half_t)) {
    if constexpr (kN == 64) SCAN_FAST_WGMMA_SS("f16", 64, SCAN_FAST_R32, SCAN_FAST_D32(d, 0), "%32", "%33", "%34");
    if constexpr (kN == 128) SCAN_FAST_WGMMA_SS("f16", 128, SCAN_FAST_R64, SCAN_FAST_D64(d), "%64", "%65", "%66");
    if constexpr (kN == 256) SCAN_FAST_WGMMA_SS("f16", 256, SCAN_FAST_R128, SCAN_FAST_D128(d), "%128", "%129", "%130");
  } else {
    if constexpr (kN == 64) SCAN_FAST_WGMMA_SS("bf16", 64, SCAN_FAST_R32, SCAN_FAST_D32(d, 0), "%32", "%33", "%34");
    if constexpr (kN == 128) SCAN_FAST_WGMMA_SS("bf16", 128, SCAN_FAST_R64, SCAN_FAST_D64(d), "%64", "%65", "%66");
    if constexpr (kN == 256) SCAN_FAST_WGMMA_SS("bf16", 256, SCAN_FAST_R128, SCAN_FAST_D128(d), "%128", "%129", "%130");
  }
}

template <typename T, int kN, bool kMnMajor>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(__is_same(T, half_t) || __is_same(T, bf16_t), "wgmma takes half_t or bf16_t");
  static_assert(kN == 64 || kN == 128 || kN == 256, "wgmma is written for N of 64, 128 and 256");
#define SCAN_FAST_A_REGISTERS(w, x, y, z) "{%" #w ",%" #x ",%" #y ",%" #z "}"
  if constexpr (__is_same(T, half_t)) {
    if constexpr (kN == 64) {
      SCAN_FAST_WGMMA_RS("f16", 64, SCAN_FAST_R32, SCAN_FAST_D32(d, 0), SCAN_FAST_A_REGISTERS(32, 33, 34, 35), "%36",
                         "%37", "%38");
    }
    if constexpr (kN == 128) {
      SCAN_FAST_WGMMA_RS("f16", 128, SCAN_FAST_R64, SCAN_FAST_D64(d), SCAN_FAST_A_REGISTERS(64, 65, 66, 67), "%68",
                         "%69", "%70");
    }
    if constexpr (kN == 256) {
      SCAN_FAST_WGMMA_RS("f16", 256, SCAN_FAST_R128, SCAN_FAST_D128(d), SCAN_FAST_A_REGISTERS(128, 129, 130, 131),
                         "%132", "%133", "%134");
    }
  } else {
    if constexpr (kN == 64) {
      SCAN_FAST_WGMMA_RS("bf16", 64, SCAN_FAST_R32, SCAN_FAST_D32(d, 0), SCAN_FAST_A_REGISTERS(32, 33, 34, 35), "%36",
                         "%37", "%38");
    }
    if constexpr (kN == 128) {
      SCAN_FAST_WGMMA_RS("bf16", 128, SCAN_FAST_R64, SCAN_FAST_D64(d), SCAN_FAST_A_REGISTERS(64, 65, 66, 67), "%68",
                         "%69", "%70");
    }
    if constexpr (kN == 256) {
      SCAN_FAST_WGMMA_RS("bf16", 256, SCAN_FAST_R128, SCAN_FAST_D128(d), SCAN_FAST_A_REGISTERS(128, 129, 130, 131),
                         "%132", "%133", "%134");
    }
  }
}

#undef SCAN_FAST_D8
#undef SCAN_FAST_D32
#undef SCAN_FAST_D64
#undef SCAN_FAST_D128
#undef SCAN_FAST_R32
#undef SCAN_FAST_R64
#undef SCAN_FAST_R128
#undef SCAN_FAST_WGMMA_SS
#undef SCAN_FAST_WGMMA_RS
#undef SCAN_FAST_A_REGISTERS

#endif

// ---- both forms -----------------------------------------------------------------------------------------------------

// Called by whole warps. The compiler does not see that threadIdx.x / 128 is the same number in a whole warp. It then
// forms descriptors per thread, moves them into the uniform registers that the matrix units read, and puts a loop
// around every copy. It does see it for the result of a shuffle from one lane and for an elected thread: NT-Xent's
// forward kernel had 66 such moves, and has 10.
__device__ __forceinline__ int warp_in_block() { return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 32, 0); }
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 128, 0);
}

// PTX ISA, "Matrix descriptor": address, leading and stride offsets in units of 16 bytes, layout 1 (128-byte swizzle).
__device__ __forceinline__ uint64_t operand_descriptor(const void* p, uint32_t leading, uint32_t stride) {
  return uint64_t{1} << 62 | static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
         (shared_address(p) & 0x3ffff) >> 4;
}

// Returns the descriptor of rows of a panel (M of A or N of B) and 16 dimensions as k. `p` is the start of the panel
// plus a multiple of 8 rows (1024 bytes); the rows of the tile are consecutive. advance(descriptor, 32 * i) gives the
// descriptor of the i-th 16 dimensions; that of another panel differs by the distance of the panels in bytes.
__device__ __forceinline__ uint64_t k_major(const void* p) { return operand_descriptor(p, 16, 1024); }

// Returns the descriptor of the same memory, read transposed: dimensions as N, in panels of 64 dimensions that are
// `panel_bytes` apart, and 16 rows as k. advance(descriptor, 2048 * i) gives that of the i-th 16 rows.
__device__ __forceinline__ uint64_t mn_major(const void* p, int panel_bytes) {
  return operand_descriptor(p, static_cast<uint32_t>(panel_bytes), 1024);
}

// Adds bytes to the address of a descriptor. It stays within its 14 bits, because shared memory ends at 227 KB.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Position of accumulator r of wgmma: row within the warpgroup's 64 rows, and column.
__device__ __forceinline__ int accumulator_row(int r) {
  return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + r / 2 % 2 * 8;
}
__device__ __forceinline__ int accumulator_column(int r) {
  return r / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + r % 2;
}

// Aligns dynamic shared memory to 1024 bytes for panels; it begins at a multiple of 128. Request 1024 bytes more.
__device__ __forceinline__ Shared<unsigned char> aligned_to_panels(const Shared<unsigned char>& dynamic) {
  return dynamic + static_cast<int64_t>((1024 - shared_address(dynamic.get()) % 1024) % 1024);
}

}  // namespace scan_fast
