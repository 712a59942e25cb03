// Switches between the two sets of GPU kernels that some families have: portable ones and ones for sm_90a.
#pragma once

#include <atomic>
#include <string_view>

namespace scan_fast {

// A family with kernels for sm_90a has one static switch in its _op.cpp. It is off until Python turns it on by the name
// of the family (scan_fast/ops/native.py); the operators then use these kernels if the device and the problem allow it.
class Sm90Switch {
 public:
  explicit Sm90Switch(const char* family) : family_(family), next_(first_) { first_ = this; }
  Sm90Switch(const Sm90Switch&) = delete;
  Sm90Switch& operator=(const Sm90Switch&) = delete;

  bool on() const { return on_.load(std::memory_order_relaxed); }
  void set(bool on) { on_.store(on, std::memory_order_relaxed); }

  // Returns the switch of a family, or null if this build has none.
  static Sm90Switch* find(std::string_view family) {
    for (Sm90Switch* found = first_; found != nullptr; found = found->next_) {
      if (found->family_ == family) return found;
    }
    return nullptr;
  }

 private:
  inline static Sm90Switch* first_ = nullptr;

  std::string_view family_;
  Sm90Switch* next_;
  std::atomic<bool> on_{false};
};

}  // namespace scan_fast
