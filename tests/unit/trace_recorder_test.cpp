// SPDX-License-Identifier: Apache-2.0
// The recorder: nothing lost that the ring could hold, nothing torn, and what was lost counted. The injector: marks of
// what it did.
#include <fcntl.h>
#include <sys/mman.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/handles.hpp"
#include "catch.hpp"
#include "tiny_container.hpp"
#include "trace/injection.hpp"
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

TEST_CASE("tracks of a recorder have numbers of their own") {
  Recorder recorder;
  Track& a = recorder.add_track("engine");
  Track& b = recorder.add_track("session 0");
  CHECK(a.number() != b.number());
  CHECK(recorder.tracks().size() == 3);   // and the machine's
}

// The tables of names lie apart from the enumerations: one that is a name short, or out of order, ends in this.
TEMPLATE_TEST_CASE("every kind and every counter has a name of its own", "", Kind, Counter) {
  std::set<std::string_view> names;
  constexpr auto kCount = static_cast<uint16_t>(TestType::count);
  for (uint16_t i = 0; i < kCount; ++i) {
    const std::string_view name = name_of(static_cast<TestType>(i));
    CAPTURE(i, name);
    CHECK_FALSE(name.empty());
    CHECK(name != "unknown");
    CHECK(names.insert(name).second);
  }
  CHECK(name_of(TestType::count) == "unknown");
  CHECK(name_of(static_cast<TestType>(999)) == "unknown");
}

TEST_CASE("names are those of the numbers in the file format") {
  CHECK(name_of(Kind::token) == "token");
  CHECK(name_of(Kind::ring_wait) == "ring_wait");
  CHECK(name_of(Kind::slot_wait) == "slot_wait");
  CHECK(name_of(Kind::prepare) == "prepare");
  CHECK(name_of(Counter::minor_faults) == "minor_faults");
  CHECK(name_of(Counter::steal_ms) == "steal_ms");
  CHECK(name_of(Counter::ring_bytes) == "ring_bytes");
}

namespace {

// The injector of one fault, due after every token, and the track of its marks.
struct OneFault {
  explicit OneFault(Fault fault, const std::string& weights = "/no/such/container") {
    auto made = Injector::create({{.fault = fault, .period = 1, .ms = 2}}, weights, track);
    REQUIRE(made);
    injector = std::move(*made);
  }
  std::vector<Record> marks() const { return take(track, 0, track.capacity()).first; }

  Track track{0, "injected", 64};
  std::unique_ptr<Injector> injector;
};

}  // namespace

TEST_CASE("a fault is marked when it acts, not when it is due") {
  for (const Fault fault : {Fault::read, Fault::copy, Fault::compute, Fault::sampling, Fault::callback, Fault::alloc}) {
    OneFault one(fault);
    CAPTURE(name_of(fault));
    one.injector->take(fault);   // nothing is due yet
    one.injector->on_token(0);
    CHECK(one.marks().empty());
    one.injector->take(fault);
    REQUIRE(one.marks().size() == 1);
    const Record mark = one.marks().front();
    CHECK((mark.kind == Kind::injected && mark.layer == static_cast<uint16_t>(fault) && mark.value == 2'000'000));
    CHECK(static_cast<double>(mark.end - mark.begin) * Recorder().ns_per_tick() > 1e6);
    one.injector->take(fault);   // it was taken
    CHECK(one.marks().size() == 1);
  }
}

TEST_CASE("dropped pages are marked where the container is mapped, by whatever path it was opened, and only there") {
  const sluice::test::TempFolder folder;
  const std::string path = folder.file("weights"), link = folder.file("link");
  std::ofstream(path) << std::string(8192, 'x');
  std::filesystem::create_symlink(path, link);
  OneFault one(Fault::evict, link);
  one.injector->on_token(0);
  CHECK(one.marks().empty());
  const auto file = sluice::open_file(path, O_RDONLY);
  REQUIRE(file);
  void* const mapped = ::mmap(nullptr, 8192, PROT_READ, MAP_SHARED, file->get(), 0);
  REQUIRE(mapped != MAP_FAILED);
  one.injector->on_token(0);
  CHECK(one.marks().size() == 1);
  ::munmap(mapped, 8192);
}

TEST_CASE("another session's passes are marked where there is another session") {
  OneFault one(Fault::prefill);
  one.injector->on_token(0);
  CHECK(one.marks().empty());
  one.injector->set_rival([] { return false; });
  one.injector->on_token(0);
  CHECK(one.marks().size() == 1);
}

TEST_CASE("a fault that a run has no place for is refused with what to change") {
  const auto refused = [](const Injection& injection, const FaultPlaces& places, const char* advice) {
    const sluice::Status status = check_place(injection, places);
    REQUIRE_FALSE(status);
    CHECK(status.error().code == sluice::ErrorCode::usage);
    CHECK(status.error().message.find(advice) != std::string::npos);
  };
  refused({.fault = Fault::read}, {.host = true, .mapped = true}, "lower --device-memory and --host-memory");
  refused({.fault = Fault::copy}, {.drive = true, .mapped = true}, "give --host-memory");
  refused({.fault = Fault::evict}, {.drive = true, .host = true}, "give --io mmap");
  for (int fault = 0; fault < static_cast<int>(Fault::count); ++fault) {
    CAPTURE(fault);
    CHECK(check_place({.fault = static_cast<Fault>(fault)}, {.drive = true, .host = true, .mapped = true}));
    refused({.fault = static_cast<Fault>(fault), .clock = InjectionClock::bytes},
            {.host = fault == static_cast<int>(Fault::copy), .mapped = true}, "");
  }
  refused({.fault = Fault::callback, .clock = InjectionClock::bytes}, {.host = true}, "give clock=token");
  CHECK(check_place({.fault = Fault::callback}, {}));
}
