// Uninitialised memory for one call, which the calling thread keeps for the next one: fresh pages of the system would
// cost more than a small kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace scan_fast {

// Buffers that a thread has released, at most kKept bytes. The oldest go first.
class ScratchPool {
 public:
  static constexpr size_t kKept = size_t{16} << 20, kAlignment = 64;
  struct Buffer {
    void* memory;
    size_t bytes;
  };

  static ScratchPool& of_thread() {
    thread_local ScratchPool pool;
    return pool;
  }
  ~ScratchPool() {
    for (const Buffer& buffer : free_) std::free(buffer.memory);
  }

  Buffer take(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    for (size_t i = free_.size(); i-- > 0;) {
      const Buffer found = free_[i];
      if (found.bytes < bytes || found.bytes > 2 * bytes) continue;
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
      kept_ -= found.bytes;
      return found;
    }
    void* const memory = std::aligned_alloc(kAlignment, bytes);
    if (memory == nullptr && bytes > 0) throw std::bad_alloc();
    return {memory, bytes};
  }
  void give_back(Buffer buffer) noexcept {
    while (!free_.empty() && kept_ + buffer.bytes > kKept) {
      kept_ -= free_.front().bytes;
      std::free(free_.front().memory);
      free_.erase(free_.begin());
    }
    if (buffer.bytes > kKept || free_.size() == free_.capacity()) return std::free(buffer.memory);
    free_.push_back(buffer);
    kept_ += buffer.bytes;
  }

 private:
  ScratchPool() { free_.reserve(32); }

  std::vector<Buffer> free_;
  size_t kept_ = 0;
};

// An array of `count` elements, aligned to a cache line. Made and destroyed by the same thread.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count)
      : buffer_(ScratchPool::of_thread().take(static_cast<size_t>(count) * sizeof(T))), held_(true) {}
  Scratch(Scratch&& other) noexcept : buffer_(other.buffer_), held_(other.held_) { other.held_ = false; }
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(buffer_, other.buffer_);
    std::swap(held_, other.held_);
    return *this;
  }
  ~Scratch() {
    if (held_) ScratchPool::of_thread().give_back(buffer_);
  }
  T* get() const { return static_cast<T*>(buffer_.memory); }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  ScratchPool::Buffer buffer_{nullptr, 0};
  bool held_ = false;
};

}  // namespace scan_fast
