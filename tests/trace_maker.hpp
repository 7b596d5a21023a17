// SPDX-License-Identifier: Apache-2.0
// Traces made by hand: what a run would have recorded, with every time chosen by the test.
#pragma once

#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <xxhash.h>

#include "base/check.hpp"
#include "tiny_container.hpp"
#include "trace/trace_file.hpp"

namespace sluice::test {

// Bytes of a whole trace file that `write` filled; ticks are nanoseconds in it.
template <class Write>
std::vector<std::byte> trace_bytes(const std::string& path, Write&& write, bool finish = true,
                                          const char* note = R"({"command":"test"})") {
  const trace::ClockPair started{.ticks = 1000, .steady_ns = trace::steady_ns(), .error_ns = 50};
  auto file = trace::TraceFileWriter::create(path, started, note);
  SLUICE_CHECK(file);
  uint64_t records = 0;
  write(*file, records);
  trace::ClockPair later = started;
  later.ticks += 1'000'000'000;
  later.steady_ns += 1'000'000'000;
  SLUICE_CHECK(file->add_clock(later));
  if (finish) SLUICE_CHECK(file->finish(records, 0));
  std::ifstream in(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  std::vector<std::byte> bytes(text.size());
  std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

// Two tokens of 10 and 20 ms with every part named, on an engine's and a session's track.
inline void write_two_tokens(trace::TraceFileWriter& file, uint64_t& records) {
  using trace::Kind;
  using trace::Record;
  std::vector<Record> engine, session;
  const auto add = [](std::vector<Record>& track, Kind kind, uint64_t begin, uint64_t end, uint32_t bytes = 0,
                      uint64_t value = 0, uint16_t layer = Record::kNoLayer) {
    track.push_back({.begin = begin, .end = end, .value = value, .bytes = bytes, .layer = layer, .kind = kind});
  };
  constexpr uint64_t kMs = 1'000'000;
  uint64_t at = 1000;
  for (const uint64_t ms : {10, 20}) {
    const uint64_t unit = ms * kMs / 10;
    add(engine, Kind::embed, at, at + unit);
    add(engine, Kind::disk_wait, at + unit, at + 4 * unit);
    add(engine, Kind::matmul, at + 4 * unit, at + 8 * unit, 0, 0, 0);
    add(engine, Kind::pass, at, at + 8 * unit, 1, 5);
    add(session, Kind::run_model, at, at + 8 * unit);
    add(session, Kind::sampling, at + 8 * unit, at + 9 * unit);
    add(session, Kind::callback, at + 9 * unit, at + 10 * unit);
    add(session, Kind::counter, at, at, 0, ms * 3, static_cast<uint16_t>(trace::Counter::major_faults));
    add(session, Kind::token, at, at + 10 * unit, 1, 6);
    at += 10 * unit;
  }
  SLUICE_CHECK(file.add_track(0, "machine"));
  SLUICE_CHECK(file.add_track(1, "engine"));
  SLUICE_CHECK(file.add_track(2, "session 0"));
  SLUICE_CHECK(file.add_records(1, engine, 0));
  SLUICE_CHECK(file.add_records(2, session, 0));
  records += engine.size() + session.size();
}

// Recomputes the checksums of header and chunks, as far as chunks can be followed, so that changes behind them count.
inline void reseal(std::vector<uint8_t>& bytes) {
  if (bytes.size() < 64) return;
  const uint64_t header = XXH3_64bits(bytes.data(), 56);
  std::memcpy(bytes.data() + 56, &header, 8);
  for (size_t at = 64; bytes.size() - at >= 16;) {
    uint32_t tag = 0, size = 0;
    std::memcpy(&tag, bytes.data() + at, 4);
    std::memcpy(&size, bytes.data() + at + 4, 4);
    if (size > bytes.size() - at - 16) return;
    const uint64_t sum = XXH3_64bits_withSeed(bytes.data() + at + 16, size, uint64_t{tag} | uint64_t{size} << 32);
    std::memcpy(bytes.data() + at + 8, &sum, 8);
    at += 16 + size;
  }
}

}  // namespace sluice::test
