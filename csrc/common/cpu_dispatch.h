// Declares functions that ISA_SOURCES (CMakeLists.txt) compile once per instruction set, and picks one at run time.
//
// A file in ISA_SOURCES wraps its code in `namespace scan_fast::SCAN_FAST_ISA`. It must not include templates or inline
// functions of other headers that could be emitted there: the linker may keep the copy with the highest instruction set.
#pragma once

#include "common/cpu_features.h"

#if defined(__x86_64__)

#define SCAN_FAST_DECLARE_PER_ISA(declaration) \
  namespace scan_fast::baseline {              \
  declaration;                                 \
  }                                            \
  namespace scan_fast::avx2 {                  \
  declaration;                                 \
  }                                            \
  namespace scan_fast::avx512 {                \
  declaration;                                 \
  }

#define SCAN_FAST_BEST_ISA(function)                                                   \
  (::scan_fast::cpu_isa() == ::scan_fast::CpuIsa::kAvx512 ? ::scan_fast::avx512::function \
   : ::scan_fast::cpu_isa() == ::scan_fast::CpuIsa::kAvx2 ? ::scan_fast::avx2::function   \
                                                          : ::scan_fast::baseline::function)

#else

#define SCAN_FAST_DECLARE_PER_ISA(declaration) \
  namespace scan_fast::baseline {              \
  declaration;                                 \
  }

#define SCAN_FAST_BEST_ISA(function) (::scan_fast::baseline::function)

#endif
