// SPDX-License-Identifier: Apache-2.0
// The weights of an open model in their tiers, and the machinery that brings the streamed ones.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "base/handles.hpp"
#include "exec/prefetcher.hpp"
#include "plan/planner.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"
#include "storage/container.hpp"
#include "storage/read_queue.hpp"
#include "storage/sigbus_guard.hpp"

namespace sluice::exec {

// Staging slots of kBlockBytes: drives finish a whole queue of reads at once, and the next ones need places while the
// prefetcher copies those (docs/benchmarks.md).
inline constexpr uint32_t kReadDepth = 32;
inline constexpr uint32_t kStagingSlots = 2 * kReadDepth;

class Weights {
 public:
  struct Options {
    storage::IoMode io = storage::IoMode::automatic;
    bool verify_mapping = true;                 // mmap: compare the checksums of what is computed out of the mapping
    const storage::FaultPlan* faults = nullptr; // tests only
    trace::Recorder* recorder = nullptr;        // of the prefetcher's spans
    LogHook log;
    // Bytes of resident and host weights (and of a mapping that is verified), done and in all.
    std::function<void(uint64_t done, uint64_t total)> progress;
  };

  // Allocates tiers and rings, loads device and host tier with every checksum compared, and starts the prefetcher.
  // `container`, `plan` and `backend` must outlive the object. With IoMode::mmap the plan must be one made in place.
  // Errors: not_found, io, corrupt, out_of_memory, device.
  static Result<std::unique_ptr<Weights>> open(const storage::Container& container, const plan::Plan& plan,
                                               backend::Backend& backend, const Options& options);

  ~Weights();
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  // Where the first plane of tensor i lies while it is used: fixed, also for streamed tensors. Not for Tier::rows.
  backend::DeviceAddress address(uint32_t tensor) const { return addresses_[tensor]; }

  // Null where nothing is streamed.
  Prefetcher* prefetcher() const { return prefetcher_.get(); }

  // Ask after a pass, before its results are believed. Error: corrupt, when the mapped file shrank or a page of it could
  // not be read: zeros were computed with.
  Status check_mapping() const;

  const char* io_name() const { return io_name_; }        // "io_uring", "pread", "mmap", "none"
  uint64_t staging_bytes() const { return staging_.size(); }
  // Bytes per second that the drive has given while there was something to read; 0 before `least_bytes` were read.
  double disk_rate(uint64_t least_bytes) const;
  uint64_t loaded_bytes() const { return loaded_bytes_; } // read from the drive while opening, padding included
  double load_seconds() const { return load_seconds_; }
  uint64_t bytes_read() const { return loaded_bytes_ + (prefetcher_ ? prefetcher_->bytes_read() : 0); }
  uint64_t retries() const { return load_retries_ + (prefetcher_ ? prefetcher_->retries() : 0); }

 private:
  // One tensor to be read at open: into memory that the host can write, or through staging to the device.
  struct Load {
    uint32_t tensor = 0;
    std::byte* host = nullptr;   // null: through staging to addresses_[tensor]
  };
  // A staging slot (or, for the host tier, only its place in the queue) while its read is on the way.
  struct Flight {
    BlockRead read;
    Load load;
    std::span<std::byte> data;
    bool copying = false;        // the copy engine may still read the slot: wait for `event`
    backend::EventId event = 0;
  };

  Weights(const storage::Container& container, const plan::Plan& plan, backend::Backend& backend)
      : container_(container), plan_(plan), backend_(backend) {}
  Status allocate_tiers();
  Status allocate_host_tier();
  Status map_file(const Options& options);
  Status load(const Options& options, storage::ReadQueue& queue);
  Status start_load(storage::ReadQueue& queue, Flight& flight, uint32_t slot);
  Status finish_load(Flight& flight);
  uint64_t load_bytes() const;
  std::vector<std::span<std::byte>> landing_places() const;
  Status verify_mapping(const Options& options);

  const storage::Container& container_;
  const plan::Plan& plan_;
  backend::Backend& backend_;
  std::vector<backend::DeviceAddress> addresses_;          // by tensor
  std::vector<Load> loads_;                                // in file order
  std::vector<Mapping> host_slabs_;
  std::vector<std::span<const std::byte>> host_weights_;   // by stream item
  backend::DeviceAddress ring_;
  Mapping staging_;
  Mapping file_;
  storage::GuardedRange guard_;
  const char* io_name_ = "none";
  uint64_t loaded_bytes_ = 0;
  uint64_t load_retries_ = 0;
  double load_seconds_ = 0;
  std::unique_ptr<Prefetcher> prefetcher_;                 // last: it stops before what it uses goes
};

}  // namespace sluice::exec
