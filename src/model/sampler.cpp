// SPDX-License-Identifier: Apache-2.0
#include "model/sampler.hpp"

#include <algorithm>
#include <cmath>

#include "base/check.hpp"

namespace sluice::model {

namespace {

// First guess of how many candidates top_p keeps. Sorting all of 128,256 takes 8 ms, sorting 256 of them 0.3 ms.
constexpr size_t kFirstSorted = 256;

}  // namespace

int32_t argmax(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

Sampler::Sampler(const SamplerSettings& settings, uint32_t vocab)
    : settings_(settings), state_(settings.seed), logits_(vocab), candidates_(settings.temperature > 0 ? vocab : 0) {}

// splitmix64 (Steele, Lea, Flood 2014): std's distributions differ between libraries, this does not.
double Sampler::next_uniform() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> recent) {
  SLUICE_CHECK(logits.size() == logits_.size());
  if (settings_.repeat_penalty != 1) {
    std::copy(logits.begin(), logits.end(), logits_.begin());
    const std::span<const int32_t> last = recent.last(std::min(recent.size(), kPenaltyTokens));
    for (size_t i = 0; i < last.size(); ++i) {
      const bool seen = std::find(last.begin(), last.begin() + static_cast<ptrdiff_t>(i), last[i]) !=
                        last.begin() + static_cast<ptrdiff_t>(i);
      if (seen) continue;  // once per token, however often it came
      float& logit = logits_[static_cast<size_t>(last[i])];
      logit = logit > 0 ? logit / settings_.repeat_penalty : logit * settings_.repeat_penalty;
    }
    logits = logits_;
  }
  if (settings_.temperature <= 0) return argmax(logits);

  for (size_t i = 0; i < logits.size(); ++i) candidates_[i] = {logits[i], static_cast<int32_t>(i)};
  size_t kept = candidates_.size();
  size_t sorted = 0;
  if (settings_.top_k > 0 && static_cast<size_t>(settings_.top_k) < kept) {
    kept = static_cast<size_t>(settings_.top_k);
    sorted = sort_leading(kept);
  }
  if (settings_.top_p < 1) {
    kept = keep_top_p(kept, sorted);
    sorted = kept;
  }
  if (settings_.min_p > 0) kept = keep_min_p(kept, sorted);
  return draw(kept);
}

// Puts the `wanted` likeliest candidates first, in order; ties by id, so that the result does not depend on the sort.
size_t Sampler::sort_leading(size_t wanted) {
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  };
  const auto middle = candidates_.begin() + static_cast<ptrdiff_t>(wanted);
  if (wanted < candidates_.size()) std::nth_element(candidates_.begin(), middle, candidates_.end(), likelier);
  std::sort(candidates_.begin(), middle, likelier);
  return wanted;
}

// The fewest of the first `kept` candidates whose probabilities (among those) reach top_p; at least one.
size_t Sampler::keep_top_p(size_t kept, size_t sorted) {
  float largest = candidates_[0].logit;
  double total = 0;
  for (size_t i = 0; i < kept; ++i) largest = std::max(largest, candidates_[i].logit);
  for (size_t i = 0; i < kept; ++i) total += std::exp(static_cast<double>(candidates_[i].logit - largest));

  const double wanted = settings_.top_p * total;
  double sum = 0;
  size_t count = 0;
  while (count < kept) {
    if (count == sorted) sorted = sort_leading(std::min(kept, std::max(kFirstSorted, 8 * sorted)));
    sum += std::exp(static_cast<double>(candidates_[count].logit - largest));
    ++count;
    if (sum >= wanted) break;
  }
  return count;
}

// Those of at least min_p times the likeliest's probability, moved to the front in their order.
size_t Sampler::keep_min_p(size_t kept, size_t sorted) {
  float largest = candidates_[0].logit;
  for (size_t i = 0; i < kept; ++i) largest = std::max(largest, candidates_[i].logit);
  const float least = largest + std::log(settings_.min_p);
  if (sorted >= kept) {
    while (kept > 1 && candidates_[kept - 1].logit < least) --kept;
    return kept;
  }
  size_t count = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (candidates_[i].logit >= least) candidates_[count++] = candidates_[i];
  }
  return count;
}

int32_t Sampler::draw(size_t kept) {
  float largest = candidates_[0].logit;
  for (size_t i = 0; i < kept; ++i) largest = std::max(largest, candidates_[i].logit);
  double total = 0;
  const auto weight = [&](size_t i) {
    return std::exp(static_cast<double>(candidates_[i].logit - largest) / settings_.temperature);
  };
  for (size_t i = 0; i < kept; ++i) total += weight(i);
  double left = next_uniform() * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weight(i);
    if (left < 0) return candidates_[i].id;
  }
  return candidates_[kept - 1].id;  // rounding ate the last of it
}

}  // namespace sluice::model
