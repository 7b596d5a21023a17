// SPDX-License-Identifier: Apache-2.0
// What of the Vulkan backend's times needs no device.
#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "backend/vulkan/pass_clock.hpp"
#include "catch.hpp"

using namespace sluice;
using namespace sluice::backend;
using namespace sluice::backend::vulkan;

namespace {

constexpr TickKind kNanoseconds{.valid_bits = 64, .ns = 1.0};
using Times = std::vector<std::pair<uint64_t, uint64_t>>;

// The times of a pass of these commands, awaited or not, with these ticks.
std::vector<OpTime> times_of(TickKind kind, const std::vector<bool>& commands, const std::vector<uint64_t>& ticks) {
  PassClock clock(kind, static_cast<uint32_t>(commands.size()));
  clock.begin(true);
  for (const bool awaited : commands) clock.add(awaited);
  REQUIRE(clock.ticks().size() == ticks.size());
  std::copy(ticks.begin(), ticks.end(), clock.ticks().begin());
  clock.read();
  return {clock.times().begin(), clock.times().end()};
}

// Run and wait of each.
Times parts_of(const std::vector<OpTime>& times) {
  Times parts;
  uint64_t before = times.empty() ? 0 : times.front().begin_ns;
  for (const OpTime& time : times) {
    CHECK(time.begin_ns == before);
    CHECK(time.ready_ns >= time.begin_ns);
    CHECK(time.end_ns >= time.ready_ns);
    before = time.end_ns;
    parts.emplace_back(time.run_ns(), time.wait_ns());
  }
  return parts;
}

}  // namespace

TEST_CASE("a query's number depends on the commands in front of it alone") {
  PassClock clock(kNanoseconds, 5);
  CHECK(clock.queries() == 10);
  for (int pass = 0; pass < 2; ++pass) {
    clock.begin(true);
    CHECK(clock.add(false) == 0);
    CHECK(clock.add(false) == 1);
    CHECK(clock.add(true) == 2);    // and 3
    CHECK(clock.add(true) == 4);    // and 5
    CHECK(clock.add(false) == 6);
    CHECK(clock.ticks().size() == 7);
    CHECK(clock.times().empty());
  }
}

TEST_CASE("an operation runs from the end of the one before it, or from the end of its wait") {
  const std::vector<OpTime> times = times_of(kNanoseconds, {false, false, true, false}, {1000, 1005, 1105, 1155, 1175});
  CHECK(times.front().begin_ns == 1000);
  CHECK(parts_of(times) == Times{{5, 0}, {50, 100}, {20, 0}});
  CHECK(times_of(kNanoseconds, {false}, {77}).empty());
}

TEST_CASE("a wait that ended before the operation's turn came is none, and a clock in steps gives nothing negative") {
  CHECK(parts_of(times_of(kNanoseconds, {false, false, true, true}, {32, 64, 40, 64, 64, 96})) ==
        Times{{32, 0}, {0, 0}, {32, 0}});
  // An end before the beginning: the next one starts where the clock had been.
  CHECK(parts_of(times_of(kNanoseconds, {false, false, false}, {50, 40, 70})) == Times{{0, 0}, {20, 0}});
}

TEST_CASE("steps of a clock become nanoseconds, which do not lose digits where the clock began long ago") {
  CHECK(parts_of(times_of({.valid_bits = 64, .ns = 83.0 + 1.0 / 3}, {false, true}, {3, 6, 12})) == Times{{500, 250}});
  const uint64_t epoch_ns = 1'790'000'000'123'456'789;
  const std::vector<OpTime> times = times_of(kNanoseconds, {false, false, true}, {epoch_ns, epoch_ns + 1, epoch_ns + 3,
                                                                                 epoch_ns + 7});
  CHECK(times.front().begin_ns == epoch_ns);
  CHECK(parts_of(times) == Times{{1, 0}, {4, 2}});
  // An hour in steps of 1/19.2 MHz: to the nanosecond.
  const uint64_t hour = uint64_t{3600} * 19'200'000;
  const std::vector<OpTime> two = times_of({.valid_bits = 56, .ns = 1e9 / 19.2e6}, {false, false}, {hour, 2 * hour});
  CHECK(two.front().begin_ns == uint64_t{3600} * 1'000'000'000);
  CHECK(parts_of(two) == Times{{uint64_t{3600} * 1'000'000'000, 0}});
}

TEST_CASE("bits that are not valid do not count, and a clock that wraps in a pass goes on") {
  const uint64_t bit = uint64_t{1} << 36, noise = uint64_t{0x5a5a5a5} << 36;
  const TickKind kind{.valid_bits = 36, .ns = 1.0};
  CHECK(parts_of(times_of(kind, {false, false, false}, {noise | 5, 9, noise | 20})) == Times{{4, 0}, {11, 0}});
  const std::vector<OpTime> times = times_of(kind, {false, false, true, false}, {bit - 10, bit - 4, 6, noise | 16, 36});
  CHECK(times.front().begin_ns == bit - 10);
  CHECK(parts_of(times) == Times{{6, 0}, {10, 10}, {20, 0}});
  // A wait that ended before the wrap, an operation behind it.
  CHECK(parts_of(times_of(kind, {false, false, true}, {bit - 10, 2, bit - 4, 6})) == Times{{12, 0}, {4, 0}});
}

TEST_CASE("a pass longer than there is room for has no times, and the next one has") {
  PassClock clock(kNanoseconds, 2);
  clock.begin(true);
  CHECK(clock.add(false) == 0);
  CHECK(clock.add(true) == 1);
  CHECK(clock.add(false) == PassClock::kNoQuery);
  CHECK(clock.ticks().empty());
  clock.begin(true);
  CHECK(clock.add(false) == 0);
  CHECK(clock.ticks().size() == 1);
}

TEST_CASE("a pass that is not timed has no queries and no times, and the next one that is has") {
  PassClock clock(kNanoseconds, 2);
  for (const bool timed : {true, false, true}) {
    INFO((timed ? "timed" : "not timed"));
    clock.begin(timed);
    CHECK(clock.times().empty());
    CHECK(clock.add(false) == (timed ? 0 : PassClock::kNoQuery));
    CHECK(clock.add(true) == (timed ? 1 : PassClock::kNoQuery));
    REQUIRE(clock.ticks().size() == (timed ? 3 : 0));
    if (!timed) continue;
    std::iota(clock.ticks().begin(), clock.ticks().end(), uint64_t{10});
    clock.read();
    CHECK(clock.times().size() == 1);
  }
}

TEST_CASE("without a clock there are no queries and no times") {
  for (PassClock clock : {PassClock(), PassClock({.valid_bits = 0, .ns = 1.0}, 8)}) {
    clock.begin(true);
    CHECK(clock.queries() == 0);
    CHECK(clock.add(false) == PassClock::kNoQuery);
    CHECK(clock.add(true) == PassClock::kNoQuery);
    CHECK(clock.ticks().empty());
    CHECK(clock.times().empty());
  }
}
