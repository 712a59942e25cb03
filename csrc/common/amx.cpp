// Compiled with AMX. Its instructions are executed only if amx_is_usable().
#include "common/amx.h"

#include <chrono>
#include <cstdlib>

#include "common/cpu_features.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "common/amx_products.h"

namespace scan_fast {

bool amx_is_usable() {
  static const bool usable = [] {
    // Linux lets a process use the tile registers only on request (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
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

double amx_peak_rate() {
  if (!amx_is_usable()) return 0;
  const AmxSession session;
  alignas(64) static const uint16_t tiles[4 * 512] = {};
  double best = 0;
  for (int attempt = 0; attempt < 20; ++attempt) {
    constexpr int kSteps = 4000;
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kSteps; ++i) {
      add_tile_products(tiles, tiles + 1024);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    const double rate = kSteps * 4.0 * (2 * 16 * 16 * 32) / seconds.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace scan_fast

#else

namespace scan_fast {

bool amx_is_usable() { return false; }
AmxSession::AmxSession() : previous_{} {}
AmxSession::~AmxSession() = default;
double amx_peak_rate() { return 0; }

}  // namespace scan_fast

#endif
