// SPDX-License-Identifier: Apache-2.0
// Baseline, spikes, steps, trains and causes, each on series made for it. How well they do on noise: tests/slow.
#include <algorithm>
#include <functional>
#include <initializer_list>
#include <random>

#include <nlohmann/json.hpp>

#include "catch.hpp"
#include "trace/causes.hpp"
#include "trace/injection.hpp"
#include "trace/report.hpp"
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

Counted everything() {
  Counted counted;
  counted.fill(true);
  for (const Counter gpu : {Counter::gpu_clock_mhz, Counter::gpu_throttle, Counter::device_clock_error_ns})
    counted[static_cast<size_t>(gpu)] = false;
  return counted;
}

// 200 tokens of 10 ms, all matmul; every 16th has `ms` more of `part`. All counters of a CPU's run are read.
struct Run {
  std::vector<Token> tokens;
  std::vector<const Token*> borrowed;
  std::vector<size_t> members;
  Counted counted = everything();

  Run(Part part, double ms, const std::function<void(Token&)>& also = {}, size_t n = 200, size_t every = 16)
      : tokens(n) {
    double at = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      Token& token = tokens[i];
      token.decoded = true;
      token.prompt_tokens = 1;
      token.seconds[static_cast<size_t>(Part::matmul)] = 0.010;
      set(token, Counter::thread_cpu_ns, 5e6);   // a busy machine: held up as long as it computes
      set(token, Counter::process_cpu_ns, 5e6);
      set(token, Counter::run_delay_ns, 5e6);
      set(token, Counter::resident_bytes, 1e9);
      if (i % every == 5) {
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
  // Readings of the machine, five a second: growth in those with a slow token, and in the others.
  void count_machine(Counter counter, double with, double without) {
    std::vector<bool> slow(1 + static_cast<size_t>(tokens.back().end / 0.2));
    const auto reading = [&](size_t i) { return static_cast<size_t>(tokens[i].end / 0.2); };
    for (const size_t i : members) slow[reading(i)] = true;
    for (size_t i = 0; i < tokens.size(); ++i) {
      set(tokens[i], counter, slow[reading(i)] ? with : without);
      set(tokens[i], Counter::busy_ms, 390 + static_cast<double>(reading(i) % 2));
    }
  }
  Run& without(std::initializer_list<Counter> missing) {
    for (const Counter counter : missing) {
      counted[static_cast<size_t>(counter)] = false;
      for (Token& token : tokens) set(token, counter, 0);
    }
    return *this;
  }
  Finding explained() const { return Attribution(borrowed, counted).explain(members); }
};

void compute(Token& token) {   // 30 ms
  set(token, Counter::thread_cpu_ns, 35e6);
  set(token, Counter::process_cpu_ns, 35e6);
}

bool says(const Finding& finding, const std::string& words) {
  return finding.evidence.find(words) != std::string::npos;
}
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
  CHECK(cause(Part::matmul, compute) == Cause::compute);
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
  CHECK(cause(Part::matmul, [](Token& t) { t.prepared = 0.025; }) == Cause::preparation);
  CHECK(cause(Part::matmul, [](Token& t) { set(t, Counter::psi_memory_us, 20e3); }) == Cause::page_faults);
}

TEST_CASE("every cause has a name and a text of its own") {
  for (size_t a = 0; a < static_cast<size_t>(Cause::count); ++a) {
    REQUIRE(name_of(static_cast<Cause>(a)) != nullptr);
    for (size_t b = 0; b < a; ++b) {
      CHECK(std::string(name_of(static_cast<Cause>(a))) != name_of(static_cast<Cause>(b)));
      CHECK(std::string(text_of(static_cast<Cause>(a))) != text_of(static_cast<Cause>(b)));
    }
  }
}

TEST_CASE("what others read is not denied where the drive has no counters") {
  const Finding counted = Run(Part::disk_wait, 30).explained();
  CHECK(counted.cause == Cause::disk_tail);
  CHECK(says(counted, "nobody else read"));
  // An overlay, btrfs or NFS: the drive answered late, whoever was at it.
  const Finding blind = Run(Part::disk_wait, 30, [](Token& t) { set(t, Counter::stream_bytes, 9e6); })
                            .without({Counter::disk_read_sectors})
                            .explained();
  CHECK(blind.cause == Cause::disk_tail);
  CHECK_FALSE(says(blind, "nobody"));
  CHECK(says(blind, "not counted"));
  // Others did read, but so little that the drive, at 100 MB a second, was not busy with it for long.
  Run little(Part::disk_wait, 30, [](Token& t) { set(t, Counter::disk_read_sectors, 2600); });
  for (Token& token : little.tokens) {
    set(token, Counter::stream_bytes, 1e6);
    set(token, Counter::disk_read_sectors, token[Counter::disk_read_sectors] + 1e6 / 512);
  }
  const Finding finding = little.explained();
  CHECK(finding.cause == Cause::disk_tail);
  CHECK_FALSE(says(finding, "nobody"));
}

TEST_CASE("a compute stall names the counters that stood still, and those that nobody read") {
  CHECK(says(Run(Part::matmul, 30, compute).explained(), "faults, drive and scheduler did not move"));
  const Finding blind = Run(Part::matmul, 30, compute)
                            .without({Counter::disk_read_sectors, Counter::psi_cpu_us, Counter::run_delay_ns})
                            .explained();
  CHECK(blind.cause == Cause::compute);   // it computed: that is counted
  CHECK(says(blind, "faults did not move; not counted: the drive and waits for a core"));
  const Finding own = Run(Part::matmul, 30, compute).without({Counter::psi_cpu_us}).explained();
  CHECK(says(own, "this thread's waits for a core did not move"));
  Run small(Part::matmul, 30, compute);
  for (const size_t i : small.members) small.tokens[i].covered = 0;   // not read behind them
  CHECK(says(small.explained(), "not counted: waits for a core"));
}

TEST_CASE("a huge page is one fault and megabytes that become resident, where they explain the time") {
  const auto explained = [](double ms, double faults, double bytes) {
    Run run(Part::attention, ms, [&](Token& t) {
      set(t, Counter::minor_faults, faults);
      set(t, Counter::thread_cpu_ns, 5e6 + ms * 1e6);
    });
    double resident = 1e9;
    for (size_t i = 0, k = 0; i < run.tokens.size(); ++i) {
      if (k < run.members.size() && run.members[k] == i) resident += bytes, ++k;
      set(run.tokens[i], Counter::resident_bytes, resident);
    }
    return run.explained();
  };
  constexpr double kHuge = 2 << 20;
  CHECK(explained(0.4, 1, kHuge).cause == Cause::allocation);
  const Finding grown = explained(5, 1, kHuge);   // a KV cache that reaches its next page
  CHECK(grown.cause == Cause::allocation);
  CHECK(says(grown, "2.0 MiB became resident each time, by 1.0 faults"));
  const Finding stall = explained(30, 1, kHuge);
  CHECK(stall.cause == Cause::compute);
  CHECK(says(stall, "drive and scheduler did not move"));
  CHECK_FALSE(says(stall, "faults"));
  CHECK(explained(0.4, 0, kHuge).cause == Cause::compute);   // somebody else's
  CHECK(explained(0.4, 1, 4096).cause == Cause::compute);
}

TEST_CASE("operations in which the process did not compute are no compute stall, unless a device computed") {
  const Finding stopped = Run(Part::matmul, 30).explained();
  CHECK(stopped.cause == Cause::unknown);
  CHECK(says(stopped, "held it up"));
  const auto ran = [](double ms) { return [ms](Token& t) { set(t, Counter::thread_cpu_ns, 5e6 + ms * 1e6); }; };
  CHECK(Run(Part::matmul, 30, ran(12)).explained().cause == Cause::unknown);
  CHECK(Run(Part::matmul, 30, ran(16)).explained().cause == Cause::compute);
  CHECK(Run(Part::matmul, 30, [](Token& t) {   // ... and waited for a core, less than half of it
    set(t, Counter::thread_cpu_ns, 17e6);
    set(t, Counter::run_delay_ns, 19e6);
  }).explained().cause == Cause::compute);
  CHECK(Run(Part::finish, 30).explained().cause == Cause::compute);
  // ... which the thread waited for, or it waited for a core: without the scheduler's counters nobody knows.
  const Finding blind = Run(Part::finish, 30).without({Counter::run_delay_ns, Counter::psi_cpu_us}).explained();
  CHECK(blind.cause == Cause::unknown);
  CHECK(says(blind, "not counted"));
  Run device(Part::matmul, 30);
  device.counted[static_cast<size_t>(Counter::device_clock_error_ns)] = true;
  CHECK(device.explained().cause == Cause::compute);
}

TEST_CASE("a slow consumer is named without the scheduler's counters, and the evidence says that they are missing") {
  CHECK_FALSE(says(Run(Part::callback, 30).explained(), "not counted"));
  const Finding blind = Run(Part::callback, 30).without({Counter::run_delay_ns}).explained();
  CHECK(blind.cause == Cause::consumer);
  CHECK(says(blind, "not counted"));
}

TEST_CASE("tasks that stalled for memory are page faults or reclaim, and the evidence says how long and what for") {
  const auto stalled = [](double us) { return [us](Token& t) { compute(t), set(t, Counter::psi_memory_us, us); }; };
  const Finding finding = Run(Part::matmul, 30, stalled(27e3)).explained();
  CHECK(finding.cause == Cause::page_faults);
  CHECK(says(finding, "tasks stalled for memory 90% of the excess longer"));
  CHECK(Run(Part::disk_wait, 30, stalled(27e3)).explained().cause == Cause::page_faults);
  CHECK(Run(Part::matmul, 30, stalled(6e3)).explained().cause == Cause::compute);
  // One lump of another task's is no longer than the token that it fell on.
  Run lump(Part::matmul, 30, compute);
  set(lump.tokens[lump.members[3]], Counter::psi_memory_us, 500e3);
  CHECK(lump.explained().cause == Cause::compute);
  // Not counted: nothing is known of it.
  CHECK(Run(Part::matmul, 30, stalled(27e3)).without({Counter::psi_memory_us}).explained().cause == Cause::compute);
}

TEST_CASE("pressure on memory that was read for the first time in five tokens is held against five tokens") {
  const auto cause = [](double us) {   // a machine that is short of memory a third of the time
    Run run(Part::matmul, 30, compute);
    for (size_t i = 0; i < run.tokens.size(); ++i) {
      if (i % 16 < 5) set(run.tokens[i], Counter::resident_bytes, 0);   // not read
      else set(run.tokens[i], Counter::psi_memory_us, i % 16 == 5 ? us : 3333);
    }
    return run.explained().cause;
  };
  CHECK(cause(9 * 3333 + 3e3) == Cause::compute);   // a third of 90 ms, and a little
  CHECK(cause(9 * 3333 + 20e3) == Cause::page_faults);
}

TEST_CASE("without the kernel's count of stalls, pages swapped in or reclaimed must be enough to explain them") {
  const auto counted = [](Counter counter, double with, double without) {
    Run run(Part::matmul, 30, compute, 800, 64);
    run.without({Counter::psi_memory_us}).count_machine(counter, with, without);
    return run.explained();
  };
  const Finding swapped = counted(Counter::swapped_pages, 600, 10);
  CHECK(swapped.cause == Cause::page_faults);
  CHECK(says(swapped, "swapped in"));
  CHECK(counted(Counter::swapped_pages, 100, 10).cause == Cause::compute);    // 5 ms of 30
  CHECK(counted(Counter::swapped_pages, 600, 590).cause == Cause::compute);   // all the time
  CHECK(counted(Counter::reclaimed_pages, 30000, 100).cause == Cause::page_faults);
  CHECK(counted(Counter::reclaimed_pages, 30000, 29000).cause == Cause::compute);
}

TEST_CASE("time that the hypervisor gave to somebody else is scheduling where the slow tokens are") {
  for (const Part part : {Part::disk_wait, Part::copy_wait, Part::matmul}) {
    const auto stolen = [&](double with, double without) {
      Run run(part, 30, compute, 800, 64);
      run.count_machine(Counter::steal_ms, with, without);
      return run;
    };
    const Cause usual = Run(part, 30, compute).explained().cause;
    const Finding finding = stolen(40, 0).explained();
    CHECK(finding.cause == Cause::scheduling);
    CHECK(says(finding, "the hypervisor ran somebody else 520 ms around an excess of 390 ms, 520 ms more"));
    CHECK(stolen(10, 0).explained().cause == usual);    // a third of the excess
    CHECK(stolen(40, 30).explained().cause == usual);   // it does so anyway, and tokens are not slow for it
    CHECK(stolen(40, 0).without({Counter::steal_ms}).explained().cause == usual);
  }
}

TEST_CASE("a hypervisor that takes its share beside every spike and every other token leaves the cause open") {
  const auto throttled = [](double ms) {
    Run run(Part::disk_wait, 6, {}, 800, 10);   // every 106 ms: no reading is without
    run.count_machine(Counter::steal_ms, ms, ms);
    return run;
  };
  const Finding finding = throttled(14).explained();
  CHECK(finding.cause == Cause::unknown);
  CHECK(says(finding, "cannot be told"));
  CHECK(throttled(4).explained().cause == Cause::disk_tail);   // too little to explain 12 ms
  // One that fell out of the train is no more certain for it: other readings have spikes as well.
  const Run run = throttled(14);
  const Attribution attribution(run.borrowed, run.counted);
  CHECK(attribution.explain(std::span(run.members).subspan(40, 1)).cause == Cause::unknown);
}

TEST_CASE("a report knows which counters its trace has") {
  Run run(Part::disk_wait, 30);
  Tokens tokens{.all = run.tokens, .counted = run.counted};
  const auto evidence = [&] {
    const auto report = report_of(Trace(), tokens);
    REQUIRE(report["trains"].size() == 1);
    return report["trains"][0]["evidence"].get<std::string>();
  };
  CHECK(evidence().find("nobody else read") != std::string::npos);
  tokens.counted[static_cast<size_t>(Counter::disk_read_sectors)] = false;
  CHECK(evidence().find("nobody else read") == std::string::npos);
}

TEST_CASE("a counter that was read for the first time in ten tokens is held against ten tokens") {
  Run run(Part::matmul, 30, [](Token& t) { set(t, Counter::run_delay_ns, 25e6); });
  for (const size_t i : run.members) {
    run.tokens[i].covered += 0.100;
    set(run.tokens[i], Counter::run_delay_ns, 75e6);   // of which ten ordinary tokens have 50
  }
  CHECK(run.explained().cause == Cause::scheduling);
  for (const size_t i : run.members) set(run.tokens[i], Counter::run_delay_ns, 55e6);
  CHECK(run.explained().cause == Cause::unknown);
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
