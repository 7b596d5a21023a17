// SPDX-License-Identifier: Apache-2.0
// Brings streamed tensors into the stream ring, in execution order, for ever: through the end of a pass into the next.
//
//   drive --read queue--> staging slot --checksum--> copy queue --> ring        (disk tier)
//   host tier -------------------------------------> copy queue --> ring        (host tier)
//
// One thread owns reads and copies. It may write an item's place in the ring once the item it overwrites was released
// (StreamItem::distance), and reads ahead of that as far as the staging slots reach. Reads finish in any order; copies
// start in execution order.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.hpp"
#include "base/handles.hpp"
#include "plan/planner.hpp"
#include "sluice/result.hpp"
#include "storage/container.hpp"
#include "storage/read_queue.hpp"
#include "trace/injection.hpp"
#include "trace/recorder.hpp"

namespace sluice::exec {

// One read of the drive: whole checksum blocks of one tensor that lie behind each other in the file.
struct BlockRead {
  uint64_t offset = 0;                // in the file
  uint32_t bytes = 0;                 // padding included
  uint64_t tensor_offset = 0;         // of the first byte, from the tensor's first plane
  struct Block {
    const storage::Plane* plane = nullptr;
    uint64_t index = 0;               // checksum block of the plane
    uint32_t at = 0;                  // in the read
  };
  std::vector<Block> blocks;
};

// The reads that cover `tensor`, in file order, each at most storage::kBlockBytes.
std::vector<BlockRead> reads_of(const storage::Tensor& tensor);

// Compares every block of `read`, whose bytes are `data`. Error: corrupt.
Status check_read(const storage::Container& container, const storage::Tensor& tensor, const BlockRead& read,
                  std::span<const std::byte> data);

// What waiting for an item cost, by cause.
struct AcquireTimes {
  uint64_t disk_wait_ns = 0;          // the item came from the drive
  uint64_t copy_wait_ns = 0;          // ... from the host tier
};

class Prefetcher {
 public:
  struct Options {
    backend::DeviceAddress ring;                          // plan.ring_bytes
    std::vector<std::span<const std::byte>> host_weights; // by stream item; empty for the disk tier
    std::span<std::byte> staging;                         // at least one kBlockBytes slot, if there is a disk tier
    trace::Recorder* recorder = nullptr;                  // null: nothing is recorded
  };

  // `queue` reads the container's file and is used by this object's thread alone from now on; null without a disk tier.
  // Everything must outlive the object. Starts reading at once.
  static Result<std::unique_ptr<Prefetcher>> start(const storage::Container& container, const plan::Plan& plan,
                                                   backend::Backend& backend, std::unique_ptr<storage::ReadQueue> queue,
                                                   Options options);
  ~Prefetcher();

  // Executor's thread. Items are acquired and released in order, item 0 following the last. `acquire` returns when the
  // compute queue may be told to use the item (it waits for the copy by event). Errors are those of the reads: items
  // that landed before one are still handed out, every later call returns it.
  Status acquire(uint32_t item, AcquireTimes& times);
  // After the last operation that uses the item was submitted.
  void release(uint32_t item);

  // Bytes read from the drive for streaming, padding included, and reads that had to be repeated.
  uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }
  uint64_t retries() const { return retries_.load(std::memory_order_relaxed); }
  // Time during which reads were in flight.
  double busy_seconds() const { return static_cast<double>(busy_ns_.load(std::memory_order_relaxed)) * 1e-9; }

 private:
  struct Slot {
    bool landed = false;
    bool copied = false;                // an event was recorded behind the copy out of it
    backend::EventId event = 0;
  };
  // Read number k of a pass belongs to stream item `item`.
  struct PassRead {
    uint32_t item = 0;
    bool last_of_item = false;
    BlockRead read;
  };

  Prefetcher(const storage::Container& container, const plan::Plan& plan, backend::Backend& backend,
             std::unique_ptr<storage::ReadQueue> queue, Options options);
  void run();
  Status step(bool& idle);
  Status wait_for_slot(const Slot& slot);
  Status take_read();                   // waits for one
  Status start_reads();
  Status copy_host_item();
  Status copy_landed_read();
  bool ring_is_free() const;            // for the item at the copy cursor
  void publish_item();
  uint64_t bytes_of_items(uint64_t count) const;   // of the first `count`, counted through all passes
  std::span<std::byte> slot_bytes(uint64_t read_number) const;
  // Of this object's thread, since `begin`; and of a read, from its submission to its completion.
  void record(trace::Kind kind, uint64_t begin, uint32_t bytes = 0, uint64_t value = 0);
  void record_read(const storage::ReadDone& done);
  void inject(trace::Fault fault);

  const storage::Container& container_;
  const plan::Plan& plan_;
  backend::Backend& backend_;
  std::unique_ptr<storage::ReadQueue> queue_;
  uint64_t bytes_before_ = 0;           // what the queue had read when this object got it
  uint64_t retries_before_ = 0;
  Options options_;
  trace::Track* track_ = nullptr;       // null: nothing is recorded
  trace::Track* drive_track_ = nullptr; // reads, which overlap
  double ns_per_tick_ = 1;
  std::vector<PassRead> reads_;         // of one pass
  std::vector<uint64_t> item_ends_;     // by stream item: bytes of those up to it, of one pass
  std::vector<Slot> slots_;
  std::vector<backend::EventId> landed_events_, freed_events_;   // by stream item

  // The thread's own cursors, counted through all passes.
  uint64_t reads_started_ = 0;
  uint64_t reads_copied_ = 0;
  uint64_t items_copied_ = 0;
  std::chrono::steady_clock::time_point busy_since_;
  bool ring_waited_ = false;            // the copy queue was told to wait for the current item's place

  // Shared with the executor.
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<uint64_t> published_{0};  // items whose copies are submitted
  std::atomic<uint64_t> released_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> stopping_{false};
  Error error_;                         // under mutex_, valid if failed_
  std::atomic<uint64_t> bytes_read_{0};
  std::atomic<uint64_t> retries_{0};
  std::atomic<uint64_t> busy_ns_{0};
  uint64_t acquired_ = 0;               // executor's
  std::thread thread_;
};

}  // namespace sluice::exec
