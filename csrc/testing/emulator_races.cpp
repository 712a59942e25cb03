// Race detector. For each two bytes of shared memory it keeps the last write, the last atomic and the reads since. Two
// accesses of one warp are ordered if there is a full __syncwarp between them (shuffles order registers, not memory).
// Accesses of different warps are ordered if there is a block barrier between them, or if the later warp has acquired,
// through memory barriers (mbarrier) or named barriers, a release of the earlier one after its access. Each warp counts
// its releases and knows the latest release of each other warp that it has acquired (vector clocks).
#include <cstdlib>

#include "testing/emulator_machine.h"

namespace scan_fast::emu {
namespace {

Region* region_of(const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  auto inside = [p](const Region& r) { return p >= r.base && p < r.base + r.bytes; };
  if (machine.dynamic && machine.dynamic->bytes && inside(*machine.dynamic)) return machine.dynamic.get();
  for (auto& [key, region] : machine.statics) {
    if (inside(*region)) return region.get();
  }
  return nullptr;
}

[[noreturn]] void report_race(const Region& region, size_t offset, const char* what, unsigned other, unsigned me) {
  fail("race on " + region.name + " shared memory, byte " + std::to_string(offset) + ": " + what + " by threads " +
       std::to_string(other) + " and " + std::to_string(me) + " without a barrier between" + where());
}

void check_cell(Region& region, size_t index, Access access, unsigned me) {
  Cell& cell = region.cells[index];
  if (cell.epoch != machine.epoch) {
    cell.epoch = machine.epoch;
    cell.writer = -1;
    cell.readers.clear();
  }
  const unsigned warp = me / kWarp, lane = me % kWarp;
  const Warp& mine = machine.warps[warp];
  const auto seen = [&](unsigned other, unsigned time) { return mine.clock[other] >= time; };
  const bool atomic = access == Access::kAtomic;
  if (cell.writer >= 0 && static_cast<unsigned>(cell.writer) != me && !(atomic && cell.writer_atomic)) {
    const unsigned writer_warp = static_cast<unsigned>(cell.writer) / kWarp;
    const bool ordered =
        writer_warp == warp ? cell.writer_warp_epoch != mine.epoch : seen(writer_warp, cell.writer_time);
    if (!ordered) {
      report_race(region, 2 * index, access == Access::kRead ? "write and read" : "two writes",
                  static_cast<unsigned>(cell.writer), me);
    }
  }
  if (access == Access::kRead) {
    for (Reader& reader : cell.readers) {
      if (reader.warp != warp) continue;
      reader.lanes = reader.warp_epoch == mine.epoch ? reader.lanes | 1u << lane : 1u << lane;
      reader.warp_epoch = mine.epoch;
      reader.time = mine.clock[warp];
      return;
    }
    cell.readers.push_back({warp, mine.epoch, 1u << lane, mine.clock[warp]});
    return;
  }
  for (const Reader& reader : cell.readers) {
    const unsigned others = reader.warp == warp ? reader.lanes & ~(1u << lane) : reader.lanes;
    const bool ordered = reader.warp == warp ? reader.warp_epoch != mine.epoch : seen(reader.warp, reader.time);
    if (others && !ordered) {
      report_race(region, 2 * index, "read and write",
                  reader.warp * kWarp + static_cast<unsigned>(__builtin_ctz(others)), me);
    }
  }
  cell.writer = static_cast<int>(me);
  cell.writer_warp_epoch = mine.epoch;
  cell.writer_time = mine.clock[warp];
  cell.writer_atomic = atomic;
}

}  // namespace

Region::~Region() { std::free(base); }

void touch_as(unsigned thread, const void* pointer, size_t bytes, Access access) {
  if (!options().detect_races) return;
  Region* region = region_of(pointer);
  if (region == nullptr) {
    if (access == Access::kAtomic) return;
    fail("an access through Shared or to shared memory falls outside of it" + where());
  }
  if (region->cells.empty()) region->cells.resize((region->bytes + 1) / 2);
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - region->base);
  if (offset + bytes > region->bytes) {
    fail("an access runs past the end of " + region->name + " shared memory" + where());
  }
  for (size_t cell = offset / 2; cell <= (offset + bytes - 1) / 2; ++cell) check_cell(*region, cell, access, thread);
}

void touch(const void* pointer, size_t bytes, Access access) {
  if (machine.current != nullptr) touch_as(machine.current->index, pointer, bytes, access);
}

void release(unsigned thread, Clock& clock) {
  Clock& mine = machine.warps[thread / kWarp].clock;
  join(clock, mine);
  ++mine[thread / kWarp];
}

void acquire(unsigned thread, const Clock& clock) { join(machine.warps[thread / kWarp].clock, clock); }

}  // namespace scan_fast::emu
