// Declares functions that are compiled once per instruction set, and chooses one at run time.
//
// Sources with the role `isa` (scan_fast/ops/families.json) wrap their code in `namespace scan_fast::SCAN_FAST_ISA`.
// They must not use templates or inline functions of other headers that the compiler may emit as symbols: the linker
// could keep the copy with the highest instruction set.
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

#define SCAN_FAST_BEST_ISA(function)                                                      \
  (::scan_fast::cpu_isa() == ::scan_fast::CpuIsa::kAvx512 ? ::scan_fast::avx512::function \
   : ::scan_fast::cpu_isa() == ::scan_fast::CpuIsa::kAvx2 ? ::scan_fast::avx2::function   \
                                                          : ::scan_fast::baseline::function)

// Around includes and functions that need an extension beyond the flags of their source, such as "avx512bf16".
#define SCAN_FAST_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SCAN_FAST_BEGIN_EXTENSION(name) \
  SCAN_FAST_PRAGMA(clang attribute push(__attribute__((target(name))), apply_to = function))
#define SCAN_FAST_END_EXTENSION SCAN_FAST_PRAGMA(clang attribute pop)
#else
#define SCAN_FAST_BEGIN_EXTENSION(name) SCAN_FAST_PRAGMA(GCC target(name))
#define SCAN_FAST_END_EXTENSION
#endif

#else

#define SCAN_FAST_DECLARE_PER_ISA(declaration) \
  namespace scan_fast::baseline {              \
  declaration;                                 \
  }

#define SCAN_FAST_BEST_ISA(function) (::scan_fast::baseline::function)

#endif
