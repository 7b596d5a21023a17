// SPDX-License-Identifier: Apache-2.0
// The .sltrace file: what was written is what is read, and every kind of damage has its sentence.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>

#include "base/check.hpp"
#include "catch.hpp"
#include "trace_maker.hpp"
#include "trace/collector.hpp"
#include "trace/tokens.hpp"

using namespace sluice;
using namespace sluice::test;
using namespace sluice::trace;

namespace {

std::vector<std::byte> good_trace() {
  const TempFolder folder;
  return trace_bytes(folder.file("t.sltrace"), write_two_tokens);
}

// The message of parsing `bytes` after `change`, checksums put right again.
Error error_after(const std::function<void(std::vector<uint8_t>&)>& change) {
  const std::vector<std::byte> good = good_trace();
  std::vector<uint8_t> bytes(good.size());
  std::memcpy(bytes.data(), good.data(), good.size());
  change(bytes);
  reseal(bytes);
  const auto trace = parse_trace(std::as_bytes(std::span(bytes)), "t.sltrace");
  REQUIRE_FALSE(trace);
  return trace.error();
}

// Offset of the first chunk with this tag.
size_t chunk(const std::vector<uint8_t>& bytes, const char* tag) {
  for (size_t at = 64; at + 16 <= bytes.size();) {
    if (std::memcmp(bytes.data() + at, tag, 4) == 0) return at;
    uint32_t size = 0;
    std::memcpy(&size, bytes.data() + at + 4, 4);
    at += 16 + size;
  }
  FAIL("no chunk " << tag);
  return 0;
}

template <class T>
void put(std::vector<uint8_t>& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

// Leaves other bytes where the functions called next have their local variables, from the deepest ones up.
[[gnu::noinline]] void overwrite_stack(size_t bytes) {
  volatile char deep[16384];
  for (size_t i = 0; i < bytes; ++i) deep[i] = 0x5a;
  (void)deep[0];
}

}  // namespace

TEST_CASE("a trace is read as it was written") {
  const auto trace = parse_trace(good_trace(), "t.sltrace");
  REQUIRE(trace);
  CHECK(trace->complete);
  CHECK(trace->note.starts_with(R"({"command":"test"})"));
  REQUIRE(trace->tracks.size() == 3);
  CHECK(trace->tracks[1].name == "engine");
  CHECK(trace->tracks[1].records.size() == 8);
  CHECK(trace->records == 18);
  CHECK(trace->scale.ns_per_tick() == Approx(1.0));
  CHECK(trace->seconds(trace->tracks[2].records.back().end) == Approx(0.030));
}

TEST_CASE("the checksum of a chunk does not depend on the chunk before it") {
  const TempFolder folder;
  const auto bytes = trace_bytes(folder.file("t.sltrace"), [](TraceFileWriter& file, uint64_t& records) {
    const std::vector<Record> some(40, Record{.begin = 1, .end = 2});
    SLUICE_CHECK(file.add_track(0, "engine"));
    for (size_t deep = 0; deep <= 16384; deep += 64) {
      overwrite_stack(deep);
      SLUICE_CHECK(file.add_records(0, some, 0));
      records += some.size();
    }
  });
  const auto trace = parse_trace(bytes, "t.sltrace");
  INFO((trace ? "" : trace.error().message));
  REQUIRE(trace);
  CHECK(trace->complete);
}

TEST_CASE("records come back as they were, whatever their fields, and spans behind each other take a word each") {
  const TempFolder folder;
  std::mt19937_64 random(3);
  const auto some = [&]() -> uint64_t {   // of every size, and often nothing
    return random() % 3 == 0 ? 0 : random() >> random() % 64;
  };
  std::vector<Record> records;
  uint64_t at = 5;
  for (int i = 0; i < 3000; ++i) {
    Record record;
    record.begin = random() % 2 == 0 ? at : some() / 2;
    record.end = record.begin + some() / 2;
    record.value = some();
    record.bytes = static_cast<uint32_t>(some());
    record.layer = static_cast<uint16_t>(random());
    record.kind = static_cast<Kind>(random() % static_cast<size_t>(Kind::count));
    at = record.end;
    records.push_back(record);
  }
  std::vector<Record> chain(1000);
  for (size_t i = 0; i < chain.size(); ++i) chain[i] = {.begin = 7 * i, .end = 7 * i + 7, .layer = 3, .kind = Kind::norm};
  size_t chained = 0;
  const auto bytes = trace_bytes(folder.file("t.sltrace"), [&](TraceFileWriter& file, uint64_t& count) {
    SLUICE_CHECK(file.add_track(0, "engine") && file.add_records(0, records, 0) && file.add_records(0, {}, 0));
    SLUICE_CHECK(file.add_track(1, "gpu") && file.flush());
    const auto size = [&] { return std::filesystem::file_size(folder.file("t.sltrace")); };
    const size_t before = size();
    SLUICE_CHECK(file.add_records(1, chain, 0) && file.flush());
    chained = size() - before;
    count += records.size() + chain.size();
  });
  CHECK(chained == 32 + 8 * chain.size());   // a chunk's header, the track's, and the records
  const auto trace = parse_trace(bytes, "t.sltrace");
  INFO((trace ? "" : trace.error().message));
  REQUIRE(trace);
  const auto same = [](const std::vector<Record>& a, const std::vector<Record>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Record)) == 0;
  };
  CHECK(same(trace->tracks[0].records, records));
  CHECK(same(trace->tracks[1].records, chain));
}

TEST_CASE("tokens of a trace have every part, growth of counters, and their time accounted for") {
  const auto trace = parse_trace(good_trace(), "t.sltrace");
  REQUIRE(trace);
  const auto tokens = tokens_of(*trace);
  REQUIRE(tokens);
  REQUIRE(tokens->all.size() == 2);
  const Token& second = tokens->all[1];
  CHECK_FALSE(tokens->all[0].decoded);
  CHECK(second.decoded);
  CHECK(second.total() == Approx(0.020));
  CHECK(second[Part::disk_wait] == Approx(0.006));
  CHECK(second[Part::matmul] == Approx(0.008));
  CHECK(second[Part::sampling] == Approx(0.002));
  CHECK(second.accounted() == Approx(1.0));
  CHECK(second[Counter::major_faults] == Approx(30));
  CHECK(tokens->counted[static_cast<size_t>(Counter::major_faults)]);
  CHECK_FALSE(tokens->counted[static_cast<size_t>(Counter::psi_io_us)]);
}

TEST_CASE("a trace of a process that was killed counts up to its last whole chunk") {
  std::vector<std::byte> bytes = good_trace();
  for (const size_t cut : {size_t{1}, size_t{15}, size_t{33}, size_t{100}, bytes.size() - 64}) {
    const auto trace = parse_trace(std::span(bytes).first(bytes.size() - cut), "t.sltrace");
    REQUIRE(trace);
    CHECK_FALSE(trace->complete);
  }
}

TEST_CASE("each kind of damage to a trace is refused in one sentence with the offset") {
  const auto names = [](const Error& error, const char* text) {
    CHECK(error.code == ErrorCode::corrupt);
    CHECK(error.message.find(text) != std::string::npos);
    CHECK(error.message.starts_with("t.sltrace"));
  };
  names(error_after([](auto& b) { b.resize(10); }), "is not a trace");
  names(error_after([](auto& b) { b[0] = 'X'; }), "is not a trace");
  names(error_after([](auto& b) { put<uint32_t>(b, 12, 65); }), "header of 65 bytes");
  names(error_after([](auto& b) { put<uint32_t>(b, 68, 7); }), "a chunk of 7 bytes");
  names(error_after([](auto& b) { put<uint32_t>(b, 68, 0xfffffff8u); }), "a chunk of 4294967288 bytes");
  names(error_after([](auto& b) { put<uint32_t>(b, chunk(b, "TRAK") + 16, 9); }), "track 9 out of order");
  names(error_after([](auto& b) { put<uint32_t>(b, chunk(b, "TRAK") + 20, 60); }), "a name of 60 bytes");
  names(error_after([](auto& b) { put<uint32_t>(b, chunk(b, "RECS") + 16, 3); }), "records of track 3");
  names(error_after([](auto& b) { put<uint32_t>(b, chunk(b, "RECS") + 20, 5); }), "5 records in 128 bytes");
  names(error_after([](auto& b) { put<uint32_t>(b, chunk(b, "RECS") + 20, 9); }), "9 records in 128 bytes");
  names(error_after([](auto& b) { put<uint32_t>(b, chunk(b, "RECS") + 20, 17); }), "17 records in 128 bytes");
  // Of the first record the begin, then its flags; of the fourth the bytes.
  names(error_after([](auto& b) { put<uint64_t>(b, chunk(b, "RECS") + 32 + 8, UINT64_MAX); }), "ends before it begins");
  names(error_after([](auto& b) { put<uint8_t>(b, chunk(b, "RECS") + 32 + 7, 0x11); }), "a record with flags 17");
  names(error_after([](auto& b) { put<uint64_t>(b, chunk(b, "RECS") + 64 + 16, 1ull << 32); }), "a size of 4294967296");
  names(error_after([](auto& b) { put<uint64_t>(b, chunk(b, "CLKS") + 16, 0); }), "runs backwards");
  names(error_after([](auto& b) { put<uint64_t>(b, chunk(b, "ENDS") + 16, 99); }), "counts 99 records where 18 are");
  names(error_after([](auto& b) { b.resize(b.size() + 8); }), "bytes behind the end");
  names(error_after([](auto& b) { std::memcpy(&b[chunk(b, "TRAK")], "CLKS", 4); }), "clock reading of another size");
  names(error_after([](auto& b) { std::memcpy(&b[chunk(b, "RECS")], "ENDS", 4); }), "end of another size");

  std::vector<std::byte> flipped = good_trace();
  flipped[flipped.size() - 20] ^= std::byte{1};
  const auto trace = parse_trace(flipped, "t.sltrace");
  REQUIRE_FALSE(trace);
  names(trace.error(), "checksum differs");
  flipped = good_trace();
  flipped[20] ^= std::byte{1};
  const auto header = parse_trace(flipped, "t.sltrace");
  REQUIRE_FALSE(header);
  names(header.error(), "header whose checksum differs");
}

TEST_CASE("a trace of a later format version is refused as that") {
  const Error error = error_after([](auto& b) { put<uint32_t>(b, 8, 3); });
  CHECK(error.code == ErrorCode::unsupported);
  CHECK(error.message.find("format version 3") != std::string::npos);
}

TEST_CASE("a trace without a token, a missing file and a folder each have their error") {
  const TempFolder folder;
  const auto empty = trace_bytes(folder.file("e.sltrace"), [](TraceFileWriter&, uint64_t&) {});
  const auto trace = parse_trace(empty, "e.sltrace");
  REQUIRE(trace);
  const auto tokens = tokens_of(*trace);
  REQUIRE_FALSE(tokens);
  CHECK(tokens.error().code == ErrorCode::unsupported);
  CHECK(read_trace(folder.file("none.sltrace")).error().code == ErrorCode::not_found);
  CHECK(read_trace(folder.file(".")).error().code == ErrorCode::io);
  CHECK(TraceFileWriter::create(folder.file("no/such/folder.sltrace"), {}, "{}").error().code == ErrorCode::not_found);
  CHECK(TraceFileWriter::create(folder.file("."), {}, "{}").error().code == ErrorCode::io);
}

TEST_CASE("a disk that is full from the beginning refuses the trace and not what is recorded") {
  Recorder recorder;
  Track& track = recorder.add_track("engine");
  auto collector = Collector::start(recorder, "/dev/full", "{}");
  // /dev/full takes the open and refuses every write: the first one is the header's.
  REQUIRE_FALSE(collector);
  CHECK(collector.error().code == ErrorCode::io);
  CHECK(collector.error().message.find("cannot write the trace") != std::string::npos);
  CHECK_FALSE(recorder.collected());
  track.record(Kind::norm, 1, 2);
}

namespace {

// Files of this process cannot grow beyond `bytes`, as on a disk that becomes full: a write ends early, the next fails.
class SmallFiles {
 public:
  explicit SmallFiles(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before_) == 0);
    const rlimit limit{bytes, before_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  }
  ~SmallFiles() {
    (void)::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }
  SmallFiles(const SmallFiles&) = delete;
  SmallFiles& operator=(const SmallFiles&) = delete;

 private:
  void (*handler_)(int);
  rlimit before_{};
};

}  // namespace

TEST_CASE("a disk that becomes full ends the trace, not what is recorded, and what was written opens") {
  const TempFolder folder;
  const std::string path = folder.file("full.sltrace");
  constexpr uint64_t kLimit = 100'003;   // in the middle of a record
  Recorder recorder;
  Track& engine = recorder.add_track("engine", Recorder::kBusyCapacity);
  auto collector = Collector::start(recorder, path, R"({"command":"test"})");
  REQUIRE(collector);
  uint64_t recorded = 0;
  {
    const SmallFiles limit(kLimit);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (recorder.collected() && std::chrono::steady_clock::now() < deadline) {
      engine.record(Kind::matmul, recorded, recorded + 1, 0, 0, recorded);
      ++recorded;
      if (recorded % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
  REQUIRE_FALSE(recorder.collected());   // the thread noticed, in the middle
  engine.record(Kind::matmul, recorded, recorded + 1, 0, 0, recorded);
  const auto totals = (*collector)->stop();
  REQUIRE_FALSE(totals);
  CHECK(totals.error().code == ErrorCode::io);
  CHECK(totals.error().os_code == EFBIG);
  CHECK(totals.error().message.starts_with(path + ": cannot write the trace: "));
  CHECK(totals.error().message.find("what was written until then can be read") != std::string::npos);
  CHECK(std::filesystem::file_size(path) == kLimit);
  const auto trace = read_trace(path);
  INFO((trace ? "" : trace.error().message));
  REQUIRE(trace);
  CHECK_FALSE(trace->complete);
  const auto written = std::find_if(trace->tracks.begin(), trace->tracks.end(),
                                    [](const TraceTrack& track) { return track.name == "engine"; });
  REQUIRE(written != trace->tracks.end());
  CHECK(written->records.size() > 2000);   // of 16 bytes in 100,003, less a chunk of 512
  for (size_t i = 0; i < written->records.size(); ++i) REQUIRE(written->records[i].value == i);
}

TEST_CASE("a trace that ends anywhere has no token without its parts") {
  const TempFolder folder;
  const std::string path = folder.file("cut.sltrace");
  for (int round = 0; round < 4; ++round) {
    Recorder recorder;
    Track& early = recorder.add_track("engine", Recorder::kBusyCapacity);
    Track& session = recorder.add_track("session 0", Recorder::kBusyCapacity);
    Track& late = recorder.add_track("gpu", Recorder::kBusyCapacity);   // begins with the first pass, behind the session
    auto collector = Collector::start(recorder, path, R"({"command":"test"})");
    REQUIRE(collector);
    std::atomic<bool> stopping{false};
    std::thread writer([&] {
      for (uint64_t i = 0; !stopping; ++i) {
        early.record(Kind::matmul, i, i + 1, 0, 0, i);
        late.record(Kind::matmul, i, i + 1, 0, 0, i);
        session.record(Kind::token, i, i + 1, 0, 0, i);
        // 200,000 tokens a second, so that many are recorded while a round is written.
        for (const uint64_t until = steady_ns() + 5'000; steady_ns() < until;) {
        }
      }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    collector->reset();   // as if the process had been killed: nothing more is written
    stopping = true;
    writer.join();
    const auto trace = read_trace(path);
    INFO((trace ? "" : trace.error().message));
    REQUIRE(trace);
    CHECK_FALSE(trace->complete);
    const auto last = [&](const char* name) {
      for (const TraceTrack& track : trace->tracks) {
        if (track.name == name && !track.records.empty()) return track.records.back().value;
      }
      return uint64_t{0};
    };
    CHECK(last("session 0") > 1000);
    CHECK(last("engine") >= last("session 0"));
    CHECK(last("gpu") >= last("session 0"));
  }
}

TEST_CASE("the collector writes all that many tracks record, those that begin meanwhile included") {
  const TempFolder folder;
  const std::string path = folder.file("c.sltrace");
  Recorder recorder;
  Track& engine = recorder.add_track("engine");
  engine.record(Kind::norm, 1, 2);   // before the trace: not in it
  auto collector = Collector::start(recorder, path, R"({"command":"test"})");
  REQUIRE(collector);
  CHECK(recorder.collected());
  constexpr uint64_t kRecords = 5000;
  std::thread other([&] {
    Track& session = recorder.add_track("session 0");
    for (uint64_t i = 0; i < kRecords; ++i) session.record(Kind::sampling, i, i + 1, 0, 0, i);
  });
  for (uint64_t i = 0; i < kRecords; ++i) engine.record(Kind::matmul, i, i + 1, 0, 0, i);
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  other.join();
  const auto totals = (*collector)->stop();
  REQUIRE(totals);
  CHECK(totals->dropped == 0);
  CHECK_FALSE(recorder.collected());
  const auto trace = read_trace(path);
  INFO((trace ? "" : trace.error().message));
  REQUIRE(trace);
  CHECK(trace->complete);
  CHECK(trace->records == totals->records);
  for (const TraceTrack& track : trace->tracks) {
    if (track.name == "machine") {
      CHECK_FALSE(track.records.empty());
      continue;
    }
    REQUIRE(track.records.size() == kRecords);
    for (uint64_t i = 0; i < kRecords; ++i) REQUIRE(track.records[i].value == i);
  }
}
