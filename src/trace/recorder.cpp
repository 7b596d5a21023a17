// SPDX-License-Identifier: Apache-2.0
#include "trace/recorder.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <new>
#include <utility>

#include "base/check.hpp"
#include "trace/injection.hpp"

namespace sluice::trace {

namespace {

constexpr std::array<std::string_view, static_cast<size_t>(Kind::count)> kKindNames = {
    "none",       "token",      "run_model", "sampling", "detokenize", "callback",   "evidence",
    "pass",       "embed",      "norm",      "matmul",   "rope",       "attention",  "activation",
    "lm_head",    "disk_wait",  "copy_wait", "layer",    "finish",     "disk_read",  "bus_copy",
    "check",      "stage_wait", "ring_wait", "counter",  "injected",   "turn_wait",  "session",
    "collect",    "slot_wait",  "prepare"};

constexpr std::array<std::string_view, static_cast<size_t>(Counter::count)> kCounterNames = {
    "minor_faults",   "major_faults",    "voluntary_switches", "forced_switches", "run_delay_ns",
    "psi_cpu_us",     "psi_io_us",       "psi_memory_us",      "disk_reads",      "disk_read_sectors",
    "disk_read_ms",   "disk_writes",     "disk_write_ms",      "stream_bytes",    "resident_bytes",
    "reclaimed_pages", "swapped_pages",  "context",            "process_cpu_ns",  "refaults",
    "thread_cpu_ns",  "busy_ms",         "steal_ms",           "gpu_clock_mhz",   "gpu_throttle",
    "gpu_celsius",    "gpu_milliwatts",  "drive_celsius",      "drive_throttles",
    "device_clock_error_ns", "ring_bytes"};

}  // namespace

std::string_view name_of(Kind kind) {
  const auto index = static_cast<size_t>(kind);
  return index < kKindNames.size() ? kKindNames[index] : "unknown";
}

std::string_view name_of(Counter counter) {
  const auto index = static_cast<size_t>(counter);
  return index < kCounterNames.size() ? kCounterNames[index] : "unknown";
}

// ---------------------------------------------------------------------------------------------------------- clock

ClockPair read_clocks() {
  ClockPair best{.ticks = 0, .steady_ns = 0, .error_ns = UINT64_MAX};
  for (int i = 0; i < 8; ++i) {
    const uint64_t before = steady_ns();
    const uint64_t stamp = ticks();
    const uint64_t after = steady_ns();
    if (after - before < best.error_ns) {
      best = {.ticks = stamp, .steady_ns = before + (after - before) / 2, .error_ns = after - before};
    }
  }
  return best;
}

TickScale::TickScale(const ClockPair& first, const ClockPair& later)
    : base_ticks_(first.ticks), base_ns_(static_cast<double>(first.steady_ns)) {
  if (later.ticks > first.ticks && later.steady_ns > first.steady_ns) {
    ns_per_tick_ =
        static_cast<double>(later.steady_ns - first.steady_ns) / static_cast<double>(later.ticks - first.ticks);
  }
}

// ---------------------------------------------------------------------------------------------------------- tracks

Track::Track(uint16_t number, std::string name, uint32_t capacity)
    : number_(number), name_(std::move(name)), mask_(capacity - 1),
      cells_(static_cast<uint64_t*>(std::calloc(capacity, kWords * sizeof(uint64_t)))) {
  SLUICE_CHECK(capacity > 1 && (capacity & (capacity - 1)) == 0);
  if (!cells_) throw std::bad_alloc();
}

void Track::populate() const {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(cells_.get());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + capacity() * kWords * sizeof(uint64_t)) / page * page;
  // A hint: a kernel before 5.14 refuses it, and the pages come one by one.
  if (last > first) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
}

Track::Taken Track::take(uint64_t from, std::span<Record> out) const {
  const uint64_t capacity = mask_ + 1;
  const uint64_t head = head_.load(std::memory_order_acquire);
  uint64_t first = std::max(from, head > capacity ? head - capacity : 0);
  const uint64_t next = std::min(head, first + out.size());
  Record* record = out.data();
  for (uint64_t at = first; at < next; ++at, ++record) {
    uint64_t* const cell = cell_of(at);
    record->begin = load(cell[0]);
    record->end = load(cell[1]);
    record->value = load(cell[2]);
    const uint64_t rest = load(cell[3]);
    record->bytes = static_cast<uint32_t>(rest);
    record->layer = static_cast<uint16_t>(rest >> 32);
    record->kind = static_cast<Kind>(rest >> 48);
  }
  // If a load above saw a word of record n + capacity in the place of record n, then the writer had stored n + capacity
  // to head before its fence, and the load of head behind this fence sees that or more. So everything that may have
  // been overwritten is thrown away, the cell that the writer is in the middle of (number `now`) included.
  std::atomic_thread_fence(std::memory_order_acquire);
  const uint64_t now = head_.load(std::memory_order_relaxed);
  const uint64_t valid_from = now + 1 > capacity ? now + 1 - capacity : 0;
  if (valid_from > first) {
    const uint64_t lost = std::min(valid_from, next) - first;
    std::copy(out.data() + lost, record, out.data());
    first += lost;
  }
  return {.records = next - first, .dropped = first - from, .next = next};
}

// ---------------------------------------------------------------------------------------------------------- recorder

Recorder::Recorder() { machine_ = &add_track("machine", 1u << 10); }
Recorder::~Recorder() = default;

void Recorder::set_injector(std::unique_ptr<Injector> injector) { injector_ = std::move(injector); }

Track& Recorder::add_track(std::string name, uint32_t capacity) {
  const std::lock_guard lock(mutex_);
  tracks_.push_back(std::make_unique<Track>(static_cast<uint16_t>(tracks_.size()), std::move(name), capacity));
  return *tracks_.back();
}

std::vector<Track*> Recorder::tracks() const {
  const std::lock_guard lock(mutex_);
  std::vector<Track*> tracks;
  for (const auto& track : tracks_) tracks.push_back(track.get());
  return tracks;
}

}  // namespace sluice::trace
