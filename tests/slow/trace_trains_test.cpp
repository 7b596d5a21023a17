// SPDX-License-Identifier: Apache-2.0
// Detection over seeded series: recall, precision, false alarms, period and clock, with the bounds that docs/tracing.md
// promises. SLUICE_SERIES sets the number of series of each kind (default 1000).
#include <cstdio>
#include <functional>

#include "catch.hpp"
#include "trace_series.hpp"

using namespace sluice;
using namespace sluice::test;
using namespace sluice::trace;

namespace {

constexpr uint64_t kSeed = 20251125;

using Detector = std::function<std::vector<Train>(const Series&, std::vector<size_t>& spikes)>;

std::vector<Train> our_detector(const Series& series, std::vector<size_t>& spikes) {
  const Baseline baseline = baseline_of(series.itl);
  spikes = spikes_of(baseline);
  return trains_of(baseline.score, spikes, series.clocks);
}

// Finds a spike in every token and a train in every series.
std::vector<Train> credulous_detector(const Series& series, std::vector<size_t>& spikes) {
  for (size_t i = 0; i < series.itl.size(); ++i) spikes.push_back(i);
  Train train;
  train.period = 2;
  train.members = spikes;
  return {train};
}

Tally tally_of(const Detector& detector, uint64_t series_count, double sigmas, uint64_t seed) {
  static const std::vector<Recording> recordings = read_recordings();
  SeriesMaker maker(recordings, seed);
  Tally tally;
  for (uint64_t i = 0; i < series_count; ++i) {
    const Series series = maker.make(static_cast<Clock>(i % kClocks), sigmas);
    std::vector<size_t> spikes;
    const std::vector<Train> trains = detector(series, spikes);
    tally.add(series, trains, spikes);
  }
  return tally;
}

void print(const char* name, const Tally& tally) {
  std::printf("%-12s recall %.4f  precision %.4f  period %.4f  clock %.4f (among the possible ones %.4f)  "
              "spikes %.4f  members %.4f  false alarms %.4f (of %llu)\n",
              name, tally.recall(), tally.precision(), tally.period_rate(), tally.clock_rate(),
              Tally::share(tally.clock_possible, tally.found_series), tally.spike_recall(), tally.member_precision(),
              tally.false_alarm_rate(), static_cast<unsigned long long>(tally.clean_series));
  std::fflush(stdout);
}

uint64_t series_count() {
  const char* text = std::getenv("SLUICE_SERIES");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 1000;
}

bool within_bounds(const Tally& tally) {
  return tally.recall() >= 0.95 && tally.precision() >= 0.98 && tally.member_precision() >= 0.98 &&
         tally.false_alarm_rate() <= 0.01 && tally.period_rate() >= 0.95 && tally.clock_rate() >= 0.98;
}

Tally with_clean(Tally tally, const Tally& clean) {
  tally.clean_series = clean.clean_series;
  tally.false_alarms = clean.false_alarms;
  return tally;
}

}  // namespace

TEST_CASE("spike trains of 8 sigma and more are found with their period and clock, and none where there are none") {
  std::printf("seed %llu, %llu series of each kind\n", static_cast<unsigned long long>(kSeed),
              static_cast<unsigned long long>(series_count()));
  const Tally clean = tally_of(our_detector, series_count(), 0, kSeed);
  const Tally tally = with_clean(tally_of(our_detector, series_count(), 8, kSeed + 1), clean);
  print("8 sigma", tally);
  CHECK(tally.recall() >= 0.95);
  CHECK(tally.precision() >= 0.98);
  CHECK(tally.member_precision() >= 0.98);
  CHECK(tally.false_alarm_rate() <= 0.01);
  CHECK(tally.period_rate() >= 0.95);
  CHECK(tally.clock_rate() >= 0.98);
  CHECK(within_bounds(tally));
}

TEST_CASE("a detector that calls everything a spike fails the same bounds") {
  const uint64_t few = std::min<uint64_t>(series_count(), 100);
  const Tally tally =
      with_clean(tally_of(credulous_detector, few, 8, kSeed + 1), tally_of(credulous_detector, few, 0, kSeed));
  print("credulous", tally);
  CHECK_FALSE(within_bounds(tally));
  CHECK(tally.false_alarm_rate() == 1);
  CHECK(tally.member_precision() < 0.5);
}

TEST_CASE("weaker trains are found less often, and not more is claimed than found", "[curve]") {
  for (const double sigmas : {4.0, 5.0, 6.0, 7.0}) {
    const Tally tally = tally_of(our_detector, series_count() / 4, sigmas, kSeed + static_cast<uint64_t>(10 * sigmas));
    print((std::to_string(static_cast<int>(sigmas)) + " sigma").c_str(), tally);
    CHECK(tally.precision() >= 0.9);
  }
}
