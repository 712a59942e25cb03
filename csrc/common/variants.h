// Families whose operators have a second set of GPU kernels, for sm_90a, beside the portable ones.
#pragma once

#include <atomic>

namespace scan_fast {

enum class Family { kNTXent, kNeighbors };

// Whether a family's operators take the kernels for sm_90a where the device and the problem allow it. Python says so when
// it loads the module: scan_fast/ops/native.py.
inline std::atomic<bool>& prefers_sm90(Family family) {
  static std::atomic<bool> preferred[2];
  return preferred[static_cast<int>(family)];
}

}  // namespace scan_fast
