// Which CUDA kernels were launched: for tests and the GPU suite, which must know what they measured. Off until asked
// for; launch() in device.h then pays one relaxed load.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace scan_fast {

inline std::atomic<bool>& traces_launches() {
  static std::atomic<bool> on{false};
  return on;
}

// Notes a kernel, given by the address that a launch takes. Each is kept once, in the order of its first launch.
void note_launch(const void* kernel);

// Turns the trace on or off; turning it on forgets what was noted before.
void trace_launches(bool on);

// The C++ names of the kernels noted, e.g. "void scan_fast::(anonymous namespace)::prepare_kernel<float>(...)".
std::vector<std::string> launched();

}  // namespace scan_fast
