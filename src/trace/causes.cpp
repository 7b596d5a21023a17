// SPDX-License-Identifier: Apache-2.0
#include "trace/causes.hpp"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <utility>

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
// A page of 2 MiB is one fault, and takes what clearing it takes: 0.2 ms, and 5 ms in a virtual machine whose host has to
// find the memory as well.
constexpr double kHugePage = 2 << 20, kClearBytesPerSecond = 0.25e9;
constexpr double kRanAnyway = 0.3;               // of the excess the thread computed
// Others' reads are what the drive counted and this model did not take. A read is counted when it completes and taken
// later, by up to a staging ring: so over the token before to three behind, and no more than over the whole run.
constexpr double kForeignBytes = 1 << 20;        // a spike, beyond what is usual
constexpr size_t kForeignBefore = 1, kForeignBehind = 3;
constexpr double kMajorFaults = 0.5;             // a spike: most have one (the kernel reads ahead behind it)
constexpr double kPressureShare = 0.4;
// A page that is swapped in takes a drive's latency, one that is reclaimed a microsecond at least (unmapped and freed).
constexpr double kSwapSeconds = 50e-6, kReclaimSeconds = 1e-6;
// Stolen time comes in ticks of 10 ms: so little is one that would have come anyway.
constexpr double kLeastStolen = 0.020;

struct Words {
  const char* name;
  const char* text;
};
constexpr std::array<Words, static_cast<size_t>(Cause::count)> kCauses = {{
    {"unknown", "no evidence names a cause"},
    {"disk_tail", "the drive answered late"},
    {"competing_reads", "others read from the drive"},
    {"page_faults", "pages were read again, or memory had to be reclaimed"},
    {"bus", "copies into device memory took long"},
    {"scheduling", "the host ran something else on the cores"},
    {"allocation", "fresh memory was touched"},
    {"compute", "operations took long by themselves"},
    {"gpu_clock", "the GPU lowered its clock for power or heat"},
    {"interference", "another session's pass came first"},
    {"consumer", "whoever takes the tokens was slow"},
    {"preparation", "commands of a new kind of pass were recorded"},
}};

bool gpu_slowed(const Token& token) {
  return (static_cast<uint64_t>(token[Counter::gpu_throttle]) & kGpuSlowed) != 0;
}

std::string percent(double share) { return fmt::format("{:.0f}%", 100 * share); }
std::string milliseconds(double seconds) { return fmt::format("{:.0f} ms", 1000 * seconds); }

std::string list(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) text += (i == 0 ? "" : i + 1 < names.size() ? ", " : " and ") + names[i];
  return text;
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

Attribution::Attribution(std::span<const Token* const> tokens, const Counted& counted)
    : tokens_(tokens), counted_(counted), machine_({}, {}) {
  const auto usual = [&](auto&& value) {
    std::vector<double> values;
    for (const Token* token : tokens) values.push_back(value(*token));
    return running_median(values, kUsualWindow);
  };
  for (size_t part = 0; part < kParts; ++part) usual_[part] = usual([&](const Token& t) { return t.seconds[part]; });
  for (size_t c = 0; c < usual_counts_.size(); ++c)
    usual_counts_[c] = usual([&](const Token& t) { return t.counters[c]; });
  usual_total_ = usual([](const Token& t) { return t.total(); });
  usual_prepared_ = usual([](const Token& t) { return t.prepared; });
  // The pressure on memory is read less often than the rest: together with the resident bytes, which are never 0.
  memory_covered_.resize(tokens.size());
  grown_.resize(tokens.size());
  std::map<uint32_t, const Token*> read;   // the last one, by session
  for (size_t i = 0; i < tokens.size(); ++i) {
    const Token& token = *tokens[i];
    if (token[Counter::resident_bytes] <= 0) continue;
    if (const Token* last = std::exchange(read[token.session], &token); last != nullptr) {
      memory_covered_[i] = token.end - last->end;
      grown_[i] = std::max(0.0, token[Counter::resident_bytes] - (*last)[Counter::resident_bytes]);
    }
  }
  machine_ = MachineReadings(tokens, excess_of_each());
  measure_what_is_usual();
}

std::vector<double> Attribution::excess_of_each() const {
  std::vector<double> excess;
  for (size_t i = 0; i < tokens_.size(); ++i) excess.push_back(tokens_[i]->total() - usual_total_[i]);
  return excess;
}

void Attribution::measure_what_is_usual() {
  // By sums, not by token: the kernel adds to its totals when a task begins or ends to wait, in lumps.
  double waited = 0, delay = 0, covered = 0, time = 0, work = 0, foreign = 0, streamed = 0, slowed = 0, ordinary = 0;
  double stalled = 0, memory_covered = 0;
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const Token& token = *tokens_[i];
    foreign_total_ += foreign_bytes(token);
    if (token.total() > 2 * usual_total_[i]) continue;
    if (token.covered > 0) {
      waited += token[Counter::psi_cpu_us] * 1e-6;
      delay += token[Counter::run_delay_ns] * 1e-9;
      covered += token.covered;
    }
    if (memory_covered_[i] > 0) {
      stalled += token[Counter::psi_memory_us] * 1e-6;
      memory_covered += memory_covered_[i];
    }
    time += token.total();
    work += token[Counter::thread_cpu_ns] * 1e-9;
    foreign += foreign_bytes(token);
    streamed += token[Counter::stream_bytes];
    slowed += gpu_slowed(token) ? 1 : 0;
    ++ordinary;
  }
  memory_pressure_ = memory_covered > 0 ? std::min(1.0, stalled / memory_covered) : 0;
  gpu_slowed_ = ordinary > 0 ? slowed / ordinary : 0;
  cpu_pressure_ = covered > 0 ? std::min(1.0, waited / covered) : 0;
  delay_rate_ = covered > 0 ? std::min(1.0, delay / covered) : 0;
  delay_per_work_ = work > 0 ? delay_rate_ * time / work : 0;
  stream_rate_ = time > 0 ? streamed / time : 0;
  foreign_rate_ = time > 0 ? std::max(0.0, foreign / time) : 0;
}

// What the members have beyond the usual.
struct Attribution::Sums {
  std::span<const size_t> indices;
  double members = 0;
  double total = 0;
  std::array<double, kParts> parts{};
  std::array<double, static_cast<size_t>(Counter::count)> counts{};
  double read = 0;               // members behind which the scheduler's files were read
  double pressure = 0;           // seconds in which some task waited for a core, beyond what this machine usually has
  double delay = 0;              // ... in which this thread did, beyond the usual of what is not excess
  double stalled = 0;            // ... in which some task stalled for memory, at most each member's excess
  double prepared = 0;           // ... in which passes recorded commands
  double grown = 0;              // bytes that became resident since they were last counted
  double foreign_bytes = 0;      // read from the drive, but not by this model
  double slowed = 0;             // members in which the GPU held its clock down
  double prompts = 0;            // members that began with more than one token
  // Of the excess: what the thread computed, and what it was held up for beyond what so much work usually is.
  double ran = 0, delayed = 0;

  double share(std::initializer_list<Part> of) const {
    double sum = 0;
    for (const Part part : of) sum += parts[static_cast<size_t>(part)];
    return total > 0 ? sum / total : 0;
  }
  double disk() const { return share({Part::disk_wait, Part::embed}); }
  double bus() const { return share({Part::copy_wait}); }
  double operations() const {
    return share(
        {Part::norm, Part::matmul, Part::rope, Part::attention, Part::activation, Part::lm_head, Part::finish});
  }
  double each(double sum) const { return sum / members; }
  double operator[](Counter counter) const { return counts[static_cast<size_t>(counter)]; }
};

Attribution::Sums Attribution::sums_of(std::span<const size_t> members) const {
  Sums sums{.indices = members};
  for (const size_t i : members) {
    const Token& token = *tokens_[i];
    const double excess = token.total() - usual_total_[i];
    ++sums.members;
    sums.total += excess;
    for (size_t part = 0; part < kParts; ++part) sums.parts[part] += token.seconds[part] - usual_[part][i];
    for (size_t c = 0; c < sums.counts.size(); ++c) sums.counts[c] += token.counters[c] - usual_counts_[c][i];
    sums.prepared += token.prepared - usual_prepared_[i];
    sums.grown += grown_[i];
    if (token.covered > 0) {
      ++sums.read;
      sums.pressure += token[Counter::psi_cpu_us] * 1e-6 - cpu_pressure_ * token.covered;
      sums.delay += token[Counter::run_delay_ns] * 1e-9 - delay_rate_ * std::max(0.0, token.covered - excess);
    }
    if (memory_covered_[i] > 0) {
      sums.stalled += std::min(excess, token[Counter::psi_memory_us] * 1e-6 - memory_pressure_ * memory_covered_[i]);
    }
    for (size_t k = i - std::min(i, kForeignBefore); k < std::min(tokens_.size(), i + kForeignBehind + 1); ++k)
      sums.foreign_bytes += foreign_bytes(*tokens_[k]) - foreign_rate_ * tokens_[k]->total();
    if (gpu_slowed(token)) ++sums.slowed;
    if (token.prompt_tokens > 1) ++sums.prompts;
  }
  sums.foreign_bytes = counted(Counter::disk_read_sectors) ? std::min(sums.foreign_bytes, foreign_total_) : 0;
  if (sums.total > 0) {
    sums.ran = sums[Counter::thread_cpu_ns] * 1e-9 / sums.total;
    sums.delayed = sums.delay / sums.total - delay_per_work_ * std::max(0.0, sums.ran);
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
  Claim claimed = claim(sums);
  finding.cause = claimed.cause;
  finding.grade = claimed.cause == Cause::unknown ? Grade::unknown : Grade::correlated;
  finding.evidence = std::move(claimed.evidence);
  return finding;
}

// The first rule that holds. What is certain by itself comes first, then what was counted for this thread or token,
// then what was counted for the machine.
Attribution::Claim Attribution::claim(const Sums& sums) const {
  const double callback = sums.share({Part::callback});
  if (callback >= kMostOfIt && sums.delayed < kHalfOfIt) {
    const bool knows = counted(Counter::run_delay_ns) && sums.read >= kHalfOfIt * sums.members;
    return {Cause::consumer, percent(callback) + " of the excess is the callback" +
                                 (knows ? "" : "; whether its thread waited for a core was not counted")};
  }
  const double turn = sums.share({Part::turn_wait});
  if (turn >= kHalfOfIt) return {Cause::interference, percent(turn) + " of the excess is turn_wait"};
  if (sums.prepared >= kMostOfIt * sums.total) {
    return {Cause::preparation,
            percent(sums.prepared / sums.total) + " of the excess was spent on recording commands for later passes"};
  }
  if (sums.prompts >= kHalfOfIt * sums.members) {
    return {Cause::interference, fmt::format("{:.0f} of {:.0f} began with a prompt", sums.prompts, sums.members)};
  }
  const double major = sums.each(sums[Counter::major_faults]);
  if (major >= kMajorFaults) return {Cause::page_faults, fmt::format("{:.1f} major faults each", major)};
  if (auto claimed = memory_claim(sums)) return *std::move(claimed);
  const double pages = sums[Counter::minor_faults];
  if (sums.each(pages) >= kLeastPages && pages * kFaultSeconds >= kFaultShare * sums.total) {
    return {Cause::allocation, fmt::format("{:.0f} pages touched for the first time each", sums.each(pages))};
  }
  if (sums.each(pages) >= kHalfOfIt && sums.each(sums.grown) >= kHalfOfIt * kHugePage &&
      sums.grown / kClearBytesPerSecond >= kHalfOfIt * sums.total) {
    return {Cause::allocation, fmt::format("{} became resident each time, by {:.1f} faults: pages of 2 MiB, which the "
                                           "kernel clears", format_bytes(static_cast<uint64_t>(sums.each(sums.grown))),
                                           sums.each(pages))};
  }
  if (sums.delayed >= kHalfOfIt && sums.ran < kRanAnyway) {
    return {Cause::scheduling, percent(sums.delayed) + " of the excess the thread was runnable and did not run"};
  }
  if (sums.disk() >= kMostOfIt) return drive_claim(sums);
  if (sums.bus() >= kMostOfIt) {
    if (auto claimed = steal_claim(sums)) return *std::move(claimed);
    if (auto untold = untold_steal(sums)) return *std::move(untold);
    return {Cause::bus, percent(sums.bus()) + " of the excess is copy_wait"};
  }
  if (sums.operations() >= kMostOfIt) return operations_claim(sums);
  const auto largest = std::max_element(sums.parts.begin(), sums.parts.end());
  const auto part = static_cast<Part>(largest - sums.parts.begin());
  return {Cause::unknown, fmt::format("most of the excess, {}, is {}, and no counter explains it",
                                      percent(*largest / sums.total), name_of(part))};
}

// Tasks stalled for memory: they reclaimed it, or waited for pages that had been dropped or swapped out. The kernel's
// own count (PSI) is of time; where there is none, so many pages have to be at hand that they explain it.
std::optional<Attribution::Claim> Attribution::memory_claim(const Sums& sums) const {
  if (sums.delayed >= kHalfOfIt) return std::nullopt;   // this thread could have run
  const double like = kHalfOfIt * sums.each(sums.total);
  const auto pages = [&](Counter counter) {
    const Growth growth = machine_.growth_of(counter, sums.indices, like);
    return counted(counter) && growth.clearly_more() ? growth.beyond() : 0;
  };
  const double swapped = pages(Counter::swapped_pages), reclaimed = pages(Counter::reclaimed_pages);
  std::string meanwhile;
  if (swapped > 0) meanwhile += fmt::format("; {:.0f} pages more than usual were swapped in", swapped);
  if (reclaimed > 0) meanwhile += fmt::format("; {:.0f} pages more than usual were reclaimed", reclaimed);
  if (counted(Counter::psi_memory_us)) {
    if (sums.stalled < kHalfOfIt * sums.total) return std::nullopt;
    return Claim{Cause::page_faults,
                 fmt::format("tasks stalled for memory {} of the excess longer than usual{}",
                             percent(sums.stalled / sums.total), meanwhile)};
  }
  if (swapped * kSwapSeconds + reclaimed * kReclaimSeconds < kHalfOfIt * sums.total) return std::nullopt;
  return Claim{Cause::page_faults, meanwhile.substr(2) + "; time that tasks stalled for memory is not counted here"};
}

// The hypervisor ran somebody else: only readings of the machine say so, and there must be others to hold them against.
std::optional<Attribution::Claim> Attribution::steal_claim(const Sums& sums) const {
  if (!counted(Counter::steal_ms)) return std::nullopt;
  const Growth stolen = machine_.growth_of(Counter::steal_ms, sums.indices, kHalfOfIt * sums.each(sums.total));
  const double beyond = 1e-3 * stolen.beyond();
  if (!stolen.clearly_more() || beyond < std::max(kLeastStolen, kMostOfIt * sums.total)) return std::nullopt;
  return Claim{Cause::scheduling,
               fmt::format("the hypervisor ran somebody else {} around an excess of {}, {} more than it usually does",
                           milliseconds(1e-3 * stolen.sum), milliseconds(sums.total), milliseconds(beyond))};
}

// Time enough was stolen to explain the excess, and no reading is without such spikes: it may be that, and may not.
std::optional<Attribution::Claim> Attribution::untold_steal(const Sums& sums) const {
  if (!counted(Counter::steal_ms)) return std::nullopt;
  const Growth stolen = machine_.growth_of(Counter::steal_ms, sums.indices, kHalfOfIt * sums.each(sums.total));
  if (stolen.comparable() || 1e-3 * stolen.sum < kMostOfIt * sums.total) return std::nullopt;
  return Claim{Cause::unknown,
               fmt::format("the hypervisor ran somebody else {} around an excess of {}, and did so all the time: "
                           "whether that is the cause cannot be told",
                           milliseconds(1e-3 * stolen.sum), milliseconds(sums.total))};
}

Attribution::Claim Attribution::drive_claim(const Sums& sums) const {
  const std::string waited = percent(sums.disk()) + " of the excess is disk_wait";
  const double foreign = sums.each(sums.foreign_bytes);
  const std::string others = format_bytes(static_cast<uint64_t>(std::max(0.0, foreign)));
  // What the drive spends on others at the rate that it usually gives this model must be long enough to explain it.
  const bool enough = stream_rate_ <= 0 || foreign / stream_rate_ >= kMostOfIt * sums.each(sums.total);
  if (foreign >= kForeignBytes && enough) {
    return {Cause::competing_reads, fmt::format("{}; others read {} each time", waited, others)};
  }
  if (auto claimed = steal_claim(sums)) return *std::move(claimed);
  if (auto untold = untold_steal(sums)) return *std::move(untold);
  const bool hot = sums[Counter::drive_throttles] > 0;
  std::string beside = "; nobody else read more than usual";
  if (!counted(Counter::disk_read_sectors)) beside = "; what others read is not counted on this file system";
  else if (foreign >= kForeignBytes) beside = fmt::format("; others read {} each time, too little for it", others);
  return {Cause::disk_tail, waited + beside + (hot ? "; the drive slowed itself down for heat" : "")};
}

Attribution::Claim Attribution::operations_claim(const Sums& sums) const {
  const std::string took = percent(sums.operations()) + " of the excess is in operations";
  // An operation waits for the last of its workers: one that is held up shows in the machine's pressure alone.
  if (sums.pressure >= kPressureShare * sums.total && sums.ran < kRanAnyway) {
    return {Cause::scheduling, fmt::format("tasks waited for a core {} of the excess longer than usual",
                                           percent(sums.pressure / sums.total))};
  }
  if (auto claimed = steal_claim(sums)) return *std::move(claimed);
  const double slowed = sums.each(sums.slowed);
  if (slowed >= kHalfOfIt && gpu_slowed_ < kHalfOfIt * slowed) {
    return {Cause::gpu_clock,
            fmt::format("{}; the GPU held its clock down in {} of the spikes and {} of the other tokens", took,
                        percent(slowed), percent(gpu_slowed_))};
  }
  if (auto untold = untold_steal(sums)) return *std::move(untold);
  // Operations of the host take long by themselves only while they compute, or have to wait for a core in between; a
  // device computes unseen.
  const bool device = sums.share({Part::finish}) >= kHalfOfIt || counted(Counter::device_clock_error_ns) ||
                      counted(Counter::gpu_clock_mhz);
  const double computed = std::max(sums.ran, sums[Counter::process_cpu_ns] * 1e-9 / sums.total);
  const bool worked = computed >= kRanAnyway && computed + std::max(0.0, sums.delay / sums.total) >= kHalfOfIt;
  const bool knows = counted(Counter::run_delay_ns) && sums.read >= kHalfOfIt * sums.members;
  if (!worked && !device) {
    return {Cause::unknown, fmt::format("{}, while the process computed for {} of it: something held it up; {}", took,
                                        percent(std::max(0.0, computed)), what_did_not_move(sums))};
  }
  if (!worked && !knows) {
    return {Cause::unknown, took + "; whether the thread waited for a core was not counted"};
  }
  return {Cause::compute, took + "; " + what_did_not_move(sums)};
}

// Of the counters that were read.
std::string Attribution::what_did_not_move(const Sums& sums) const {
  std::vector<std::string> still, uncounted;
  if (sums.each(sums[Counter::minor_faults]) < kHalfOfIt) still.emplace_back("faults");
  if (!counted(Counter::disk_read_sectors)) uncounted.emplace_back("the drive");
  else if (sums.each(sums.foreign_bytes) < kForeignBytes) still.emplace_back("drive");
  const bool read = sums.read >= kHalfOfIt * sums.members;
  if (read && counted(Counter::psi_cpu_us)) still.emplace_back("scheduler");
  else if (read && counted(Counter::run_delay_ns)) still.emplace_back("this thread's waits for a core");
  else uncounted.emplace_back("waits for a core");
  std::string text = still.empty() ? "" : list(still) + " did not move";
  if (!uncounted.empty()) text += (text.empty() ? "not counted: " : "; not counted: ") + list(uncounted);
  return text.empty() ? "other counters moved as well" : text;
}

}  // namespace sluice::trace
