// SPDX-License-Identifier: Apache-2.0
#include "trace/report.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "trace/causes.hpp"
#include "trace/injection.hpp"
#include "trace/spikes.hpp"
#include "trace/statistics.hpp"

namespace sluice::trace {
namespace {

using nlohmann::json;

// A token counts as accounted for when named parts explain this share of it.
constexpr double kAccounted = 0.99;
constexpr size_t kMostSteps = 4;
// Of a train that is another one's aftermath: tokens behind its spikes, how much smaller, and the share that follows.
constexpr size_t kAftermath = 3;
constexpr double kMuchLarger = 5, kMostFollow = 0.8;

// What a cause is to somebody who meets its name for the first time.
const char* meaning_of(Cause cause) {
  switch (cause) {
    case Cause::disk_tail:
      return "The drive itself was late: its housekeeping, its heat, or a hypervisor that lets little through.";
    case Cause::competing_reads:
      return "Something else on this machine read from the drive that the weights come from.";
    case Cause::page_faults:
      return "Memory was short: the token waited until dropped pages were read again, or others had been taken back.";
    case Cause::bus: return "Weights came late from host memory into the device's.";
    case Cause::scheduling: return "The kernel gave the cores to other work, or a hypervisor took them away.";
    case Cause::allocation:
      return "Memory was touched for the first time, and the kernel had to find its pages and clear them.";
    case Cause::compute: return "The operations took longer, and nothing that is recorded says why.";
    case Cause::gpu_clock: return "The GPU ran slower, to stay within its limits of power or heat.";
    case Cause::interference: return "The token waited for another session's pass, or a prompt was read first.";
    case Cause::preparation:
      return "A pass of a kind that had not come before, whose commands were recorded for those that follow.";
    case Cause::consumer: return "The time passed outside of Sluice, in the code that takes the tokens.";
    case Cause::unknown:
    case Cause::count: break;
  }
  return "No part of the time and no counter stands out enough to be called the reason.";
}

// "read every 16 tokens, 30 ms, jitter 3%".
std::string text_of(const Injection& injection) {
  const char* unit = injection.clock == InjectionClock::token  ? "tokens"
                     : injection.clock == InjectionClock::time ? "ms"
                                                               : "MiB read";
  std::string text = fmt::format("{} every {:g} {}, {:g} ms", name_of(injection.fault), injection.period, unit,
                                 injection.ms);
  if (injection.jitter > 0) text += fmt::format(", jitter {:g}%", 100 * injection.jitter);
  return text;
}

// The faults that a trace's note says were asked for.
std::vector<Injection> injections_of(const json& run) {
  std::vector<Injection> found;
  const json::json_pointer path("/rerun/options/inject");
  if (!run.is_object() || !run.contains(path) || !run[path].is_array()) return found;
  for (const json& text : run[path]) {
    if (!text.is_string()) continue;
    if (const Result<Injection> injection = parse_injection(text.get<std::string>())) found.push_back(*injection);
  }
  return found;
}

class Reporter {
 public:
  Reporter(const Trace& trace, const Tokens& tokens)
      : trace_(trace), tokens_(tokens), run_(json::parse(trace.note, nullptr, false)), clocks_(clocks_of(tokens)) {
    for (const Token& token : tokens.all) {
      if (!token.decoded) continue;
      decoded_.push_back(&token);
      itl_.push_back(token.total());
      seconds_ += token.total();
    }
    baseline_ = baseline_of(itl_);
    spikes_ = spikes_of(baseline_);
  }

  json report() const {
    json report = {{"file", trace_.path},
                   {"run", run_},
                   {"complete", trace_.complete},
                   {"records", trace_.records},
                   {"dropped", trace_.dropped},
                   {"clock", clock()},
                   {"tokens", tokens_.all.size()},
                   {"decoded_tokens", decoded_.size()},
                   {"decode_seconds", seconds_},
                   {"itl", itl()},
                   {"parts", parts()},
                   {"accounting", accounting()},
                   {"trend", trend()},
                   {"steps", steps()},
                   {"injected", injected()},
                   {"itl_series", itl_}};
    add_spikes(report);
    return report;
  }

 private:
  json itl() const {
    return {{"p50", percentile(itl_, 0.5)}, {"p90", percentile(itl_, 0.9)}, {"p99", percentile(itl_, 0.99)},
            {"p99.9", percentile(itl_, 0.999)}, {"max", percentile(itl_, 1.0)}};
  }

  // Seconds of each part, summed over the decoded tokens.
  json parts() const {
    json parts = json::object();
    for (size_t part = 0; part < kParts; ++part) {
      double sum = 0;
      for (const Token* token : decoded_) sum += token->seconds[part];
      parts[name_of(static_cast<Part>(part))] = sum;
    }
    return parts;
  }

  json accounting() const {
    size_t good = 0;
    double worst = 1;
    for (const Token* token : decoded_) {
      const double share = token->accounted();
      if (share >= kAccounted) ++good;
      worst = std::min(worst, share);
    }
    const double share = decoded_.empty() ? 1 : static_cast<double>(good) / static_cast<double>(decoded_.size());
    return {{"tokens_at_99_percent", share}, {"worst_token", worst}};
  }

  // The level at the beginning and at the end: what a growing context costs is a trend, not a spike.
  json trend() const {
    const size_t tenth = itl_.size() / 10;
    if (tenth < 20) return nullptr;
    const std::span<const double> itl(itl_);
    return {{"first", median(itl.first(tenth))}, {"last", median(itl.last(tenth))},
            {"context_first", decoded_.front()->context}, {"context_last", decoded_.back()->context}};
  }

  // The largest ones, in order.
  json steps() const {
    std::vector<Step> found = steps_of(itl_);
    const auto size = [](const Step& step) { return std::abs(step.after - step.before); };
    const size_t kept = std::min(kMostSteps, found.size());
    std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept), found.end(),
                      [&](const Step& a, const Step& b) { return size(a) > size(b); });
    std::sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(kept),
              [](const Step& a, const Step& b) { return a.index < b.index; });
    json largest = json::array();
    for (const Step& step : std::span(found).first(kept)) {
      largest.push_back({{"token", step.index}, {"before", step.before}, {"after", step.after}});
    }
    return {{"count", found.size()}, {"largest", largest}};
  }

  // How far ticks and nanoseconds may be apart, and where operations have a device's clock, that one and the host's: in
  // nine of ten passes, since in the first, which compiles, the bounds are far apart (156 ms on Vulkan, then 28 us).
  json clock() const {
    constexpr auto kDeviceError = static_cast<uint16_t>(Counter::device_clock_error_ns);
    std::vector<double> errors;
    for (const TraceTrack& track : trace_.tracks) {
      for (const Record& record : track.records) {
        if (record.kind != Kind::counter || record.layer != kDeviceError) continue;
        errors.push_back(static_cast<double>(record.value));
      }
    }
    json device = nullptr;
    // A damaged file may hold any number.
    if (!errors.empty()) device = static_cast<uint64_t>(std::min(percentile(errors, 0.9), 0x1p63));
    return {{"host_error_ns", trace_.clock_error_ns}, {"device_error_ns", device}};
  }

  // Each fault that was made on purpose, with what the note says of it and how many times it came.
  json injected() const {
    std::map<std::pair<uint16_t, uint64_t>, uint64_t> marks;   // by fault and nanoseconds
    for (const TraceTrack& track : trace_.tracks) {
      for (const Record& record : track.records) {
        if (record.kind != Kind::injected || record.layer >= static_cast<uint16_t>(Fault::count)) continue;
        ++marks[{record.layer, record.value}];
      }
    }
    json faults = json::array();
    for (const Injection& injection : injections_of(run_)) {
      const auto mark =
          marks.extract({static_cast<uint16_t>(injection.fault), static_cast<uint64_t>(injection.ms * 1e6)});
      faults.push_back({{"fault", name_of(injection.fault)}, {"period", injection.period}, {"ms", injection.ms},
                        {"jitter", injection.jitter}, {"clock", name_of(injection.clock)},
                        {"times", mark ? mark.mapped() : 0}, {"text", text_of(injection)}});
    }
    for (const auto& [fault, times] : marks) {
      const char* name = name_of(static_cast<Fault>(fault.first));
      faults.push_back({{"fault", name}, {"times", times}, {"text", name}});
    }
    return faults;
  }

  double share(double seconds) const { return seconds_ > 0 ? seconds / seconds_ : 0; }

  void add_spikes(json& report) const {
    const Attribution attribution(decoded_, tokens_.counted);
    std::vector<Explained> trains;
    for (Train& train : trains_of(baseline_.score, spikes_, clocks_)) {
      Finding finding = attribution.explain(train.members);
      trains.push_back({.train = std::move(train), .finding = std::move(finding)});
    }
    for (Explained& train : trains) {
      for (const Explained& other : trains) inherit(train, other);
    }
    report["trains"] = json::array();
    std::vector<size_t> loose = spikes_;
    for (const auto& [train, finding] : trains) {
      report["trains"].push_back(train_json(train, finding));
      std::erase_if(loose, [&](size_t i) { return std::binary_search(train.members.begin(), train.members.end(), i); });
    }
    std::map<std::string, uint64_t> causes;
    double excess = 0;
    for (const size_t i : loose) {
      const Finding finding = attribution.explain(std::span(&i, 1));
      ++causes[name_of(finding.cause)];
      excess += finding.excess_seconds;
    }
    report["spikes"] = spikes_;
    report["loose_spikes"] = {
        {"count", loose.size()}, {"excess_seconds", excess}, {"share_of_time", share(excess)}, {"causes", causes}};
  }

  struct Explained {
    Train train;
    Finding finding;
  };

  // A long stall leaves cold caches and late neighbours: a train of small spikes right behind those of a large one is its
  // aftermath, and has its cause.
  static void inherit(Explained& small, const Explained& large) {
    const std::vector<size_t>&members = small.train.members, &before = large.train.members;
    const auto each = [](const Explained& e) {
      return e.finding.excess_seconds / static_cast<double>(e.train.members.size());
    };
    if (each(large) < kMuchLarger * each(small)) return;
    const auto behind = [&](size_t i) {
      const auto after = std::upper_bound(before.begin(), before.end(), i);
      return after != before.begin() && i - *std::prev(after) <= kAftermath;
    };
    const auto followers = static_cast<double>(std::count_if(members.begin(), members.end(), behind));
    if (followers < kMostFollow * static_cast<double>(members.size())) return;
    small.finding.cause = large.finding.cause;
    small.finding.grade = large.finding.grade;
    small.finding.evidence = "they follow larger spikes, whose aftermath they are";
  }

  json train_json(const Train& train, const Finding& finding) const {
    json also = json::array();
    for (const Clock clock : train.also) also.push_back(name_of(clock));
    json parts = json::object();
    for (size_t part = 0; part < kParts; ++part) {
      if (finding.excess[part] > 0.01 * finding.excess_seconds)
        parts[name_of(static_cast<Part>(part))] = finding.excess[part];
    }
    return {{"clock", name_of(train.clock)}, {"also", also},
            {"period", train.period}, {"phase", train.phase}, {"jitter", train.jitter},
            {"places", train.places}, {"filled", train.filled}, {"p_value", train.p_value},
            {"tokens", train.members},
            {"excess_each", finding.excess_seconds / static_cast<double>(std::max<size_t>(1, train.members.size()))},
            {"share_of_time", share(finding.excess_seconds)},
            {"excess_parts", parts},
            {"cause", name_of(finding.cause)}, {"cause_text", text_of(finding.cause)},
            {"meaning", meaning_of(finding.cause)},
            {"grade", name_of(finding.grade)}, {"evidence", finding.evidence}};
  }

  const Trace& trace_;
  const Tokens& tokens_;
  const json run_;
  const Clocks clocks_;
  std::vector<const Token*> decoded_;
  std::vector<double> itl_;
  double seconds_ = 0;
  Baseline baseline_;
  std::vector<size_t> spikes_;
};

}  // namespace

Clocks clocks_of(const Tokens& tokens) {
  Clocks clocks;
  auto& [token_clock, time_clock, byte_clock] = clocks.at;
  double read = 0;
  for (const Token& token : tokens.all) {
    if (token.decoded) {
      token_clock.push_back(static_cast<double>(token_clock.size()));
      time_clock.push_back(token.begin);
      byte_clock.push_back(read);
    }
    read += token[Counter::stream_bytes];
  }
  if (read == 0) byte_clock.clear();
  return clocks;
}

nlohmann::json report_of(const Trace& trace, const Tokens& tokens) { return Reporter(trace, tokens).report(); }

}  // namespace sluice::trace
