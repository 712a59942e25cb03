// Threads for the CPU kernels, from the pool of the OpenMP runtime that torch uses.
#pragma once

#include <cstdint>
#include <functional>

namespace scan_fast {

// Returns the number of threads that parallel_for may use now: torch.get_num_threads(), or 1 inside a parallel region.
int max_threads();

// Calls body(task, thread) for every task in [0, tasks), where thread < max_threads(). Threads take one task after the
// other, in no fixed order: a kernel that must be deterministic gives each task its own output.
void parallel_for(int64_t tasks, const std::function<void(int64_t task, int thread)>& body);

}  // namespace scan_fast
