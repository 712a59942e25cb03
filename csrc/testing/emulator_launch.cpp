// Requirements of a GPU on a launch: grid, block, shared memory.
//
// A static array becomes known when a thread first uses it, so shared memory is checked at the launch and again at each
// new array.
#include <map>
#include <string>
#include <utility>

#include "testing/emulator_machine.h"

namespace scan_fast::emu {
namespace {

constexpr size_t kUnrequested = 48 * 1024;  // bytes that a block has on every GPU without a request
constexpr size_t kDynamicAlignment = 128;

// Dynamic shared memory by device and kernel. Like CUDA's attribute it lives as long as the process.
std::map<std::pair<int, const void*>, size_t>& allowed() {
  static std::map<std::pair<int, const void*>, size_t> value;
  return value;
}

std::string bytes_of(size_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": shared memory per thread block.
size_t shared_memory_limit() {
  if (options().shared_memory != 0) return options().shared_memory;
  switch (options().compute_capability) {
    case 75: return 64 * 1024;
    case 80:
    case 87: return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121: return 99 * 1024;
    case 90:
    case 100:
    case 103:
    case 110: return 227 * 1024;
    default: fail("no shared memory is known of compute capability " + std::to_string(options().compute_capability));
  }
}

void set_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > shared_memory_limit()) {
    fail(bytes_of(bytes) + " of dynamic shared memory are requested, and a block has " +
         bytes_of(shared_memory_limit()));
  }
  allowed()[{options().device, kernel}] = bytes;
}

void check_grid(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024) fail("a block has 1 to 1024 threads, not " + std::to_string(threads));
  if (blocks == 0) fail("a grid must have at least one block");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("a grid dimension is too large");
}

void check_shared_memory() {
  const size_t dynamic = machine.dynamic->bytes;
  size_t fixed = machine.static_bytes;
  if (fixed > kUnrequested) fail("static shared memory of " + bytes_of(fixed) + ": the compiler takes 48 KB");
  // The dynamic part begins at a multiple of its alignment.
  if (dynamic > 0) fixed = (fixed + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment;
  const std::string both = bytes_of(fixed) + " of static and " + bytes_of(dynamic) + " of dynamic shared memory";
  if (fixed + dynamic > shared_memory_limit()) {
    fail(both + " are more than the " + bytes_of(shared_memory_limit()) + " of a block");
  }
  const auto found = allowed().find({options().device, machine.kernel});
  if (found == allowed().end()) {
    if (fixed + dynamic > kUnrequested) fail(both + " are more than the 48 KB that a kernel has without a request");
  } else if (dynamic > found->second) {
    fail(both + ", and the kernel requested " + bytes_of(found->second) + " of dynamic");
  }
}

}  // namespace scan_fast::emu
