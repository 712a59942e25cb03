// The right to use AMX tiles, and their layout: 8 tiles of 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace scan_fast {

// True where the processor has AMX, the system lets this process use it, and SCAN_FAST_CPU_ISA does not lower it.
bool amx_is_usable();

// Loads the tile layout for the calling thread, and puts back the one it found (other libraries use tiles, too).
class AmxSession {
 public:
  AmxSession();
  ~AmxSession();
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;

 private:
  alignas(64) unsigned char previous_[64];
};

// Floating point operations per second of one thread whose bfloat16 tiles come from the first cache: what no product
// exceeds. Takes some milliseconds; 0 where AMX is not usable.
double amx_peak_rate();

}  // namespace scan_fast
