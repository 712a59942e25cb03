// Warp collectives of the emulated machine: shuffles, votes, ldmatrix and mma.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "testing/emulator_machine.h"

namespace scan_fast::emu {

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSync: return "__syncwarp";
    case Collective::kShuffle: return "a shuffle";
    case Collective::kBallot: return "a vote";
    case Collective::kLdmatrix: return "ldmatrix";
    case Collective::kLdmatrixTrans: return "ldmatrix.trans";
    default: return "mma";
  }
}

namespace {

// PTX ISA, "Warp-level matrix load instruction": lane l gets, of each 8x8 matrix, row l/4, elements 2(l%4) and next;
// transposed, column l/4, rows 2(l%4) and the next.
void finish_ldmatrix(Slot (&slots)[kWarp], bool transposed) {
  uint16_t element[4][8][8];
  for (int l = 0; l < kWarp; ++l) {
    const void* row = nullptr;
    std::memcpy(&row, slots[l].bytes, sizeof(row));
    std::memcpy(element[l / 8][l % 8], row, 16);
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int m = 0; m < 4; ++m) {
      for (int h = 0; h < 2; ++h) {
        const int i = l / 4, j = 2 * (l % 4) + h;
        std::memcpy(slots[l].bytes + 4 * m + 2 * h, transposed ? &element[m][j][i] : &element[m][i][j], 2);
      }
    }
  }
}

}  // namespace

float truncated_sum(const float (&addends)[17]) {
  float largest = 0;
  for (const float x : addends) largest = std::max(largest, std::fabs(x));
  if (!(largest > 0 && largest <= 3e38f)) {
    float sum = 0;
    for (const float x : addends) sum += x;
    return sum;
  }
  const int shift = 23 - std::ilogb(largest);
  double sum = 0;  // of integers below 17 * 2^24
  for (const float x : addends) sum += std::trunc(std::ldexp(static_cast<double>(x), shift));
  const float result = static_cast<float>(std::ldexp(sum, -shift));
  return std::fabs(std::ldexp(static_cast<double>(result), shift)) > std::fabs(sum) ? std::nextafterf(result, 0.0f)
                                                                                    : result;
}

namespace {

// PTX ISA, "Matrix fragments for mma.m16n8k16" with 16-bit floats: with g = l/4 and t = l%4,
// a[r] is row g + 8(r%2), columns 2t + 8(r/2) and the next; b[r] is column g, rows 2t + 8r and the next;
// c[r] is row g + 8(r/2), column 2t + r%2.
template <typename T>
void finish_mma(Slot (&slots)[kWarp]) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    uint16_t half[12];
    std::memcpy(half, slots[l].bytes, sizeof(half));
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < 2; ++h) a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + h] = to_float(T{half[2 * r + h]});
    }
    for (int r = 0; r < 2; ++r) {
      for (int h = 0; h < 2; ++h) b[2 * t + 8 * r + h][g] = to_float(T{half[8 + 2 * r + h]});
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    float c[4];
    std::memcpy(c, slots[l].bytes + 24, sizeof(c));
    for (int r = 0; r < 4; ++r) {
      const int row = l / 4 + 8 * (r / 2), column = 2 * (l % 4) + r % 2;
      if (options().truncate) {
        float addends[17];
        for (int k = 0; k < 16; ++k) addends[k] = a[row][k] * b[k][column];
        addends[16] = c[r];
        c[r] = truncated_sum(addends);
        continue;
      }
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[r] += sum;
    }
    std::memcpy(slots[l].bytes, c, sizeof(c));
  }
}

// Completes the collective that `leader` waits at, if all lanes of its mask have come.
bool try_complete(unsigned warp_index, unsigned leader) {
  auto fiber_of = [&](unsigned lane) -> Fiber& { return *machine.fibers[warp_index * kWarp + lane]; };
  Warp& warp = machine.warps[warp_index];
  const Collective kind = fiber_of(leader).kind;
  const unsigned mask = fiber_of(leader).mask;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (warp_index * kWarp + lane >= machine.threads) fail("a warp collective names a lane beyond the block" + where());
    const Fiber& other = fiber_of(lane);
    if (other.state == State::kDone) {
      fail(std::string(name_of(kind)) + " waits for lane " + std::to_string(lane) + ", which has returned" + where());
    }
    if (other.state != State::kAtCollective) return false;
    if (other.kind != kind || other.mask != mask) {
      fail(std::string("lanes of one warp meet at different collectives: ") + name_of(kind) + " and " +
           name_of(other.kind) + where());
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) warp.slots[lane] = fiber_of(lane).mine;
  }
  if (kind == Collective::kLdmatrix || kind == Collective::kLdmatrixTrans) {
    finish_ldmatrix(warp.slots, kind == Collective::kLdmatrixTrans);
  } else if (kind == Collective::kMmaHalf) {
    finish_mma<half_t>(warp.slots);
  } else if (kind == Collective::kMmaBf16) {
    finish_mma<bf16_t>(warp.slots);
  } else if (kind == Collective::kSync && mask == 0xffffffffu) {
    ++warp.epoch;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) fiber_of(lane).state = State::kReady;
  }
  return true;
}

}  // namespace

bool complete_collectives() {
  bool any = false;
  for (unsigned warp = 0; warp < machine.warps.size(); ++warp) {
    for (unsigned lane = 0; lane < kWarp && warp * kWarp + lane < machine.threads; ++lane) {
      if (machine.fibers[warp * kWarp + lane]->state == State::kAtCollective) any |= try_complete(warp, lane);
    }
  }
  return any;
}

}  // namespace scan_fast::emu
