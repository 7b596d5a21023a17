// SPDX-License-Identifier: Apache-2.0
// The .sltrace file, format version 2. Everything is little-endian.
//
//   offset 0   header, 64 bytes: magic "SLTRACE\n", u32 version, u32 header bytes, u64 ticks, u64 steady ns, u64 unix ns
//              (one moment on three clocks), u64 error ns of that reading, u64 zero, u64 xxh3-64 of the bytes before it
//         64   chunks: u32 tag, u32 payload bytes (a multiple of 8), u64 xxh3-64 of the payload with the first eight
//              bytes as seed, payload
//
//   tag     payload
//   NOTE    JSON text, spaces at its end: what was run, on what. Once, first
//   TRAK    u32 number, u32 name bytes, name, zero padding. Before the track's first RECS
//   RECS    u32 track, u32 records, u64 dropped (of this track so far), records as below
//   CLKS    u64 ticks, u64 steady ns, u64 error ns: a later moment; the last one gives the ticks their rate
//   ENDS    u64 records, u64 dropped, of all tracks. Last; a file without it was not finished (the process was killed)
//
// A record (record.hpp) is a word of 8 bytes, bits 0-31 its ticks, 32-47 layer, 48-55 kind, 56-63 flags, and a word more
// for each flag: 1 its begin less the end of the record before it in the chunk (of the first one: less 0), which is 0
// without it; 2 its ticks, where they need more than 32 bits; 4 bytes; 8 value. Spans follow each other, so that most
// take 8 bytes of the 32 that they have in memory.
//
// Chunks with other tags are skipped. A file may end anywhere behind its header: whole chunks count, and complete says
// no.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/handles.hpp"
#include "sluice/result.hpp"
#include "trace/clock.hpp"
#include "trace/record.hpp"

namespace sluice::trace {

inline constexpr uint32_t kFormatVersion = 2;

// Writes a file. Chunks are gathered, 128 KiB at a time: a write of so much costs half of what its pieces would.
class TraceFileWriter {
 public:
  // Errors: not_found (the folder), io.
  static Result<TraceFileWriter> create(const std::string& path, const ClockPair& started,
                                        const std::string& note_json);

  Status add_track(uint32_t number, const std::string& name);
  Status add_records(uint32_t track, std::span<const Record> records, uint64_t dropped);
  Status add_clock(const ClockPair& pair);
  // Writes what has been gathered. Error: io.
  Status flush();
  // Writes ENDS and closes. Error: io.
  Status finish(uint64_t records, uint64_t dropped);

 private:
  TraceFileWriter(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  // A chunk is begun, its payload appended to gathered_, and ended.
  void begin_chunk();
  Status end_chunk(uint32_t tag);

  std::string path_;
  UniqueFd fd_;
  std::vector<std::byte> gathered_;
  std::vector<uint64_t> packed_;
  size_t chunk_at_ = 0;   // in gathered_
};

struct TraceTrack {
  std::string name;
  std::vector<Record> records;   // in the order written; end >= begin
  uint64_t dropped = 0;
};

// A trace in memory.
struct Trace {
  std::string path;
  std::string note;              // JSON
  std::vector<TraceTrack> tracks;
  TickScale scale;
  ClockPair started;
  uint64_t clock_error_ns = 0;   // of its two readings of both clocks the larger error
  uint64_t started_unix_ns = 0;
  uint64_t records = 0, dropped = 0;
  bool complete = false;         // false: the run ended before the file was finished

  // Seconds since the trace began.
  double seconds(uint64_t at_ticks) const {
    return (scale.steady_ns(at_ticks) - static_cast<double>(started.steady_ns)) * 1e-9;
  }
};

// Reads and checks a whole file. Errors: not_found, io, corrupt (the offset and what was expected), unsupported (a
// later version).
Result<Trace> read_trace(const std::string& path);
// The same of bytes in memory; `path` is for messages.
Result<Trace> parse_trace(std::span<const std::byte> bytes, const std::string& path);

}  // namespace sluice::trace
