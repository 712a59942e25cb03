// Trace of kernel launches, for tests and the GPU suite: they must know which kernels they measured. While it is off,
// launch() in device.h pays one relaxed load.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace scan_fast {

inline std::atomic<bool>& traces_launches() {
  static std::atomic<bool> on{false};
  return on;
}

// Records a kernel, given by its host address. Each kernel is kept once, in the order of first launches.
void note_launch(const void* kernel);

// Turns the trace on or off. Turning it on clears it.
void trace_launches(bool on);

// Returns the C++ names of the recorded kernels, e.g. "void scan_fast::(anonymous
// namespace)::prepare_kernel<float>(...)".
std::vector<std::string> launched();

}  // namespace scan_fast
