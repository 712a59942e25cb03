// Threads of the CPU kernels: every task runs once, and an exception reaches the caller. The layer is that of the module
// (libgomp), under ThreadSanitizer that of the other tests.
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "common/parallel.h"
#include "common/scratch.h"

extern "C" void omp_set_num_threads(int) __attribute__((weak));  // null without libgomp

namespace {

using scan_fast::max_threads;
using scan_fast::parallel_for;

void every_task_runs_once() {
  const int threads = max_threads();
  for (const int64_t tasks : {0, 1, 2, 3, 100, 5000}) {
    std::vector<int> runs(static_cast<size_t>(tasks), 0);
    std::atomic<int> wrong{0};
    parallel_for(tasks, [&](int64_t task, int thread) {
      ++runs[static_cast<size_t>(task)];
      if (thread < 0 || thread >= threads) ++wrong;
    });
    CHECK(std::accumulate(runs.begin(), runs.end(), 0) == tasks);
    for (const int count : runs) CHECK(count == 1);
    CHECK(wrong == 0);
  }
}

void an_exception_reaches_the_caller() {
  for (int round = 0; round < 50; ++round) {
    CHECK_THROWS(parallel_for(1000,
                              [&](int64_t task, int) {
                                if (task % 7 == round % 7) throw std::runtime_error("task failed");
                              }),
                 "task failed");
    std::atomic<int64_t> sum{0};
    parallel_for(100, [&](int64_t task, int) { sum += task; });
    CHECK(sum == 4950);
  }
}

void a_nested_call_runs_on_its_thread() {
  std::atomic<int> wrong{0};
  parallel_for(20, [&](int64_t, int) {
    if (max_threads() != 1) ++wrong;
    int64_t sum = 0;  // not atomic
    parallel_for(10, [&](int64_t task, int thread) { sum += task + thread; });
    if (sum != 45) ++wrong;
  });
  CHECK(wrong == 0);
}

void threads_have_their_own_scratch() {
  std::atomic<int> wrong{0};
  parallel_for(200, [&](int64_t task, int) {
    const scan_fast::Scratch<int64_t> scratch(1000 + task);
    for (int64_t i = 0; i < 1000 + task; ++i) scratch[i] = task;
    for (int64_t i = 0; i < 1000 + task; ++i) wrong += scratch[i] != task;
  });
  CHECK(wrong == 0);
}

}  // namespace

int main() {
  if (omp_set_num_threads != nullptr) omp_set_num_threads(3);
  CHECK(max_threads() > 1);
  RUN(every_task_runs_once);
  RUN(an_exception_reaches_the_caller);
  RUN(a_nested_call_runs_on_its_thread);
  RUN(threads_have_their_own_scratch);
  return check::finish();
}
