#include "common/large_buffers.h"

#include <ATen/EmptyTensor.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace scan_fast {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
  void* pointer;
  size_t bytes;
};

class Pool {
 public:
  // Never destroyed: tensors may outlive every static object.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  Buffer* take(size_t wanted) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // The most recent one that fits and wastes at most a quarter: its pages are the likeliest to be in the cache.
      for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
        if ((*it)->bytes < wanted || (*it)->bytes > wanted + wanted / 4 + kHugePage) continue;
        Buffer* found = *it;
        waiting_.erase(it);
        waiting_bytes_ -= found->bytes;
        return found;
      }
    }
    const size_t bytes = (wanted + kHugePage - 1) / kHugePage * kHugePage;
    void* pointer = std::aligned_alloc(kHugePage, bytes);
    if (pointer == nullptr) {
      release();
      pointer = std::aligned_alloc(kHugePage, bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, pointer != nullptr, "scan_fast could not allocate ", bytes, " bytes");
    }
#ifdef __linux__
    (void)madvise(pointer, bytes, MADV_HUGEPAGE);  // a hint; ordinary pages serve as well
#endif
    return new Buffer{pointer, bytes};
  }

  void give(Buffer* buffer) {
    std::list<Buffer*> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_front(buffer);
      waiting_bytes_ += buffer->bytes;
      while (waiting_bytes_ > kPoolCapacity) {
        waiting_bytes_ -= waiting_.back()->bytes;
        dropped.splice(dropped.begin(), waiting_, std::prev(waiting_.end()));
      }
    }
    drop(dropped);
  }

  void release() {
    std::list<Buffer*> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      dropped.swap(waiting_);
      waiting_bytes_ = 0;
    }
    drop(dropped);
  }

  size_t waiting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return waiting_bytes_;
  }

 private:
  static void drop(const std::list<Buffer*>& buffers) {
    for (Buffer* buffer : buffers) {
      std::free(buffer->pointer);
      delete buffer;
    }
  }

  std::mutex mutex_;
  std::list<Buffer*> waiting_;
  size_t waiting_bytes_ = 0;
};

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Buffer* buffer = Pool::instance().take(bytes);
    return {buffer->pointer, buffer, [](void* context) { Pool::instance().give(static_cast<Buffer*>(context)); },
            c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  // What overflows, such as a negative size, is an error of at::empty.
  uint64_t elements = 0, bytes = 0;
  const bool overflows = c10::safe_multiplies_u64(sizes, &elements) ||
                         c10::mul_overflows(elements, uint64_t{options.dtype().itemsize()}, &bytes);
  if (overflows || !options.device().is_cpu() || bytes < kLargeBuffer) return at::empty(sizes, options);
  static PoolAllocator allocator;
  return at::Tensor(at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                              c10::typeMetaToScalarType(options.dtype()), std::nullopt));
}

size_t pooled_bytes() { return Pool::instance().waiting(); }
void release_pooled() { Pool::instance().release(); }

}  // namespace scan_fast
