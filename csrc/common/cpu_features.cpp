#include "common/cpu_features.h"

#include <cstdlib>
#include <cstring>

namespace scan_fast {
namespace {

CpuIsa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kBaseline;
}

CpuIsa lowered_by_environment(CpuIsa best) {
  const char* wanted = std::getenv("SCAN_FAST_CPU_ISA");
  if (wanted == nullptr) return best;
  CpuIsa limit = best;
  if (std::strcmp(wanted, "baseline") == 0) limit = CpuIsa::kBaseline;
  if (std::strcmp(wanted, "avx2") == 0) limit = CpuIsa::kAvx2;
  return limit < best ? limit : best;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = lowered_by_environment(detect());
  return isa;
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512: return "avx512";
    case CpuIsa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

bool cpu_has_amx_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // CPUID leaf 7, EDX bits 22 (AMX-BF16) and 24 (AMX-TILE); __builtin_cpu_supports of GCC 12 does not know "amx-bf16".
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return cpu_isa() == CpuIsa::kAvx512 && (edx & (1u << 22)) && (edx & (1u << 24));
#else
  return false;
#endif
}

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
  static const bool has = [] {
    // CPUID leaf 7, subleaf 1, EAX bit 5; subleaf 0 gives the number of subleaves.
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    if (eax == 0) return false;
    eax = 7, ecx = 1;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return cpu_isa() == CpuIsa::kAvx512 && (eax & (1u << 5)) != 0;
  }();
  return has;
#else
  return false;
#endif
}

bool cpu_has_avx512_vnni() {
#if defined(__x86_64__)
  static const bool has = [] {
    __builtin_cpu_init();
    const char* wanted = std::getenv("SCAN_FAST_CPU_VNNI");
    return cpu_isa() == CpuIsa::kAvx512 && __builtin_cpu_supports("avx512vnni") &&
           (wanted == nullptr || std::strcmp(wanted, "0") != 0);
  }();
  return has;
#else
  return false;
#endif
}

bool cpu_multiplies_bf16_vectors() {
  static const bool yes = [] {
    const char* wanted = std::getenv("SCAN_FAST_CPU_BF16");
    return wanted == nullptr ? cpu_has_avx512_bf16() : std::strcmp(wanted, "1") == 0;
  }();
  return yes;
}

bool cpu_is_from_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace scan_fast
