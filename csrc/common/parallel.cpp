#include "common/parallel.h"

#if defined(SCAN_FAST_WITH_LIBGOMP) || defined(SCAN_FAST_WITH_THREADS)

#include <atomic>
#include <exception>

namespace scan_fast {
namespace {

// What the threads of a call share.
class Work {
 public:
  Work(int64_t tasks, const std::function<void(int64_t, int)>& body) : tasks_(tasks), body_(body) {}

  // Takes tasks until there are none left. An exception must not leave a thread of the pool, because that would end the
  // process: the first one is kept, and the tasks that nobody has begun are dropped.
  void take_tasks(int thread) noexcept {
    try {
      for (;;) {
        const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks_) return;
        body_(task, thread);
      }
    } catch (...) {
      next_.store(tasks_, std::memory_order_relaxed);
      if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
    }
  }

  // Called when all threads are done.
  void rethrow() const {
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  const int64_t tasks_;
  const std::function<void(int64_t, int)>& body_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace
}  // namespace scan_fast

#if defined(SCAN_FAST_WITH_LIBGOMP)

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

void run_on_threads(Work& work, int threads) {
  GOMP_parallel([](void* data) { static_cast<Work*>(data)->take_tasks(omp_get_thread_num()); }, &work,
                static_cast<unsigned>(threads), 0);
}

}  // namespace

int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

}  // namespace scan_fast

#else

// The threads of the C++ tests, three unless SCAN_FAST_TEST_THREADS says otherwise. ThreadSanitizer follows those of the
// C++ library, and libgomp is not instrumented.
#include <cstdlib>
#include <thread>
#include <vector>

namespace scan_fast {
namespace {

thread_local bool in_parallel = false;

void run_on_threads(Work& work, int threads) {
  const auto region = [&work](int thread) {
    in_parallel = true;
    work.take_tasks(thread);
    in_parallel = false;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(region, thread);
  region(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

int max_threads() {
  static const int threads = [] {
    const char* wanted = std::getenv("SCAN_FAST_TEST_THREADS");
    const int number = wanted == nullptr ? 3 : std::atoi(wanted);
    return number < 1 ? 1 : number;
  }();
  return in_parallel ? 1 : threads;
}

}  // namespace scan_fast

#endif

namespace scan_fast {

void parallel_for(int64_t tasks, const std::function<void(int64_t, int)>& body) {
  const int64_t threads = max_threads() < tasks ? max_threads() : tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  Work work(tasks, body);
  run_on_threads(work, static_cast<int>(threads));
  work.rethrow();
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
