// Which instruction sets this processor has, decided once at run time.
#pragma once

#include <string>

namespace scan_fast {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

// The best instruction set that both this build and this processor have. The environment variable
// SCAN_FAST_CPU_ISA=baseline|avx2|avx512 lowers it (never raises it), for tests and for bisecting.
CpuIsa cpu_isa();

// The names of the above, for `scan-fast info`.
const char* cpu_isa_name(CpuIsa isa);

// True where 16-bit matrix products run on AMX tiles.
bool cpu_has_amx_bf16();

}  // namespace scan_fast
