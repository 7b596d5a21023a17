// SPDX-License-Identifier: Apache-2.0
// The recorder: nothing lost that the ring could hold, nothing torn, and what was lost counted.
#include <atomic>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "trace/recorder.hpp"

using namespace sluice::trace;

namespace {

// The records from number `from` on, which a piece of `size` must hold.
std::pair<std::vector<Record>, Track::Taken> take(const Track& track, uint64_t from, size_t size) {
  std::vector<Record> records(size);
  const Track::Taken taken = track.take(from, records);
  records.resize(taken.records);
  return {records, taken};
}

}  // namespace

TEST_CASE("a track gives back what was recorded, in order and field by field") {
  Track track(3, "engine", 8);
  track.record(Kind::matmul, 10, 25, 7, 4096, 123456789012345u);
  track.count(Counter::psi_io_us, 30, 99);
  const auto [records, taken] = take(track, 0, 8);
  CHECK((taken.next == 2 && taken.dropped == 0));
  REQUIRE(records.size() == 2);
  CHECK((records[0].begin == 10 && records[0].end == 25 && records[0].kind == Kind::matmul));
  CHECK((records[0].layer == 7 && records[0].bytes == 4096 && records[0].value == 123456789012345u));
  CHECK((records[1].kind == Kind::counter && records[1].layer == static_cast<uint16_t>(Counter::psi_io_us)));
  CHECK(records[1].value == 99);
}

TEST_CASE("a reader that comes too late counts what was overwritten") {
  Track track(0, "t", 8);
  for (uint64_t i = 0; i < 21; ++i) track.record(Kind::norm, i, i + 1);
  const auto [records, taken] = take(track, 0, 8);
  // The cell that a writer could be in at that moment counts as overwritten: 7 of 8 are sure.
  REQUIRE(records.size() == 7);
  CHECK((taken.next == 21 && taken.dropped == 14));
  CHECK(records.front().begin == 14);
  CHECK(records.back().begin == 20);
  const auto [none, end] = take(track, 21, 8);
  CHECK((none.empty() && end.next == 21 && end.dropped == 0));
}

TEST_CASE("a ring is taken in pieces: nothing twice, nothing left out, the lost ones counted once") {
  Track track(0, "t", 16);
  for (uint64_t i = 0; i < 21; ++i) track.record(Kind::norm, i, i + 1);
  uint64_t next = 0, dropped = 0;
  std::vector<uint64_t> seen;
  while (next < track.written()) {
    const auto [records, taken] = take(track, next, 4);
    CHECK(records.size() <= 4);
    for (const Record& record : records) seen.push_back(record.begin);
    next = taken.next;
    dropped += taken.dropped;
  }
  CHECK((next == 21 && dropped == 6));
  CHECK(seen == std::vector<uint64_t>{6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20});
}

TEST_CASE("a busy ring outlasts a collector's longest sleep, twice, with the fastest of models") {
  Track track(0, "engine", Recorder::kBusyCapacity);
  track.populate();
  constexpr uint64_t kRecords = 100'000;   // 0.4 s at 250,000 a second
  for (uint64_t i = 0; i < kRecords; ++i) track.record(Kind::norm, i, i + 1);
  const auto [records, taken] = take(track, 0, kRecords);
  CHECK((records.size() == kRecords && taken.next == kRecords && taken.dropped == 0));
}

TEST_CASE("records read while a writer laps the ring are whole, in order, and together with the dropped ones all") {
  Track track(0, "t", 256);
  constexpr uint64_t kRecords = 3'000'000;
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (uint64_t i = 0; i < kRecords; ++i) {
      track.record(Kind::matmul, i, i * 2, static_cast<uint16_t>(i % 1000), static_cast<uint32_t>(i), ~i);
    }
    done = true;
  });
  std::vector<Record> piece(64);
  uint64_t next = 0, dropped = 0, seen = 0, bad = 0, last = 0;
  while (!done || next < kRecords) {
    const Track::Taken taken = track.take(next, piece);
    next = taken.next;
    dropped += taken.dropped;
    for (const Record& r : std::span(piece).first(taken.records)) {
      if (r.end != r.begin * 2 || r.value != ~r.begin || r.bytes != static_cast<uint32_t>(r.begin)) ++bad;
      if (r.layer != r.begin % 1000 || r.kind != Kind::matmul) ++bad;
      if (seen > 0 && r.begin <= last) ++bad;
      last = r.begin;
      ++seen;
    }
  }
  writer.join();
  CHECK(bad == 0);
  CHECK(seen > 0);
  CHECK(seen + dropped == kRecords);
}

TEST_CASE("spans of a chain follow each other without a gap") {
  Track track(0, "t", 64);
  Chain chain(track);
  const uint64_t begin = chain.last();
  uint64_t sum = 0;
  for (int i = 0; i < 20; ++i) sum += chain.span(Kind::norm);
  CHECK(sum == chain.last() - begin);
  const auto [records, taken] = take(track, 0, 20);
  REQUIRE(taken.records == 20);
  for (size_t i = 1; i < records.size(); ++i) CHECK(records[i].begin == records[i - 1].end);
}

TEST_CASE("ticks become nanoseconds of the steady clock") {
  const ClockPair first = read_clocks();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const TickScale scale(first, read_clocks());
  const ClockPair now = read_clocks();
  const double error = scale.steady_ns(now.ticks) - static_cast<double>(now.steady_ns);
  // Half of both readings' own error at the middle of the line, and as much again beyond its end. A reading that the
  // scheduler interrupted eight times says so in error_ns.
  CHECK(std::abs(error) <= 2.0 * static_cast<double>(first.error_ns + now.error_ns) + 200);
}

TEST_CASE("tracks of a recorder have numbers of their own, and every kind a name of its own") {
  Recorder recorder;
  Track& a = recorder.add_track("engine");
  Track& b = recorder.add_track("session 0");
  CHECK(a.number() != b.number());
  CHECK(recorder.tracks().size() == 3);   // and the machine's
  CHECK(name_of(Kind::turn_wait) == "turn_wait");
  CHECK(name_of(static_cast<Kind>(999)) == "unknown");
  CHECK(name_of(Counter::steal_ms) == "steal_ms");
  CHECK(name_of(static_cast<Counter>(999)) == "unknown");
}
