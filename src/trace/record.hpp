// SPDX-License-Identifier: Apache-2.0
// What a trace is made of: 32-byte records, and the names of what they say. docs/tracing.md has the same table.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace sluice::trace {

// Numbers are part of the file format: new kinds go to the end.
enum class Kind : uint16_t {
  none = 0,
  // Session track. A token's parts follow each other without a gap.
  token = 1,      // from the end of the token before to the end of this one; bytes: prompt tokens that it began with
  run_model = 2,  // passes of one token: until its logits are there
  sampling = 3,
  detokenize = 4,  // stop conditions and text
  callback = 5,    // the caller's own code
  evidence = 6,    // reading the counters below: the trace's own cost
  // Engine track. A pass's parts follow each other without a gap.
  pass = 7,  // bytes: rows; value: position of the first; layer: slot of the session whose rows they are
  embed = 8,
  norm = 9,
  matmul = 10,
  rope = 11,
  attention = 12,
  activation = 13,
  lm_head = 14,
  disk_wait = 15,  // the pass waited for bytes of the drive; value: stream item
  copy_wait = 16,  // ... for the copy out of host memory
  layer = 17,
  finish = 18,  // the device's last work and the logits' way to the host
  // Prefetcher track.
  disk_read = 19,   // submission to completion; value: offset in the file, bytes: length
  bus_copy = 20,    // into the stream ring; bytes: length
  check = 21,       // a block's checksum
  stage_wait = 22,  // nothing to do until a read completes
  ring_wait = 23,   // nothing to do until the pass releases a place
  // Anywhere.
  counter = 24,    // layer: which (Counter); value: its reading
  injected = 25,   // a fault made on purpose, for the report to show; the analysis never reads it
  turn_wait = 26,  // before a pass: another session's ran
  session = 27,    // session track, in run_model: the session's own work before, between and after its passes
  collect = 28,    // machine track: the trace's own thread at work
  slot_wait = 29,  // prefetcher track: nothing to do until a copy leaves its staging slot
  prepare = 30,    // engine track, inside an operation's span: recording of commands that later passes repeat (graphs)
  count,
};

// A span, or a reading at one moment (begin = end). Fields mean what Kind says.
struct Record {
  uint64_t begin = 0;     // ticks
  uint64_t end = 0;       // ticks
  uint64_t value = 0;
  uint32_t bytes = 0;
  uint16_t layer = kNoLayer;
  Kind kind = Kind::none;

  static constexpr uint16_t kNoLayer = 0xffff;
};
static_assert(sizeof(Record) == 32);

// Evidence: counters that only grow, unless said otherwise. Numbers are part of the file format.
enum class Counter : uint16_t {
  minor_faults = 0,  // of the process (getrusage)
  major_faults = 1,
  voluntary_switches = 2,  // of the thread that decodes
  forced_switches = 3,
  run_delay_ns = 4,  // of that thread: runnable, but not running (schedstat)
  psi_cpu_us = 5,    // machine: some task waited for a core (PSI "some" total)
  psi_io_us = 6,
  psi_memory_us = 7,
  disk_reads = 8,         // of the container's device (diskstats): requests,
  disk_read_sectors = 9,  // 512 bytes each,
  disk_read_ms = 10,      // summed over requests
  disk_writes = 11,
  disk_write_ms = 12,
  stream_bytes = 13,     // read by this model for streaming
  resident_bytes = 14,   // of the process; falls as well
  reclaimed_pages = 15,  // machine (vmstat pgsteal), at most 5 times a second
  swapped_pages = 16,    // machine (vmstat pswpin), at most 5 times a second
  context = 17,          // tokens of the sequence; a reading
  process_cpu_ns = 18,   // of all threads of the process
  refaults = 19,         // machine (vmstat workingset_refault_file), at most 5 times a second
  thread_cpu_ns = 20,    // of the thread that decodes
  busy_ms = 21,          // machine: all cores together, this process's share included (stat), at most 5 times a second
  steal_ms = 22,         // machine: the hypervisor ran somebody else, at most 5 times a second
  // Of the GPU (NVML), at most 5 times a second, and of the drive (NVMe SMART), once a second; readings but the last.
  gpu_clock_mhz = 23,
  gpu_throttle = 24,     // bits: why the clock is low (device_evidence.hpp)
  gpu_celsius = 25,
  gpu_milliwatts = 26,
  drive_celsius = 27,
  drive_throttles = 28,  // grows when the drive is too hot
  device_clock_error_ns = 29,  // device track: its stamps are at most so far from the host's clock; a reading
  ring_bytes = 30,             // prefetcher track: in the stream ring, filled and not yet released; a reading
  count,
};

std::string_view name_of(Kind kind);        // "disk_wait"
std::string_view name_of(Counter counter);  // "run_delay_ns"

}  // namespace sluice::trace
