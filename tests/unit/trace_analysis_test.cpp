// SPDX-License-Identifier: Apache-2.0
// Baseline, spikes, steps, trains and causes, each on series made for it. How well they do on noise: tests/slow.
#include <functional>
#include <random>

#include "catch.hpp"
#include "trace/causes.hpp"
#include "trace/injection.hpp"
#include "trace/spikes.hpp"
#include "trace/statistics.hpp"
#include "trace/trains.hpp"

using namespace sluice;
using namespace sluice::trace;

namespace {

std::vector<double> noise(size_t n, double level, double sigma, uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(level, sigma);
  std::vector<double> values(n);
  for (double& value : values) value = normal(random);
  return values;
}

Clocks clocks_of(const std::vector<double>& itl) {
  Clocks clocks;
  double time = 0;
  for (size_t i = 0; i < itl.size(); ++i) {
    clocks.at[0].push_back(static_cast<double>(i));
    clocks.at[1].push_back(time);
    time += itl[i];
  }
  return clocks;
}

std::vector<Train> trains_in(const std::vector<double>& itl, const Clocks& clocks) {
  const Baseline baseline = baseline_of(itl);
  return trains_of(baseline.score, spikes_of(baseline), clocks);
}

void set(Token& token, Counter counter, double value) { token.counters[static_cast<size_t>(counter)] = value; }

// 200 tokens of 10 ms, all matmul; every 16th has `ms` more of `part`.
struct Run {
  std::vector<Token> tokens;
  std::vector<const Token*> borrowed;
  std::vector<size_t> members;

  Run(Part part, double ms, const std::function<void(Token&)>& also = {}) : tokens(200) {
    double at = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      Token& token = tokens[i];
      token.decoded = true;
      token.prompt_tokens = 1;
      token.seconds[static_cast<size_t>(Part::matmul)] = 0.010;
      set(token, Counter::thread_cpu_ns, 5e6);   // a busy machine: held up as long as it computes
      set(token, Counter::run_delay_ns, 5e6);
      if (i % 16 == 5) {
        token.seconds[static_cast<size_t>(part)] += ms * 1e-3;
        if (also) also(token);
        members.push_back(i);
      }
      token.begin = at;
      for (const double seconds : token.seconds) at += seconds;
      token.end = at;
      token.covered = token.total();
    }
    for (const Token& token : tokens) borrowed.push_back(&token);
  }
  Finding explained() const { return Attribution(borrowed).explain(members); }
};
}  // namespace

TEST_CASE("percentiles, medians and running medians are those of the sorted values") {
  const std::vector<double> values = {5, 1, 4, 2, 3};
  CHECK(median(values) == 3);
  CHECK(median(std::vector<double>{4, 1, 3, 2}) == 2.5);
  CHECK(percentile(values, 0.5) == 3);
  CHECK(percentile(values, 0.9) == 5);
  CHECK(percentile(values, 1) == 5);
  CHECK(percentile({}, 0.5) == 0);
  CHECK(running_median(values, 3) == std::vector<double>{3, 4, 2, 3, 2.5});
  const std::vector<double> wide = noise(2000, 0, 1, 7);
  CHECK(robust_deviation(wide) == Approx(1).margin(0.08));
  const std::vector<double> medians = running_median(wide, 65);
  for (const size_t i : {size_t{100}, size_t{1000}, size_t{1967}}) {
    CHECK(medians[i] == median(std::span(wide).subspan(i - 32, 65)));
  }
}

TEST_CASE("a spike is found above its neighbourhood and a step is none") {
  std::vector<double> itl = noise(400, 0.010, 0.0002);
  for (size_t i = 200; i < 400; ++i) itl[i] += 0.005;
  itl[50] += 0.004;
  itl[51] += 0.002;
  itl[300] += 0.004;
  CHECK(spikes_of(baseline_of(itl)) == std::vector<size_t>{50, 300});
  const std::vector<Step> steps = steps_of(itl);
  REQUIRE(steps.size() == 1);
  CHECK(steps[0].index >= 195);
  CHECK(steps[0].index <= 205);
  CHECK(steps[0].before == Approx(0.010).epsilon(0.02));
  CHECK(steps[0].after == Approx(0.015).epsilon(0.02));
}

TEST_CASE("neither noise nor a slow trend has spikes, steps or trains") {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    std::vector<double> itl = noise(1000, 0.010, 0.0005, seed);
    for (size_t i = 0; i < itl.size(); ++i) itl[i] += 0.00001 * static_cast<double>(i);
    CHECK(spikes_of(baseline_of(itl)).size() <= 1);
    CHECK(steps_of(itl).empty());
    CHECK(trains_in(itl, clocks_of(itl)).empty());
  }
}

TEST_CASE("values that are all alike and series too short for a window are quiet") {
  const std::vector<double> same(100, 0.01), few = {0.01, 0.5}, none;
  CHECK(spikes_of(baseline_of(same)).empty());
  CHECK(trains_in(same, clocks_of(same)).empty());
  CHECK(steps_of(few).empty());
  CHECK(trains_in(few, clocks_of(few)).empty());
  CHECK(trains_in(none, clocks_of(none)).empty());
}

TEST_CASE("a train every 16 tokens has that period, that clock and those members") {
  std::vector<double> itl = noise(500, 0.010, 0.0003);
  std::vector<size_t> places;
  for (size_t i = 7; i < itl.size(); i += 16) itl[i] += 0.006, places.push_back(i);
  const std::vector<Train> trains = trains_in(itl, clocks_of(itl));
  REQUIRE(trains.size() == 1);
  CHECK(trains[0].clock == Clock::token);
  CHECK(trains[0].period == Approx(16).epsilon(1e-3));
  CHECK(trains[0].phase == Approx(7).margin(0.1));
  CHECK(trains[0].members == places);
  CHECK(trains[0].p_value < 1e-3);
}

TEST_CASE("a timer's train is told from one that counts tokens where the tokens become slower") {
  std::vector<double> itl = noise(800, 0.010, 0.0003);
  for (size_t i = 0; i < itl.size(); ++i) itl[i] += 0.008 * static_cast<double>(i) / 800;
  double time = 0, next = 0.1;
  for (double& value : itl) {
    if (time + value > next) value += 0.008, next += 0.25;
    time += value;
  }
  const std::vector<Train> trains = trains_in(itl, clocks_of(itl));
  REQUIRE(trains.size() == 1);
  CHECK(trains[0].clock == Clock::time);
  CHECK(trains[0].period == Approx(0.25).epsilon(0.01));
}

TEST_CASE("two trains at once are found one after the other") {
  std::vector<double> itl = noise(1000, 0.010, 0.0003);
  for (size_t i = 3; i < itl.size(); i += 25) itl[i] += 0.010;
  for (size_t i = 10; i < itl.size(); i += 62) itl[i] += 0.004;
  std::vector<Train> trains = trains_in(itl, clocks_of(itl));
  REQUIRE(trains.size() == 2);
  if (trains[0].period > trains[1].period) std::swap(trains[0], trains[1]);
  CHECK(trains[0].period == Approx(25).epsilon(0.01));
  CHECK(trains[1].period == Approx(62).epsilon(0.01));
}

TEST_CASE("each rule names its cause from the part and the counter that it needs") {
  const auto cause = [](Part part, const std::function<void(Token&)>& also = {}) {
    const Finding finding = Run(part, 30, also).explained();
    CHECK((finding.grade == Grade::unknown) == (finding.cause == Cause::unknown));
    CHECK_FALSE(finding.evidence.empty());
    CHECK(finding.excess_seconds == Approx(13 * 0.030).epsilon(0.1));
    return finding.cause;
  };
  CHECK(cause(Part::callback) == Cause::consumer);
  CHECK(cause(Part::turn_wait) == Cause::interference);
  CHECK(cause(Part::matmul, [](Token& t) { t.prompt_tokens = 64; }) == Cause::interference);
  CHECK(cause(Part::disk_wait) == Cause::disk_tail);
  CHECK(cause(Part::disk_wait, [](Token& t) { set(t, Counter::disk_read_sectors, 40000); }) == Cause::competing_reads);
  CHECK(cause(Part::copy_wait) == Cause::bus);
  CHECK(cause(Part::matmul) == Cause::compute);
  CHECK(cause(Part::matmul, [](Token& t) { set(t, Counter::major_faults, 20); }) == Cause::page_faults);
  CHECK(cause(Part::matmul, [](Token& t) { set(t, Counter::run_delay_ns, 25e6); }) == Cause::scheduling);
  CHECK(cause(Part::matmul, [](Token& t) { set(t, Counter::psi_cpu_us, 25e3); }) == Cause::scheduling);
  CHECK(cause(Part::callback, [](Token& t) { set(t, Counter::run_delay_ns, 25e6); }) == Cause::scheduling);
  CHECK(cause(Part::finish, [](Token& t) { set(t, Counter::gpu_throttle, 0x40); }) == Cause::gpu_clock);
  CHECK(cause(Part::finish, [](Token& t) { set(t, Counter::gpu_throttle, 0x01); }) == Cause::compute);   // idle
  CHECK(cause(Part::matmul, [](Token& t) {
    set(t, Counter::run_delay_ns, 21e6);
    set(t, Counter::thread_cpu_ns, 19e6);
  }) == Cause::compute);
  CHECK(cause(Part::attention, [](Token& t) { set(t, Counter::minor_faults, 40000); }) == Cause::allocation);
}

TEST_CASE("a counter that was read for the first time in ten tokens is held against ten tokens") {
  Run run(Part::matmul, 30, [](Token& t) { set(t, Counter::run_delay_ns, 25e6); });
  for (const size_t i : run.members) {
    run.tokens[i].covered += 0.100;
    set(run.tokens[i], Counter::run_delay_ns, 75e6);   // of which ten ordinary tokens have 50
  }
  CHECK(run.explained().cause == Cause::scheduling);
  for (const size_t i : run.members) set(run.tokens[i], Counter::run_delay_ns, 55e6);
  CHECK(run.explained().cause == Cause::compute);
}

TEST_CASE("what no rule covers is unknown, and so is a mixture without a main part") {
  for (const Part part : {Part::sampling, Part::detokenize, Part::evidence, Part::gap}) {
    CHECK(Run(part, 30).explained().cause == Cause::unknown);
  }
  const Finding mixed =
      Run(Part::disk_wait, 15, [](Token& t) { t.seconds[static_cast<size_t>(Part::callback)] = 0.015; }).explained();
  CHECK(mixed.cause == Cause::unknown);
  CHECK(mixed.grade == Grade::unknown);
}

TEST_CASE("an injection is read from its text, and what is not understood is named") {
  const auto injection = parse_injection("read:period=24,ms=12.5,jitter=0.03,clock=time");
  REQUIRE(injection);
  CHECK(injection->fault == Fault::read);
  CHECK((injection->period == 24 && injection->ms == 12.5 && injection->jitter == 0.03));
  CHECK(injection->clock == InjectionClock::time);
  CHECK(parse_injection("evict")->period == 16);
  for (const char* text : {"", "reads", "read:period=0", "read:period=x", "read:ms=-1", "read:jitter=0.5",
                           "read:clock=moon", "read:depth=3", "read:period=nan", "read:ms=1e300"}) {
    const auto refused = parse_injection(text);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == ErrorCode::usage);
    CHECK(refused.error().message.find("--inject") != std::string::npos);
  }
}
