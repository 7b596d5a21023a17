// SPDX-License-Identifier: Apache-2.0
// Faults made on purpose, to see whether the analysis finds them: they act on the mechanism, never on the records.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/handles.hpp"
#include "sluice/result.hpp"
#include "trace/recorder.hpp"

namespace sluice::trace {

enum class Fault : uint8_t {
  read,       // a completed read is taken late
  copy,       // a copy out of the host tier starts late
  compute,    // an operation computes for longer
  sampling,   // the sampler sleeps: a cause that the analysis has no rule for
  callback,   // the consumer sleeps
  preempt,    // other threads take the cores
  alloc,      // the decoding thread touches fresh memory
  compete,    // another thread reads the container from the drive
  evict,      // the mapped weights (--io mmap) are dropped from memory
  prefill,    // another session reads a prompt
  count,
};
const char* name_of(Fault fault);

enum class InjectionClock : uint8_t { token, time, bytes, count };
const char* name_of(InjectionClock clock);

// "read:period=16,ms=30,jitter=0.03,clock=token".
struct Injection {
  Fault fault = Fault::read;
  double period = 16;                // tokens; milliseconds; MiB that were read for streaming
  double ms = 30;                    // how long it lasts
  double jitter = 0;                 // standard deviation of a place, as a share of the period
  InjectionClock clock = InjectionClock::token;
};
// Error: usage, naming what is not understood and what there is.
Result<Injection> parse_injection(std::string_view text);

// What a run has for faults to act on.
struct FaultPlaces {
  bool drive = false;    // weights are streamed from the drive
  bool host = false;     // ... copied from the host tier
  bool mapped = false;   // ... computed with where the file is mapped
};
// Error: usage, if in such a run nothing would ever come to the fault's place, or its clock stand still.
Status check_place(const Injection& injection, const FaultPlaces& places);

class Injector {
 public:
  // `weights`: the container. `track`: where each fault that acts leaves a mark, for the report to show; written by
  // this object alone. Errors: usage (`compete`, where the file system has no direct reads), not_found, io,
  // out_of_memory.
  static Result<std::unique_ptr<Injector>> create(std::vector<Injection> injections, const std::string& weights,
                                                  Track& track);
  ~Injector();   // stop()
  Injector(const Injector&) = delete;
  Injector& operator=(const Injector&) = delete;

  // What `prefill` does: one pass of another session, false if it failed. Called by threads of the injector.
  void set_rival(std::function<bool()> pass) { rival_ = std::move(pass); }
  // Ends the injector's threads, before what they use goes.
  void stop();

  // Between two tokens, by the decoding thread: `bytes` read for streaming so far. What is due begins, here or in
  // a thread, or waits for its place (take).
  void on_token(uint64_t bytes);
  // At a fault's place: does what is due there, and marks it. Any thread.
  void take(Fault fault);

 private:
  struct Due {
    Injection injection;
    double next = 0, place = 0;      // on its clock
    std::mt19937_64 random;
  };

  Injector(const std::string& weights, Track& track);
  Status prepare_competitors();
  void begin(const Injection& injection);
  void mark(Fault fault, uint64_t begin_ticks, uint64_t ns);
  void start_thread(double seconds, std::function<void(uint64_t until_ns)> work);
  void compete(uint64_t until_ns, std::span<std::byte> buffer);
  void burn(uint64_t until_ns);
  void start_prefill(double seconds);
  void touch_memory(double seconds);
  bool evict();   // whether anything was mapped

  std::vector<Due> due_;
  std::string weights_;              // without links and dots, as the kernel names mappings
  Track& track_;
  std::mutex marking_;               // a track has one writer at a time
  const uint64_t started_ns_;
  uint64_t tokens_ = 0;
  std::array<std::atomic<uint64_t>, static_cast<size_t>(Fault::count)> pending_ns_{};
  UniqueFd competing_file_;
  Mapping read_buffer_;              // of the competing reads, touched before anything is timed
  std::function<bool()> rival_;
  std::atomic<bool> rival_came_{false};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

}  // namespace sluice::trace
