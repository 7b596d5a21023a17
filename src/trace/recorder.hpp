// SPDX-License-Identifier: Apache-2.0
// The recorder: tracks of 32-byte records, always on.
//
//   writer --record()--> ring of a track --collector, 5 to 200 times a second--> file (while a trace is being written)
//
// A track has one writer at a time, so writing is four stores and a publishing one: no lock, no system call, no
// allocation, and no look at who reads. The ring overwrites its oldest records; a collector that comes too late finds
// out which ones it missed and counts them. Without a collector the ring simply holds the last moments.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "trace/clock.hpp"
#include "trace/record.hpp"

namespace sluice::trace {

// One writer's ring. The writer may change from thread to thread if something else (a mutex) orders them.
class Track {
 public:
  // `capacity`: records, a power of two.
  Track(uint16_t number, std::string name, uint32_t capacity);

  void record(Kind kind, uint64_t begin, uint64_t end, uint16_t layer = Record::kNoLayer, uint32_t bytes = 0,
              uint64_t value = 0) {
    const uint64_t at = head_.load(std::memory_order_relaxed);
    uint64_t* const cell = cell_of(at);
    // A reader that meets a cell while it is rewritten finds out: read() looks at the head again afterwards. The fence
    // keeps these stores behind the head's last one; on x86 it is no instruction.
    std::atomic_thread_fence(std::memory_order_release);
    store(cell[0], begin);
    store(cell[1], end);
    store(cell[2], value);
    store(cell[3], uint64_t{bytes} | uint64_t{layer} << 32 | uint64_t{static_cast<uint16_t>(kind)} << 48);
    head_.store(at + 1, std::memory_order_release);
  }
  void count(Counter counter, uint64_t at_ticks, uint64_t value) {
    record(Kind::counter, at_ticks, at_ticks, static_cast<uint16_t>(counter), 0, value);
  }

  uint16_t number() const { return number_; }
  const std::string& name() const { return name_; }
  uint64_t capacity() const { return mask_ + 1; }   // in records
  uint64_t written() const { return head_.load(std::memory_order_acquire); }

  struct Taken {
    uint64_t records = 0;
    uint64_t dropped = 0;   // before those: overwritten, or may have been, before they could be copied
    uint64_t next = 0;      // number of the record behind them
  };
  // Copies the records from number `from` on to the beginning of `out`, as many as there are and as it holds. Any
  // thread.
  Taken take(uint64_t from, std::span<Record> out) const;

  // Asks for the ring's memory now, where it would come page by page while the ring is first filled. Any thread.
  void populate() const;

 private:
  struct Free {
    void operator()(uint64_t* cells) const { std::free(cells); }
  };
  static constexpr uint64_t kWords = 4;   // of a record

  uint64_t* cell_of(uint64_t record) const { return cells_.get() + (record & mask_) * kWords; }
  static void store(uint64_t& word, uint64_t value) {
    std::atomic_ref(word).store(value, std::memory_order_relaxed);
  }
  static uint64_t load(uint64_t& word) { return std::atomic_ref(word).load(std::memory_order_relaxed); }

  const uint16_t number_;
  const std::string name_;
  const uint64_t mask_;
  std::unique_ptr<uint64_t[], Free> cells_;   // zeroed by the kernel as it is touched
  alignas(64) std::atomic<uint64_t> head_{0};   // records written so far
};

class Injector;

// The tracks of a model. They live as long as the recorder.
class Recorder {
 public:
  Recorder();
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  // Records that a track holds unless told otherwise.
  static constexpr uint32_t kCapacity = 1u << 14;
  // ... those of sessions, of the thread that computes and of the one that prefetches. The smallest of models write 20
  // to 45 records a token in each, 250,000 a second: the ring lasts half a second, a collector sleeps a fifth at most.
  static constexpr uint32_t kBusyCapacity = 1u << 17;

  // A new track. Any thread; allocates.
  Track& add_track(std::string name, uint32_t capacity = kCapacity);
  // The tracks so far. Any thread.
  std::vector<Track*> tracks() const;

  // Whether somebody writes a trace: evidence that costs system calls is gathered only then.
  bool collected() const { return collected_.load(std::memory_order_relaxed); }
  void set_collected(bool on) { collected_.store(on, std::memory_order_relaxed); }

  // Of this recorder's stamps, measured from its beginning until now: 1e-4 at worst in its first millisecond, then
  // better.
  TickScale scale() const { return {started_, read_clocks()}; }
  double ns_per_tick() const { return scale().ns_per_tick(); }
  // Null unless faults are made on purpose. Set before anything records.
  Injector* injector() const { return injector_.get(); }
  void set_injector(std::unique_ptr<Injector> injector);
  // For readings of the machine, by the collector.
  Track& machine_track() { return *machine_; }

 private:
  const ClockPair started_ = read_clocks();
  std::atomic<bool> collected_{false};
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Track>> tracks_;   // under mutex_; the tracks themselves are not
  Track* machine_ = nullptr;
  std::unique_ptr<Injector> injector_;           // last: its threads end before the tracks go
};

// Stamps that follow each other: each span begins where the one before ended, so that a whole is its parts and one
// stamp a span is enough.
class Chain {
 public:
  explicit Chain(Track& track) : Chain(track, ticks()) {}
  Chain(Track& track, uint64_t from) : track_(track), last_(from) {}

  // The time since the last call, as a span. Returns its length in ticks.
  uint64_t span(Kind kind, uint16_t layer = Record::kNoLayer, uint32_t bytes = 0, uint64_t value = 0) {
    return span_to(ticks(), kind, layer, bytes, value);
  }
  // ... up to a stamp that was taken since.
  uint64_t span_to(uint64_t end, Kind kind, uint16_t layer = Record::kNoLayer, uint32_t bytes = 0, uint64_t value = 0) {
    const uint64_t begin = last_;
    track_.record(kind, begin, end, layer, bytes, value);
    last_ = end;
    return end - begin;
  }
  // Leaves the time up to `at` to another track.
  void skip_to(uint64_t at) { last_ = at; }
  uint64_t last() const { return last_; }
  Track& track() { return track_; }

 private:
  Track& track_;
  uint64_t last_;
};

}  // namespace sluice::trace
