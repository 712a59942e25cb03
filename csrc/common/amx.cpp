// This file alone is compiled with AMX; its instructions are reached only after amx_is_usable().
#include "common/amx.h"

#include <cstdlib>

#include "common/cpu_features.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace scan_fast {

bool amx_is_usable() {
  static const bool usable = [] {
    // Linux gives a process the tile registers only on request (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    return cpu_has_amx_bf16() && std::getenv("SCAN_FAST_CPU_ISA") == nullptr &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return usable;
}

AmxSession::AmxSession() {
  struct alignas(64) Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static const Layout layout;
  _tile_storeconfig(previous_);
  _tile_loadconfig(&layout);
}

AmxSession::~AmxSession() {
  if (previous_[0] == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(previous_);
  }
}

}  // namespace scan_fast

#else

namespace scan_fast {

bool amx_is_usable() { return false; }
AmxSession::AmxSession() : previous_{} {}
AmxSession::~AmxSession() = default;

}  // namespace scan_fast

#endif
