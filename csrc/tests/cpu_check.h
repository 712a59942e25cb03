// The tests of the CPU kernels run once per instruction set: SCAN_FAST_CPU_ISA chooses it.
#pragma once

#include <cstdlib>

#include "check.h"
#include "common/cpu_features.h"

namespace check {

constexpr int kSkipped = 77;

// Returns whether SCAN_FAST_CPU_ISA names a set that this processor or this build does not have.
inline bool isa_is_missing() {
  const char* wanted = std::getenv("SCAN_FAST_CPU_ISA");
  const char* found = scan_fast::cpu_isa_name(scan_fast::cpu_isa());
  const bool missing = wanted != nullptr && std::strcmp(wanted, found) != 0;
  std::printf("instruction set %s%s\n", found, missing ? ", skipped" : "");
  return missing;
}

}  // namespace check

#define SKIP_WITHOUT_ISA() \
  if (check::isa_is_missing()) return check::kSkipped
