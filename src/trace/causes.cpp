// SPDX-License-Identifier: Apache-2.0
#include "trace/causes.hpp"

#include <algorithm>
#include <initializer_list>

#include <fmt/format.h>

#include "base/units.hpp"
#include "trace/device_evidence.hpp"
#include "trace/statistics.hpp"

namespace sluice::trace {
namespace {

constexpr size_t kUsualWindow = 65;
// Share of the excess that a part must have to stand for it. Injected faults reach 0.9 and more; two causes at once
// leave neither in charge.
constexpr double kMostOfIt = 0.6;
constexpr double kHalfOfIt = 0.5;
// A first touch of a page takes 0.1 to 1 us (zeroing 4 KiB and the fault around it).
constexpr double kFaultSeconds = 0.25e-6;
constexpr double kFaultShare = 0.05, kLeastPages = 64;
constexpr double kRanAnyway = 0.3;               // of the excess the thread computed
// Others' reads are what the drive counted and this model did not take. A read is counted when it completes and taken
// later, by up to a staging ring: so over the token before to three behind, and no more than over the whole run.
constexpr double kForeignBytes = 1 << 20;        // a spike, beyond what is usual
constexpr size_t kForeignBefore = 1, kForeignBehind = 3;
constexpr double kMajorFaults = 0.5;             // a spike: most have one (the kernel reads ahead behind it)
constexpr double kPressureShare = 0.4;

struct Words {
  const char* name;
  const char* text;
};
constexpr std::array<Words, static_cast<size_t>(Cause::count)> kCauses = {{
    {"unknown", "no evidence names a cause"},
    {"disk_tail", "the drive answered late, with nobody else reading"},
    {"competing_reads", "others read from the drive"},
    {"page_faults", "pages that had been dropped were read again"},
    {"bus", "copies into device memory took long"},
    {"scheduling", "the host ran something else on the cores"},
    {"allocation", "fresh memory was touched"},
    {"compute", "operations took long by themselves"},
    {"gpu_clock", "the GPU lowered its clock for power or heat"},
    {"interference", "another session's pass came first"},
    {"consumer", "whoever takes the tokens was slow"},
}};

bool gpu_slowed(const Token& token) {
  return (static_cast<uint64_t>(token[Counter::gpu_throttle]) & kGpuSlowed) != 0;
}

// Read from the drive while the token lasted, but not for streaming by this model.
double foreign_bytes(const Token& token) {
  return token[Counter::disk_read_sectors] * 512 - token[Counter::stream_bytes];
}

}  // namespace

const char* name_of(Cause cause) { return kCauses[static_cast<size_t>(cause)].name; }
const char* text_of(Cause cause) { return kCauses[static_cast<size_t>(cause)].text; }

const char* name_of(Grade grade) {
  switch (grade) {
    case Grade::unknown: return "unknown";
    case Grade::correlated: return "correlated";
    case Grade::confirmed: return "confirmed";
  }
  return "unknown";
}

Attribution::Attribution(std::span<const Token* const> tokens) : tokens_(tokens) {
  const auto usual = [&](auto&& value) {
    std::vector<double> values;
    for (const Token* token : tokens) values.push_back(value(*token));
    return running_median(values, kUsualWindow);
  };
  for (size_t part = 0; part < kParts; ++part) usual_[part] = usual([&](const Token& t) { return t.seconds[part]; });
  for (size_t c = 0; c < usual_counts_.size(); ++c)
    usual_counts_[c] = usual([&](const Token& t) { return t.counters[c]; });
  usual_total_ = usual([](const Token& t) { return t.total(); });
  // By sums, not by token: the kernel adds to its totals when a task begins or ends to wait, in lumps.
  double waited = 0, delay = 0, covered = 0, time = 0, work = 0, foreign = 0, streamed = 0, slowed = 0, ordinary = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    foreign_total_ += foreign_bytes(*tokens[i]);
    if (tokens[i]->total() > 2 * usual_total_[i]) continue;
    if (tokens[i]->covered > 0) {
      waited += (*tokens[i])[Counter::psi_cpu_us] * 1e-6;
      delay += (*tokens[i])[Counter::run_delay_ns] * 1e-9;
      covered += tokens[i]->covered;
    }
    time += tokens[i]->total();
    work += (*tokens[i])[Counter::thread_cpu_ns] * 1e-9;
    foreign += foreign_bytes(*tokens[i]);
    streamed += (*tokens[i])[Counter::stream_bytes];
    slowed += gpu_slowed(*tokens[i]) ? 1 : 0;
    ++ordinary;
  }
  gpu_slowed_ = ordinary > 0 ? slowed / ordinary : 0;
  cpu_pressure_ = covered > 0 ? std::min(1.0, waited / covered) : 0;
  delay_rate_ = covered > 0 ? std::min(1.0, delay / covered) : 0;
  delay_per_work_ = work > 0 ? delay_rate_ * time / work : 0;
  stream_rate_ = time > 0 ? streamed / time : 0;
  foreign_rate_ = time > 0 ? std::max(0.0, foreign / time) : 0;
}

// What the members have beyond the usual.
struct Attribution::Sums {
  double members = 0;
  double total = 0;
  std::array<double, kParts> parts{};
  std::array<double, static_cast<size_t>(Counter::count)> counts{};
  double pressure = 0;           // seconds in which some task waited for a core, beyond what this machine usually has
  double delay = 0;              // ... in which this thread did, beyond the usual of what is not excess
  double foreign_bytes = 0;      // read from the drive, but not by this model
  double slowed = 0;             // members in which the GPU held its clock down
  double prompts = 0;            // members that began with more than one token

  double share(std::initializer_list<Part> of) const {
    double sum = 0;
    for (const Part part : of) sum += parts[static_cast<size_t>(part)];
    return total > 0 ? sum / total : 0;
  }
  double operator[](Counter counter) const { return counts[static_cast<size_t>(counter)]; }
};

Attribution::Sums Attribution::sums_of(std::span<const size_t> members) const {
  Sums sums;
  for (const size_t i : members) {
    const Token& token = *tokens_[i];
    ++sums.members;
    sums.total += token.total() - usual_total_[i];
    for (size_t part = 0; part < kParts; ++part) sums.parts[part] += token.seconds[part] - usual_[part][i];
    for (size_t c = 0; c < sums.counts.size(); ++c) sums.counts[c] += token.counters[c] - usual_counts_[c][i];
    if (token.covered > 0) {
      sums.pressure += token[Counter::psi_cpu_us] * 1e-6 - cpu_pressure_ * token.covered;
      const double usual = token.covered - (token.total() - usual_total_[i]);
      sums.delay += token[Counter::run_delay_ns] * 1e-9 - delay_rate_ * std::max(0.0, usual);
    }
    for (size_t k = i - std::min(i, kForeignBefore); k < std::min(tokens_.size(), i + kForeignBehind + 1); ++k)
      sums.foreign_bytes += foreign_bytes(*tokens_[k]) - foreign_rate_ * tokens_[k]->total();
    if (gpu_slowed(token)) ++sums.slowed;
    if (token.prompt_tokens > 1) ++sums.prompts;
  }
  return sums;
}

Finding Attribution::explain(std::span<const size_t> members) const {
  Finding finding;
  if (members.empty()) return finding;
  const Sums sums = sums_of(members);
  finding.excess = sums.parts;
  finding.excess_seconds = sums.total;
  if (sums.total <= 0) return finding;
  const auto percent = [](double share) { return fmt::format("{:.0f}%", 100 * share); };
  const auto name = [&](Cause cause, std::string evidence) {
    finding.cause = cause;
    finding.grade = Grade::correlated;
    finding.evidence = std::move(evidence);
    return finding;
  };

  // Of the excess: what the thread computed, and what it was held up for beyond what so much work usually is.
  const double ran = sums[Counter::thread_cpu_ns] * 1e-9 / sums.total;
  const double delayed = sums.delay / sums.total - delay_per_work_ * std::max(0.0, ran);
  const double callback = sums.share({Part::callback});
  if (callback >= kMostOfIt && delayed < kHalfOfIt)
    return name(Cause::consumer, percent(callback) + " of the excess is the callback");
  const double turn = sums.share({Part::turn_wait});
  if (turn >= kHalfOfIt) return name(Cause::interference, percent(turn) + " of the excess is turn_wait");
  if (sums.prompts >= kHalfOfIt * sums.members) {
    return name(Cause::interference, fmt::format("{:.0f} of {:.0f} began with a prompt", sums.prompts, sums.members));
  }
  const double major = sums[Counter::major_faults] / sums.members;
  if (major >= kMajorFaults) return name(Cause::page_faults, fmt::format("{:.1f} major faults each", major));
  const double pages = sums[Counter::minor_faults] / sums.members;
  if (pages >= kLeastPages && pages * sums.members * kFaultSeconds >= kFaultShare * sums.total) {
    return name(Cause::allocation, fmt::format("{:.0f} pages touched for the first time each", pages));
  }
  if (delayed >= kHalfOfIt && ran < kRanAnyway) {
    return name(Cause::scheduling, percent(delayed) + " of the excess the thread was runnable and did not run");
  }
  const double disk = sums.share({Part::disk_wait, Part::embed});
  if (disk >= kMostOfIt) {
    const double foreign = std::min(sums.foreign_bytes, foreign_total_) / sums.members;
    // What the drive spends on others at the rate that it usually gives this model must be long enough to explain it.
    const bool enough = stream_rate_ <= 0 || foreign / stream_rate_ >= kMostOfIt * sums.total / sums.members;
    if (foreign >= kForeignBytes && enough) {
      return name(Cause::competing_reads, fmt::format("{} of the excess is disk_wait; others read {} each time",
                                                      percent(disk), format_bytes(static_cast<uint64_t>(foreign))));
    }
    const bool hot = sums[Counter::drive_throttles] > 0;
    return name(Cause::disk_tail, percent(disk) + " of the excess is disk_wait; nobody else read more than usual" +
                                      (hot ? "; the drive slowed itself down for heat" : ""));
  }
  const double bus = sums.share({Part::copy_wait});
  if (bus >= kMostOfIt) return name(Cause::bus, percent(bus) + " of the excess is copy_wait");
  const double compute = sums.share(
      {Part::norm, Part::matmul, Part::rope, Part::attention, Part::activation, Part::lm_head, Part::finish});
  if (compute >= kMostOfIt) {
    // An operation waits for the last of its workers: one that is held up shows in the machine's pressure alone.
    if (sums.pressure >= kPressureShare * sums.total && ran < kRanAnyway) {
      return name(Cause::scheduling, fmt::format("tasks waited for a core {} of the excess longer than usual",
                                                 percent(sums.pressure / sums.total)));
    }
    const double slowed = sums.slowed / sums.members;
    if (slowed >= kHalfOfIt && gpu_slowed_ < kHalfOfIt * slowed) {
      return name(Cause::gpu_clock,
                  fmt::format("{} of the excess is in operations; the GPU held its clock down in {} of the spikes and {} "
                              "of the other tokens", percent(compute), percent(slowed), percent(gpu_slowed_)));
    }
    return name(Cause::compute,
                percent(compute) + " of the excess is in operations; faults, drive and scheduler did not move");
  }
  const auto largest = std::max_element(sums.parts.begin(), sums.parts.end());
  const auto part = static_cast<Part>(largest - sums.parts.begin());
  finding.evidence = fmt::format("most of the excess, {}, is {}, and no counter explains it",
                                 percent(*largest / sums.total), name_of(part));
  return finding;
}

}  // namespace sluice::trace
