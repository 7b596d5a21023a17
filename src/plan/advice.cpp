// SPDX-License-Identifier: Apache-2.0
#include "plan/advice.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>

namespace sluice::plan {
namespace {

constexpr double kUnseenShare = 0.1;  // of the limit: losses below it count as none
constexpr double kCloseRate = 0.9;    // of the fastest: as good as it

std::string name_of(const Candidate& candidate) {
  return candidate.recipe + (candidate.residual ? " with residuals" : "");
}

const char* why_so_strict(Workload workload) {
  switch (workload) {
    case Workload::general:
      return "a conversation forgives another word now and then";
    case Workload::math:
      return "a proof or a calculation builds on thousands of its own tokens";
    case Workload::code:
      return "a program is wrong by one token";
  }
  return "";
}

// The member of `among` with the greatest key.
template <class Key>
size_t best_by(const std::vector<size_t>& among, const Key& key) {
  return *std::max_element(among.begin(), among.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
}

}  // namespace

std::string_view name_of(Workload workload) {
  switch (workload) {
    case Workload::general:
      return "general";
    case Workload::math:
      return "math";
    case Workload::code:
      return "code";
  }
  return "unknown";
}

double loss_limit(Workload workload) {
  switch (workload) {
    case Workload::general:
      return 0.2;
    case Workload::math:
      return 0.01;
    case Workload::code:
      return 0.1;
  }
  return 0;
}

Decision choose(std::span<const Candidate> candidates, Workload workload, double wanted) {
  Decision decision;
  const auto say = [&](std::string sentence) { decision.reasons.push_back(std::move(sentence)); };
  std::vector<size_t> fitting, good, fast;
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (candidates[i].fits) fitting.push_back(i);
  }
  if (fitting.empty()) {
    say("no recipe fits: a KV cache for this context and the largest matrices leave no room; take a shorter context or "
        "a "
        "smaller model");
    return decision;
  }
  if (fitting.size() < candidates.size()) {
    say(fmt::format("{} of {} candidates do not fit at all", candidates.size() - fitting.size(), candidates.size()));
  }

  const double limit = loss_limit(workload);
  std::copy_if(fitting.begin(), fitting.end(), std::back_inserter(good),
               [&](size_t i) { return candidates[i].kl <= limit; });
  say(fmt::format("{} allows a mean KL divergence of {} nats, since {}: {} of {} candidates are good enough",
                  name_of(workload), limit, why_so_strict(workload), good.size(), fitting.size()));
  if (good.empty()) {
    good.push_back(best_by(fitting, [&](size_t i) { return -candidates[i].kl; }));
    say(fmt::format("the least lossy of them is taken all the same, {}", name_of(candidates[good.front()])));
  }

  std::copy_if(good.begin(), good.end(), std::back_inserter(fast),
               [&](size_t i) { return candidates[i].tokens_per_second >= wanted; });
  if (!fast.empty()) {
    const auto visible_loss = [&](size_t i) {
      return candidates[i].kl <= kUnseenShare * limit ? 0.0 : candidates[i].kl;
    };
    decision.candidate =
        best_by(fast, [&](size_t i) { return std::tuple(-visible_loss(i), candidates[i].tokens_per_second); });
    const Candidate& best = candidates[*decision.candidate];
    say(fmt::format(
        "{} of them reach {:.3g} tok/s; {} loses least ({:.2g} nats; below {:.2g} counts as none) and is the "
        "fastest of those that lose no more, with {:.3g} tok/s",
        fast.size(), wanted, name_of(best), best.kl, kUnseenShare * limit, best.tokens_per_second));
    return decision;
  }

  const auto rate = [&](size_t i) { return candidates[i].tokens_per_second; };
  const size_t fastest = best_by(good, [&](size_t i) { return std::tuple(rate(i), -candidates[i].kl); });
  std::vector<size_t> close;
  std::copy_if(good.begin(), good.end(), std::back_inserter(close),
               [&](size_t i) { return rate(i) >= kCloseRate * rate(fastest); });
  const auto two_speeds = [&](size_t i) { return candidates[i].residual && candidates[i].streams; };
  decision.candidate = best_by(close, [&](size_t i) { return std::tuple(two_speeds(i), -candidates[i].kl, rate(i)); });
  const Candidate& best = candidates[*decision.candidate];
  if (rate(fastest) > 0) {
    say(fmt::format("none of them reaches {:.3g} tok/s, so speed decides: {} has {:.3g}", wanted,
                    name_of(candidates[fastest]), rate(fastest)));
  } else {
    say("no speed is known, since bandwidths are not");
  }
  if (*decision.candidate == fastest) return decision;
  say(two_speeds(*decision.candidate)
          ? fmt::format(
                "{} is as fast within a tenth ({:.3g}), and its residuals cross the bus only for prompts that need "
                "them (run --precision auto)",
                name_of(best), best.tokens_per_second)
          : fmt::format("{} is as fast within a tenth ({:.3g}) and loses less", name_of(best), best.tokens_per_second));
  return decision;
}

}  // namespace sluice::plan
