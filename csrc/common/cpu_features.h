// Instruction sets of this processor, detected once at run time.
#pragma once

namespace scan_fast {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

// Returns the best instruction set that both this build and this processor have. The environment variable
// SCAN_FAST_CPU_ISA=baseline|avx2|avx512 can lower it, for tests and for bisecting.
CpuIsa cpu_isa();

// Returns the name of an instruction set, for `scan-fast info`.
const char* cpu_isa_name(CpuIsa isa);

// Returns whether the processor has AMX with bfloat16; amx_is_usable() in amx.h also asks the system.
bool cpu_has_amx_bf16();

bool cpu_is_from_intel();

// Returns whether kernels should multiply bfloat16 pairs in vectors: on a processor with AVX-512-BF16. For tests,
// SCAN_FAST_CPU_BF16=0 says no, and SCAN_FAST_CPU_BF16=1 says yes on any processor, on which float32 instructions then
// compute the same sums.
bool cpu_multiplies_bf16_vectors();
bool cpu_has_avx512_bf16();

// Returns whether the CPU has AVX-512-VNNI, whose instruction multiplies pairs of 16-bit integers and adds both products to
// the sums. SCAN_FAST_CPU_VNNI=0 says no.
bool cpu_has_avx512_vnni();

}  // namespace scan_fast
