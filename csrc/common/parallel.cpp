#include "common/parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace scan_fast {

#if defined(_OPENMP)

// torch.set_num_threads() calls omp_set_num_threads(), and the soname of its OpenMP library is the compiler's own,
// so both share one pool of threads.
int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

void parallel_for(int64_t tasks, const std::function<void(int64_t, int)>& body) {
  const int64_t threads = max_threads() < tasks ? max_threads() : tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) body(task, thread);
  }
}

#else

int max_threads() { return 1; }

void parallel_for(int64_t tasks, const std::function<void(int64_t, int)>& body) {
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

#endif

}  // namespace scan_fast
