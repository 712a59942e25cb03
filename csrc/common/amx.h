// Access to AMX tiles, in one layout: 8 tiles of 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace scan_fast {

// Returns whether the processor has AMX, the system lets this process use it, and SCAN_FAST_CPU_ISA does not exclude
// it.
bool amx_is_usable();

// Loads the tile layout for the calling thread, and restores the previous one at the end: other libraries use tiles,
// too.
class AmxSession {
 public:
  AmxSession();
  ~AmxSession();
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;

 private:
  alignas(64) unsigned char previous_[64];
};

// Measures the floating point operations per second of one thread whose bfloat16 tiles come from the first-level cache,
// an upper bound for products. Takes some milliseconds; returns 0 if AMX is not usable.
double amx_peak_rate();

}  // namespace scan_fast
