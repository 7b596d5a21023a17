// SPDX-License-Identifier: Apache-2.0
// Series of latencies with and without a train of spikes, from the noise of real runs.
//
// tests/golden/trace/itl-noise.txt: a recorded run a line, microseconds per token (SmolLM2-135M, resident and a part
// streamed, two cores shared with other work). A series takes the level of a stretch of a recording as it was, trend,
// steps and all, and draws the noise around it from the same recording in blocks of 16 tokens, so that whatever periods
// it had are gone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "trace/spikes.hpp"
#include "trace/statistics.hpp"
#include "trace/trains.hpp"

namespace sluice::test {

struct Recording {
  std::vector<double> level, ratio;   // latency = level * ratio
};

inline std::vector<Recording> read_recordings() {
  std::ifstream file(std::string(std::getenv("SLUICE_GOLDEN")) + "/trace/itl-noise.txt");
  std::vector<Recording> recordings;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::vector<double> itl;
    for (double us = 0; words >> us;) itl.push_back(us * 1e-6);
    Recording recording{.level = trace::running_median(itl, 65), .ratio = {}};
    for (size_t i = 0; i < itl.size(); ++i) recording.ratio.push_back(itl[i] / recording.level[i]);
    recordings.push_back(std::move(recording));
  }
  SLUICE_CHECK(!recordings.empty());
  return recordings;
}

struct Series {
  std::vector<double> itl;
  trace::Clocks clocks;
  trace::Clock clock = trace::Clock::token;   // that the train keeps
  double period = 0;                          // in its unit; 0: no train
  std::vector<size_t> injected;
};

class SeriesMaker {
 public:
  SeriesMaker(const std::vector<Recording>& recordings, uint64_t seed) : recordings_(recordings), random_(seed) {}

  // `sigmas`: height of the lowest spike in standard deviations of the series' noise (others up to twice that, one
  // series alike within 10%); 0: none. At least 10 places, each missing in one of 10 cases, jitter up to 3% of the
  // period.
  Series make(trace::Clock clock, double sigmas) {
    for (;;) {
      Series series = attempt(clock, sigmas);
      if (sigmas == 0 || series.injected.size() >= 9) return series;
    }
  }

 private:
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }

  Series attempt(trace::Clock clock, double sigmas) {
    const Recording& recording = recordings_[random_() % recordings_.size()];
    const size_t length = recording.level.size();
    const size_t n = 400 + random_() % (length - 400);
    const size_t from = random_() % (length - n + 1);
    Series series;
    series.clock = clock;
    double squares = 0;
    for (size_t i = 0; i < n;) {
      const size_t block = random_() % (length - 16);
      for (size_t k = 0; k < 16 && i < n; ++k, ++i) {
        const double level = recording.level[from + i];
        series.itl.push_back(level * recording.ratio[block + k]);
        squares += (series.itl.back() - level) * (series.itl.back() - level);
      }
    }
    const double sigma = std::sqrt(squares / static_cast<double>(n));
    const std::vector<double> bytes = bytes_per_token(n);
    if (sigmas > 0) inject(series, bytes, sigmas * uniform(1, 2) * sigma);
    double time = 0, read = 0;
    for (size_t i = 0; i < n; ++i) {
      series.clocks.at[0].push_back(static_cast<double>(i));
      series.clocks.at[1].push_back(time);
      series.clocks.at[2].push_back(read);
      time += series.itl[i];
      read += bytes[i];
    }
    return series;
  }

  // Of a process whose share of what is read changes: rows of other sessions, prompts between answers.
  std::vector<double> bytes_per_token(size_t n) {
    std::vector<double> bytes;
    while (bytes.size() < n) {
      const double level = 1e8 * uniform(0.5, 1.5);
      const size_t end = std::min(n, bytes.size() + 30 + random_() % 90);
      while (bytes.size() < end) bytes.push_back(level * uniform(0.97, 1.03));
    }
    return bytes;
  }

  void inject(Series& series, const std::vector<double>& bytes, double height) {
    const size_t n = series.itl.size();
    double whole = 0;   // of the series on its clock
    for (size_t i = 0; i < n; ++i) whole += step(series, bytes, i);
    const double tokens = std::exp(uniform(std::log(4.0), std::log(static_cast<double>(n) / 11)));
    series.period = tokens * whole / static_cast<double>(n);
    if (series.clock == trace::Clock::token) series.period = std::round(series.period);
    if (series.clock == trace::Clock::time)
      series.period += 1.05 * height;  // so many tokens besides what a spike takes
    const double jitter = uniform(0, 0.03) * series.period;
    double next = uniform(0, 1) * series.period, place = next, at = 0;
    for (size_t i = 0; i < n; ++i) {
      const double end = at + step(series, bytes, i);
      bool hit = false;
      while (place < end) {
        hit = hit || uniform(0, 1) >= 0.1;
        next += series.period;
        place = std::max(end, next + std::normal_distribution<double>(0, 1)(random_) * jitter);
      }
      if (hit) {
        series.itl[i] += height * uniform(1, 1.1);
        series.injected.push_back(i);
      }
      at = series.clock == trace::Clock::time ? at + series.itl[i] : end;
    }
  }

  static double step(const Series& series, const std::vector<double>& bytes, size_t i) {
    switch (series.clock) {
      case trace::Clock::token: return 1;
      case trace::Clock::time: return series.itl[i];
      case trace::Clock::bytes: return bytes[i];
    }
    return 1;
  }

  const std::vector<Recording>& recordings_;
  std::mt19937_64 random_;
};

// What a detector made of many series.
struct Tally {
  uint64_t injected_series = 0, found_series = 0;            // recall
  uint64_t trains = 0, right_trains = 0;                     // precision
  uint64_t right_period = 0, right_clock = 0, clock_possible = 0;
  uint64_t injected_spikes = 0, found_spikes = 0, members = 0, right_members = 0;
  uint64_t clean_series = 0, false_alarms = 0;

  static double share(uint64_t part, uint64_t whole) {
    return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
  }
  double recall() const { return share(found_series, injected_series); }
  double precision() const { return share(right_trains, trains); }
  double spike_recall() const { return share(found_spikes, injected_spikes); }
  double member_precision() const { return share(right_members, members); }
  double false_alarm_rate() const { return share(false_alarms, clean_series); }
  double period_rate() const { return share(right_period, found_series); }
  double clock_rate() const { return share(right_clock, found_series); }

  // `trains` and `spikes` are a detector's answer. A train is right if half of the injected spikes are its members, and
  // half of its members injected.
  void add(const Series& series, const std::vector<trace::Train>& found, const std::vector<size_t>& spikes) {
    if (series.period == 0) {
      ++clean_series;
      false_alarms += found.empty() ? 0 : 1;
      return;
    }
    ++injected_series;
    injected_spikes += series.injected.size();
    for (const size_t i : series.injected) found_spikes += std::binary_search(spikes.begin(), spikes.end(), i) ? 1 : 0;
    bool matched = false;
    for (const trace::Train& train : found) {
      ++trains;
      size_t common = 0;
      for (const size_t i : train.members)
        common += std::binary_search(series.injected.begin(), series.injected.end(), i) ? 1 : 0;
      members += train.members.size();
      right_members += common;
      if (matched || 2 * common < series.injected.size() || 2 * common < train.members.size()) continue;
      matched = true;
      ++right_trains;
      ++found_series;
      right_clock += train.clock == series.clock ? 1 : 0;
      clock_possible +=
          train.clock == series.clock || std::count(train.also.begin(), train.also.end(), series.clock) > 0 ? 1 : 0;
      // On a wrong clock the period is compared by the mean rate of the two.
      const auto span = [&](trace::Clock c) { return series.clocks[c].back() - series.clocks[c].front(); };
      const double period = train.period * span(series.clock) / span(train.clock);
      right_period += std::abs(period / series.period - 1) <= 0.02 ? 1 : 0;
    }
  }
};

}  // namespace sluice::test
