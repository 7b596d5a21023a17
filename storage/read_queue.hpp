// SPDX-License-Identifier: Apache-2.0
// Asynchronous reads of one file: io_uring where the kernel allows it, a pread thread pool elsewhere.
//
// Two layers. RawReads talks to the kernel and reports what the kernel said, short reads and errors included; there are
// three: uring, pread, and a fault injector for tests that decorates either. ReadQueue stands on one of them, retries
// what may be retried (short, EINTR, EAGAIN) for the rest of the bytes, and turns everything else into a typed error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/handles.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"

namespace sluice::storage {

// One read as handed to the kernel. `dest` stays owned by the caller and untouched by it until the read is reaped.
struct RawRead {
  uint64_t offset = 0;
  std::byte* dest = nullptr;
  uint32_t bytes = 0;
  uint32_t slot = 0;          // comes back with the result; < depth, unique among reads in flight
};

struct RawResult {
  uint32_t slot = 0;
  int32_t result = 0;         // bytes read, or -errno
};

class RawReads {
 public:
  virtual ~RawReads() = default;
  // Starts reads; never blocks on their completion. At most depth() in flight (a CHECK).
  // Returns 0 or -errno when the submission itself failed; then none of them started.
  virtual int submit(std::span<const RawRead> reads) = 0;
  // Blocks until at least one read finished (none in flight: a CHECK), then fills `out` with as many as are ready.
  virtual size_t reap(std::span<RawResult> out) = 0;
  // Whether reap would find one without blocking. A hint: it may know of none, or of one that will be held back.
  virtual bool ready() = 0;
  virtual uint32_t depth() const = 0;
  virtual const char* name() const = 0;   // "io_uring", "pread"
  // Tells the kernel about long-lived destination buffers. False: reads go on unregistered (a memlock limit, say).
  virtual bool register_buffers(std::span<const std::span<std::byte>> buffers) = 0;
};

// `-errno` where io_uring is refused (seccomp, kernel.io_uring_disabled, an old kernel).
Result<std::unique_ptr<RawReads>> make_uring_reads(int fd, uint32_t depth);
std::unique_ptr<RawReads> make_pread_reads(int fd, uint32_t depth, uint32_t threads);

// Seeded faults over a real reader, for tests. Rates are per read, 0..1; a fault hits a read at most `max_in_a_row` times
// so that retrying ends.
struct FaultPlan {
  uint64_t seed = 1;
  double short_read = 0;      // completes with a part, cut at a multiple of 512 B
  double eintr = 0;
  double eagain = 0;
  double delay = 0;           // completes late and out of order
  uint32_t delay_us = 2000;
  double eio = 0;
  double bit_flip = 0;        // one bit of the destination is wrong, result as usual
  uint32_t max_in_a_row = 3;
  uint64_t after_reads = 0;   // the first so many reads are left alone
  uint32_t einval_first = 0;  // so many reads after those fail with EINVAL, as where O_DIRECT is refused only at reading
};
std::unique_ptr<RawReads> make_faulty_reads(std::unique_ptr<RawReads> inner, const FaultPlan& plan);

enum class IoMode { automatic, uring, pread, mmap };

struct ReadQueueOptions {
  IoMode mode = IoMode::automatic;   // not mmap
  uint32_t depth = 32;
  bool direct = true;                // O_DIRECT where the file system takes it
  const FaultPlan* faults = nullptr; // tests only; copied
  LogHook log;
};

// What a finished read hands back.
struct ReadDone {
  uint64_t tag = 0;
  uint64_t submitted_ns = 0;   // steady clock
  uint64_t completed_ns = 0;
};

// Reads of one file. One thread uses it at a time.
class ReadQueue {
 public:
  // Opens `path` anew (O_DIRECT if asked and possible). `auto` falls back from io_uring to pread with one log line, and
  // from O_DIRECT to buffered with one; `uring` asked for by name and refused is an `unsupported` error.
  static Result<std::unique_ptr<ReadQueue>> open(const std::string& path, const ReadQueueOptions& options);
  virtual ~ReadQueue() = default;

  // Queues one read: `offset`, `bytes` and `dest` multiples of 4096, at most 1 MiB. Never blocks; false when depth()
  // reads are in flight. `dest` must stay until the read is reaped.
  virtual bool start(uint64_t offset, std::span<std::byte> dest, uint64_t tag) = 0;
  // Hands what `start` queued to the kernel. Error: io.
  virtual Status flush() = 0;
  // Blocks until one read is complete in full and returns it. No read in flight is a CHECK.
  // Errors: io (EIO and the like: path, offset, errno), corrupt (the file ends inside the read: it shrank).
  virtual Result<ReadDone> wait() = 0;
  // Whether wait would return at once. A hint: a read that came in parts is not complete yet.
  virtual bool ready() = 0;

  virtual uint32_t in_flight() const = 0;
  virtual uint32_t depth() const = 0;
  virtual bool direct() const = 0;
  virtual const char* name() const = 0;
  virtual uint64_t bytes_read() const = 0;    // completed, padding included, retries not counted twice
  virtual uint64_t retries() const = 0;
  // Registers long-lived buffers; one log line if refused.
  virtual void register_buffers(std::span<const std::span<std::byte>> buffers) = 0;
  // Waits for everything in flight and drops it, so that buffers may be freed. Never fails.
  virtual void drain() = 0;
};

}  // namespace sluice::storage
