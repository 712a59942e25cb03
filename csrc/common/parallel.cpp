#include "common/parallel.h"

#if defined(SCAN_FAST_WITH_LIBGOMP)

#include <atomic>

// Entry points of libgomp, GCC's OpenMP runtime, which PyTorch's binaries for Linux use. They are called directly,
// because Clang compiles `#pragma omp` for another runtime: a process would have two pools of threads, and
// torch.set_num_threads() would set the size of one.
extern "C" {
void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_max_threads();
int omp_get_thread_num();
int omp_in_parallel();
}

namespace scan_fast {
namespace {

struct Work {
  const std::function<void(int64_t, int)>& body;
  int64_t tasks;
  std::atomic<int64_t> next{0};
};

void take_tasks(void* data) {
  Work& work = *static_cast<Work*>(data);
  const int thread = omp_get_thread_num();
  for (;;) {
    const int64_t task = work.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= work.tasks) return;
    work.body(task, thread);
  }
}

}  // namespace

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

void parallel_for(int64_t tasks, const std::function<void(int64_t, int)>& body) {
  const int64_t threads = max_threads() < tasks ? max_threads() : tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  Work work{body, tasks};
  GOMP_parallel(&take_tasks, &work, static_cast<unsigned>(threads), 0);
}

}  // namespace scan_fast

#else

namespace scan_fast {

int max_threads() { return 1; }

void parallel_for(int64_t tasks, const std::function<void(int64_t, int)>& body) {
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace scan_fast

#endif
