#include "common/launch_trace.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include <cxxabi.h>

#ifdef SCAN_FAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace scan_fast {
namespace {

std::mutex mutex;
std::vector<const void*> kernels;

// The CUDA runtime knows the mangled name of a kernel.
std::string name_of(const void* kernel) {
#ifdef SCAN_FAST_WITH_CUDA
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || mangled == nullptr) return "unknown kernel";
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  const std::string name = status == 0 ? text : mangled;
  std::free(text);
  return name;
#else
  (void)kernel;
  return "unknown kernel";
#endif
}

}  // namespace

void note_launch(const void* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::find(kernels.begin(), kernels.end(), kernel) == kernels.end()) kernels.push_back(kernel);
}

void trace_launches(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (on) kernels.clear();
  traces_launches() = on;
}

std::vector<std::string> launched() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<std::string> names;
  names.reserve(kernels.size());
  for (const void* kernel : kernels) names.push_back(name_of(kernel));
  return names;
}

}  // namespace scan_fast
