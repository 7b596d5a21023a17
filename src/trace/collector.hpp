// SPDX-License-Identifier: Apache-2.0
// Carries records from the recorder's rings into a file while a model runs.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "sluice/result.hpp"
#include "trace/device_evidence.hpp"
#include "trace/evidence.hpp"
#include "trace/recorder.hpp"
#include "trace/trace_file.hpp"

namespace sluice::trace {

// What a finished trace holds.
struct Totals {
  uint64_t records = 0;
  uint64_t dropped = 0;   // overwritten before they could be written
};

// Whose clocks and heat are read besides the counters of the operating system.
struct Watched {
  std::string gpu_bus_id; // of the GPU that computes (Backend::pci_bus_id); may be empty
  std::string weights;    // the drive that this file lies on; may be empty
};

class Collector {
 public:
  // Creates `path` and starts collecting what is recorded from now on. `note_json`: what is run, on what. The recorder
  // must outlive the object. Errors: not_found, io.
  static Result<std::unique_ptr<Collector>> start(Recorder& recorder, const std::string& path,
                                                  const std::string& note_json, const Watched& watched = {});
  // Stops and leaves the file unfinished if stop() was not called.
  ~Collector();

  // Collects what is left and finishes the file. Error: io, that of the first write that failed: it ended the trace, and
  // nothing was collected since. Once.
  Result<Totals> stop();

 private:
  struct Source {
    Track* track = nullptr;
    uint64_t next = 0;        // record to be read next
    uint64_t end = 0;         // what is there in this round
    bool of_session = false;
    uint64_t dropped = 0;
  };

  Collector(Recorder& recorder, TraceFileWriter file) : recorder_(recorder), file_(std::move(file)) {}
  void run();
  void read_machine();
  Status collect();
  Status collect(Source& source);
  void join();

  Recorder& recorder_;
  TraceFileWriter file_;
  std::vector<Source> sources_;
  std::array<Record, 512> piece_;   // on its way from a ring to the file: 16 KiB, so that it stays in the first cache
  double fill_ = 0;           // of the ring that the last collection found fullest; beyond 1 it ran over
  std::unique_ptr<MachineEvidence> machine_;
  std::unique_ptr<GpuEvidence> gpu_;       // may be null
  std::unique_ptr<DriveEvidence> drive_;   // may be null
  uint64_t readings_ = 0;
  Totals totals_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;     // under mutex_
  Status status_;             // the thread's; read after join
  std::thread thread_;
};

}  // namespace sluice::trace
