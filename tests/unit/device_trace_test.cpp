// SPDX-License-Identifier: Apache-2.0
// What a device's own clock says in a trace: where its stamps lie on the host's clock, and whose a moment is then.
#include <random>

#include "catch.hpp"
#include "exec/device_clock.hpp"
#include "trace/tokens.hpp"

using namespace sluice;
using namespace sluice::trace;
using exec::DeviceClock;

namespace {

constexpr uint64_t kUs = 1000, kMs = 1000 * kUs;

// Passes 10 ms apart on a device whose clock is `offset` behind the host's and gains `drift`; each starts and is seen
// to be done up to 40 us late. The worst distance between a stamp's place and where it belongs, of passes from the
// tenth on, and the worst stated error.
struct Worst {
  int64_t off_ns = 0;
  uint64_t stated_ns = 0;
  bool within = true;
};
Worst follow(int64_t offset, double drift, uint32_t passes) {
  DeviceClock clock;
  std::mt19937 random(7);
  std::uniform_int_distribution<int64_t> late(2000, 40'000);
  Worst worst;
  for (uint32_t i = 0; i < passes; ++i) {
    const auto begun = static_cast<int64_t>(1'000'000'000 + i * 10 * kMs);
    const int64_t first = begun + late(random), last = first + 9'000'000;
    const auto device = [&](int64_t host) {
      return static_cast<uint64_t>(host - offset + static_cast<int64_t>(drift * static_cast<double>(host)));
    };
    clock.bound(begun, last + late(random), device(first), device(last));
    const int64_t off = std::abs(clock.host_ns(device(last)) - last);
    worst.within = worst.within && static_cast<uint64_t>(off) <= clock.error_ns() + 1;
    if (i >= 10) worst = {std::max(worst.off_ns, off), std::max(worst.stated_ns, clock.error_ns()), worst.within};
  }
  return worst;
}

struct Made {
  TraceTrack engine{.name = "engine"}, device{.name = "gpu"}, session{.name = "session 0"};

  static void add(TraceTrack& track, Kind kind, uint64_t begin, uint64_t end, uint64_t value = 0, uint32_t bytes = 0,
                  uint16_t layer = Record::kNoLayer) {
    track.records.push_back({.begin = begin, .end = end, .value = value, .bytes = bytes, .layer = layer, .kind = kind});
  }
  Tokens tokens(bool with_device = true) const {
    Trace trace;
    trace.path = "made";
    trace.tracks = {engine, session};
    if (with_device) trace.tracks.push_back(device);
    Result<Tokens> tokens = tokens_of(trace);
    REQUIRE(tokens);
    return std::move(*tokens);
  }
};

// A token of 10 ms: the host submits for 1 ms and waits from then on, captures a graph meanwhile and for a while behind
// the device's last work; the device waits for weights, works, and its end is 1 ms before the host's.
Made one_token() {
  Made made;
  using enum Kind;
  Made::add(made.engine, embed, 0, kMs / 2);
  Made::add(made.engine, matmul, kMs / 2, kMs, 0, 0, 0);
  Made::add(made.engine, prepare, 8 * kMs, 9 * kMs + kMs / 2);
  Made::add(made.engine, finish, kMs, 10 * kMs);
  Made::add(made.engine, pass, 0, 10 * kMs, 5, 1);
  Made::add(made.device, norm, kMs, 2 * kMs, 0, 0, 0);
  Made::add(made.device, copy_wait, 2 * kMs, 5 * kMs, 0, 0, 0);
  Made::add(made.device, matmul, 5 * kMs, 9 * kMs, 0, 0, 0);
  Made::add(made.device, counter, 10 * kMs, 10 * kMs, 700, 0, static_cast<uint16_t>(Counter::device_clock_error_ns));
  Made::add(made.session, run_model, 0, 10 * kMs);
  Made::add(made.session, token, 0, 10 * kMs, 6, 1);
  return made;
}

double ms(const Token& token, Part part) { return token[part] * 1e3; }

}  // namespace

TEST_CASE("a device's stamps are placed within the error that is stated, whatever its offset and drift") {
  for (const int64_t offset : {int64_t{0}, int64_t{-1'700'000'000'000'000'000}, int64_t{123'456'789}}) {
    for (const double drift : {0.0, 50e-6, -150e-6}) {
      const Worst worst = follow(offset, drift, 400);
      CAPTURE(offset, drift, worst.off_ns, worst.stated_ns);
      CHECK(worst.within);
      CHECK(worst.stated_ns <= 25 * kUs);
    }
  }
}

TEST_CASE("bounds narrow with the passes, and a clock that jumped is followed") {
  DeviceClock clock;
  clock.bound(1000, 2000, 100, 900);             // between 900 and 1100
  CHECK(clock.error_ns() == 100);
  clock.bound(3000, 4000, 2010, 2990);           // ... 990 and 1010
  CHECK(clock.error_ns() == 10);
  CHECK(clock.host_ns(5000) == 6000);
  clock.bound(5000, 6000, 100, 1000);            // 4900 and 5000: another clock
  CHECK(clock.error_ns() == 50);
  CHECK(clock.host_ns(100) == 5050);
}

TEST_CASE("a moment belongs to what the device did, and to the host where that did nothing") {
  const Tokens tokens = one_token().tokens();
  REQUIRE(tokens.all.size() == 1);
  const Token& token = tokens.all.front();
  CHECK(ms(token, Part::embed) == Approx(0.5));
  CHECK(ms(token, Part::norm) == Approx(1));
  CHECK(ms(token, Part::copy_wait) == Approx(3));
  CHECK(ms(token, Part::matmul) == Approx(4 + 0.5));   // the half before the device began is the host's
  CHECK(ms(token, Part::finish) == Approx(1));
  CHECK(token.prepared == Approx(0.5e-3));             // what the device's work does not hide
  CHECK(token.accounted() == Approx(1));
}

TEST_CASE("without a device's clock the host's spans are all there is") {
  const Tokens tokens = one_token().tokens(false);
  const Token& token = tokens.all.front();
  CHECK(ms(token, Part::matmul) == Approx(0.5));
  CHECK(ms(token, Part::finish) == Approx(9));
  CHECK(token.prepared == Approx(1.5e-3));
  CHECK(token.accounted() == Approx(1));
}

TEST_CASE("stamps that lie outside of their pass by the clocks' error add nothing to it") {
  Made made = one_token();
  made.device.records.front().begin = 0;
  made.device.records[2].end = 10 * kMs + 700;
  const Tokens tokens = made.tokens();
  const Token& token = tokens.all.front();
  CHECK(ms(token, Part::finish) == Approx(0).margin(1e-9));
  CHECK(token.total() == Approx(10e-3));
  CHECK(token.accounted() == Approx(1));
}
