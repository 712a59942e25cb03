// Threads over tasks for the CPU kernels, on the OpenMP runtime that torch itself uses.
#pragma once

#include <cstdint>
#include <functional>

namespace scan_fast {

// The number of threads that parallel_for may use now: torch.get_num_threads(), or 1 inside a parallel region.
int max_threads();

// Calls body(task, thread) for every task in [0, tasks), handing tasks out one by one; thread < max_threads().
// The order in which tasks run is not fixed: a kernel that must be deterministic gives each task its own output.
void parallel_for(int64_t tasks, const std::function<void(int64_t task, int thread)>& body);

}  // namespace scan_fast
