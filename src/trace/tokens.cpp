// SPDX-License-Identifier: Apache-2.0
#include "trace/tokens.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "trace/evidence.hpp"

namespace sluice::trace {
namespace {

constexpr std::array<const char*, kParts> kPartNames = {
    "disk_wait", "copy_wait", "turn_wait", "embed",    "norm",       "matmul",   "rope",     "attention", "activation",
    "lm_head",   "finish",    "session",   "sampling", "detokenize", "callback", "evidence", "pass_gap",  "gap"};

std::optional<Part> part_of(Kind kind) {
  switch (kind) {
    case Kind::disk_wait: return Part::disk_wait;
    case Kind::copy_wait: return Part::copy_wait;
    case Kind::turn_wait: return Part::turn_wait;
    case Kind::embed: return Part::embed;
    case Kind::norm: return Part::norm;
    case Kind::matmul: return Part::matmul;
    case Kind::rope: return Part::rope;
    case Kind::attention: return Part::attention;
    case Kind::activation: return Part::activation;
    case Kind::lm_head: return Part::lm_head;
    case Kind::finish: return Part::finish;
    case Kind::session: return Part::session;
    case Kind::sampling: return Part::sampling;
    case Kind::detokenize: return Part::detokenize;
    case Kind::callback: return Part::callback;
    case Kind::evidence: return Part::evidence;
    default: return std::nullopt;
  }
}

bool is_reading(Counter counter) {
  switch (counter) {
    case Counter::context:
    case Counter::resident_bytes:
    case Counter::gpu_clock_mhz:
    case Counter::gpu_throttle:
    case Counter::gpu_celsius:
    case Counter::gpu_milliwatts:
    case Counter::drive_celsius:
    case Counter::device_clock_error_ns:
    case Counter::ring_bytes: return true;
    default: return false;
  }
}

// A pass with its parts: what the engine's track has between two ticks.
struct Pass {
  uint64_t begin = 0, end = 0;
  uint16_t slot = Record::kNoLayer;   // of its session
  std::array<uint64_t, kParts> ticks{};
  uint64_t prepared = 0;              // ticks, of those above
};

// Divides passes into parts. Where a device has a clock of its own, a moment belongs to what the device did; what the
// host did meanwhile, most of which is waiting for it, counts for the moments that are left.
class PassReader {
 public:
  // `device`: its spans, none of which overlap, in order; null if the trace has none.
  explicit PassReader(const TraceTrack* device) {
    if (device == nullptr) return;
    for (const Record& record : device->records) {
      if (part_of(record.kind)) device_.push_back(&record);
    }
  }

  std::vector<Pass> read(const TraceTrack& engine) {
    std::vector<Pass> passes;
    std::vector<const Record*> parts;   // of the next pass, which is written behind them
    for (const Record& record : engine.records) {
      if (record.kind == Kind::pass) {
        passes.push_back(divide(record, parts));
        parts.clear();
      } else if (record.kind == Kind::prepare || part_of(record.kind)) {
        parts.push_back(&record);
      }
    }
    return passes;
  }

 private:
  Pass divide(const Record& whole, std::span<const Record* const> parts) {
    Pass pass{.begin = whole.begin, .end = whole.end, .slot = whole.layer};
    while (next_ < device_.size() && device_[next_]->end <= whole.begin) ++next_;
    const auto first = device_.begin() + static_cast<std::ptrdiff_t>(next_);
    for (; next_ < device_.size() && device_[next_]->begin < whole.end; ++next_) {
      pass.ticks[static_cast<size_t>(*part_of(device_[next_]->kind))] += overlap(*device_[next_], whole);
    }
    const std::span device(first, device_.begin() + static_cast<std::ptrdiff_t>(next_));
    for (const Record* part : parts) {
      uint64_t ticks = part->end - part->begin;
      const auto behind = [](const Record* span, uint64_t at) { return span->end <= at; };
      for (auto span = std::lower_bound(device.begin(), device.end(), part->begin, behind);
           span != device.end() && (*span)->begin < part->end; ++span) {
        ticks -= overlap(**span, *part);
      }
      if (part->kind == Kind::prepare) pass.prepared += ticks;
      else pass.ticks[static_cast<size_t>(*part_of(part->kind))] += ticks;
    }
    return pass;
  }

  static uint64_t overlap(const Record& a, const Record& b) {
    const uint64_t begin = std::max(a.begin, b.begin), end = std::min(a.end, b.end);
    return end - std::min(begin, end);
  }

  std::vector<const Record*> device_;
  size_t next_ = 0;
};

class Joiner {
 public:
  explicit Joiner(const Trace& trace) : trace_(trace) {}

  Result<Tokens> join() {
    const auto find = [&](std::string_view name) {
      const auto track = std::find_if(trace_.tracks.begin(), trace_.tracks.end(),
                                      [&](const TraceTrack& each) { return each.name == name; });
      return track == trace_.tracks.end() ? nullptr : &*track;
    };
    if (const TraceTrack* engine = find("engine")) passes_ = PassReader(find("gpu")).read(*engine);
    for (size_t i = 0; i < trace_.tracks.size(); ++i) {
      uint64_t slot = 0;
      if (number_after(trace_.tracks[i].name, "session ", slot))
        session(static_cast<uint32_t>(i), static_cast<uint16_t>(slot));
    }
    if (tokens_.all.empty()) {
      return fail(ErrorCode::unsupported,
                  fmt::format("{} holds no token; trace a run that generates some", trace_.path));
    }
    std::stable_sort(tokens_.all.begin(), tokens_.all.end(),
                     [](const Token& a, const Token& b) { return a.end < b.end; });
    machine();
    return std::move(tokens_);
  }

 private:
  void session(uint32_t number, uint16_t slot) {
    Token token;
    std::vector<const Record*> parts;   // since the token before
    uint64_t run_begin = 0, run_end = 0;
    std::array<double, static_cast<size_t>(Counter::count)> before{};
    std::array<bool, static_cast<size_t>(Counter::count)> known{};
    bool first = true;
    uint64_t files_read_at = 0;
    for (const Record& record : trace_.tracks[number].records) {
      if (record.kind == Kind::counter && record.layer < static_cast<uint16_t>(Counter::count)) {
        const size_t which = record.layer;
        const auto counter = static_cast<Counter>(which);
        if ((counter == Counter::run_delay_ns || counter == Counter::psi_cpu_us) && record.begin != files_read_at) {
          token.covered = files_read_at != 0 ? seconds(record.begin - files_read_at) : 0;
          files_read_at = record.begin;
        }
        const auto value = static_cast<double>(record.value);
        if (is_reading(counter)) token.counters[which] = value;
        else if (known[which]) token.counters[which] = value - before[which];
        before[which] = value;
        known[which] = tokens_.counted[which] = true;
      } else if (record.kind == Kind::run_model) {
        run_begin = record.begin;
        run_end = record.end;
      } else if (record.kind == Kind::token) {
        for (const Record* part : parts) {   // those before it are of a prompt that was read by itself
          if (part->begin >= record.begin) token.seconds[static_cast<size_t>(*part_of(part->kind))] += span(*part);
        }
        parts.clear();
        finish(token, record, run_begin, run_end, slot);
        token.session = number;
        token.decoded = token.decoded && !first;
        tokens_.all.push_back(std::exchange(token, Token()));
        run_begin = run_end = 0;
        first = false;
      } else if (part_of(record.kind)) {
        parts.push_back(&record);
      }
    }
  }

  // A prompt of one token is a decode pass like any other, but nothing was generated before it: see session().
  void finish(Token& token, const Record& record, uint64_t run_begin, uint64_t run_end, uint16_t slot) {
    token.begin = trace_.seconds(record.begin);
    token.end = trace_.seconds(record.end);
    token.prompt_tokens = record.bytes;
    token.context = record.value;
    token.decoded = record.bytes <= 1;
    double in_passes = 0;
    // Passes of all sessions, in order; a pass belongs to the token of its session whose run_model it lies in.
    const auto starts_before = [](const Pass& pass, uint64_t at) { return pass.begin < at; };
    for (auto pass = std::lower_bound(passes_.begin(), passes_.end(), run_begin, starts_before);
         pass != passes_.end() && pass->begin < run_end; ++pass) {
      if (pass->end > run_end || (pass->slot != slot && pass->slot != Record::kNoLayer)) continue;
      const double total = seconds(pass->end - pass->begin);
      double named = 0;
      for (size_t part = 0; part < kParts; ++part) {
        const double part_seconds = seconds(pass->ticks[part]);
        token.seconds[part] += part_seconds;
        if (part != static_cast<size_t>(Part::turn_wait)) named += part_seconds;   // before the pass
        else in_passes += part_seconds;
      }
      token.seconds[static_cast<size_t>(Part::pass_gap)] += std::max(0.0, total - named);
      token.prepared += seconds(pass->prepared);
      in_passes += total;
    }
    double outside = 0;
    for (const Part part : {Part::session, Part::sampling, Part::detokenize, Part::callback, Part::evidence})
      outside += token[part];
    token.seconds[static_cast<size_t>(Part::gap)] = std::max(0.0, token.total() - in_passes - outside);
  }

  // Readings of the machine come a few times a second: each token gets the growth between those around its end, or where
  // the counter does not grow, the later one.
  void machine() {
    for (const TraceTrack& track : trace_.tracks) {
      if (track.name != "machine") continue;
      for (size_t which = 0; which < static_cast<size_t>(Counter::count); ++which) spread(track, which);
    }
  }

  void spread(const TraceTrack& track, size_t which) {
    double previous = 0, growth = 0, until = 0;
    bool known = false;
    size_t token = 0;
    for (const Record& record : track.records) {
      if (record.kind != Kind::counter || record.layer != which) continue;
      const double at = trace_.seconds(record.begin);
      const auto value = static_cast<double>(record.value);
      if (is_reading(static_cast<Counter>(which))) growth = value;
      else if (known) growth = value - previous;
      until = at;
      for (; token < tokens_.all.size() && tokens_.all[token].end <= until; ++token) {
        tokens_.all[token].counters[which] = growth;
      }
      previous = value;
      known = tokens_.counted[which] = true;
    }
    for (; known && token < tokens_.all.size(); ++token) tokens_.all[token].counters[which] = growth;
  }

  double seconds(uint64_t ticks) const { return static_cast<double>(ticks) * trace_.scale.ns_per_tick() * 1e-9; }
  double span(const Record& record) const { return seconds(record.end - record.begin); }

  const Trace& trace_;
  std::vector<Pass> passes_;
  Tokens tokens_;
};

}  // namespace

const char* name_of(Part part) { return kPartNames[static_cast<size_t>(part)]; }

double Token::accounted() const {
  const double length = total();
  if (length <= 0) return 1;
  double named = 0;
  for (size_t part = 0; part < kParts; ++part) named += seconds[part];
  named -= (*this)[Part::pass_gap] + (*this)[Part::gap];
  return 1 - std::abs(length - named) / length;
}

Result<Tokens> tokens_of(const Trace& trace) { return Joiner(trace).join(); }

}  // namespace sluice::trace
