// SPDX-License-Identifier: Apache-2.0
#include "model/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.hpp"

namespace sluice::model {

namespace {

// First guess of how many candidates top_p keeps. Sorting all of 128,256 takes 8 ms, sorting 256 of them 0.3 ms.
constexpr size_t kFirstSorted = 256;
// Logits that are looked at together: one comparison says that none of them matters.
constexpr size_t kBlock = 64;

// Ties by id, so that the result does not depend on the sort.
constexpr auto kLikelier = [](const auto& a, const auto& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
};

// Four at a time: a plain loop is not made vectors of, because comparisons may trap. Any order gives the same.
typedef float Float4 __attribute__((vector_size(16)));

float largest_of(std::span<const float> logits) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  Float4 most[4] = {{kNone, kNone, kNone, kNone}, {kNone, kNone, kNone, kNone}, {kNone, kNone, kNone, kNone},
                    {kNone, kNone, kNone, kNone}};
  size_t i = 0;
  for (; i + 16 <= logits.size(); i += 16) {
    for (size_t k = 0; k < 4; ++k) {
      Float4 x;
      std::memcpy(&x, logits.data() + i + 4 * k, sizeof x);
      most[k] = most[k] < x ? x : most[k];
    }
  }
  for (const size_t k : {1, 2, 3}) most[0] = most[0] < most[k] ? most[k] : most[0];
  float largest = std::max(std::max(most[0][0], most[0][1]), std::max(most[0][2], most[0][3]));
  for (; i < logits.size(); ++i) largest = std::max(largest, logits[i]);
  return largest;
}

}  // namespace

// The first block that holds the largest value, then where it is first in there. 128,256 logits take 10 us on an EPYC
// core; std::max_element takes 100.
int32_t argmax(std::span<const float> logits) {
  float largest = -std::numeric_limits<float>::infinity();
  size_t first = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const float of_block = largest_of(logits.subspan(begin, std::min(kBlock, logits.size() - begin)));
    if (!(of_block > largest)) continue;
    largest = of_block;
    first = begin;
  }
  return static_cast<int32_t>(std::find(logits.begin() + static_cast<ptrdiff_t>(first), logits.end(), largest) -
                              logits.begin());
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

  size_t kept = candidates_.size();
  size_t sorted = 0;
  if (settings_.top_k > 0 && static_cast<size_t>(settings_.top_k) < kept) {
    kept = static_cast<size_t>(settings_.top_k);
    sorted = sort_leading(kept, gather_leading(logits, kept));
  } else {
    for (size_t i = 0; i < logits.size(); ++i) candidates_[i] = {logits[i], static_cast<int32_t>(i)};
  }
  if (settings_.top_p < 1) {
    kept = keep_top_p(kept, sorted);
    sorted = kept;
  }
  if (settings_.min_p > 0) kept = keep_min_p(kept, sorted);
  return draw(kept);
}

// Makes candidates of logits among which the `wanted` likeliest are; returns how many. In one walk: whatever is above
// the least of the `wanted` likeliest so far, which rises each time the room is full. Ids ascend on the way, so that
// of equals those already there stay. (40 of 128,256, draw included: 22 us; 1300 when all were made candidates.)
size_t Sampler::gather_leading(std::span<const float> logits, size_t wanted) {
  const size_t room = 2 * wanted + kBlock;
  const bool fits = room + kBlock <= candidates_.size();
  float least = -std::numeric_limits<float>::infinity();
  size_t count = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const std::span<const float> block = logits.subspan(begin, std::min(kBlock, logits.size() - begin));
    if (!(largest_of(block) > least)) continue;
    for (size_t i = 0; i < block.size(); ++i) {
      if (block[i] > least) candidates_[count++] = {block[i], static_cast<int32_t>(begin + i)};
    }
    if (!fits || count < room) continue;
    const auto last = candidates_.begin() + static_cast<ptrdiff_t>(wanted - 1);
    std::nth_element(candidates_.begin(), last, candidates_.begin() + static_cast<ptrdiff_t>(count), kLikelier);
    least = last->logit;
    count = wanted;
  }
  return count;
}

// Puts the `wanted` likeliest of the first `count` candidates first, in order.
size_t Sampler::sort_leading(size_t wanted, size_t count) {
  const auto middle = candidates_.begin() + static_cast<ptrdiff_t>(wanted);
  const auto end = candidates_.begin() + static_cast<ptrdiff_t>(count);
  if (wanted < count) std::nth_element(candidates_.begin(), middle, end, kLikelier);
  std::sort(candidates_.begin(), middle, kLikelier);
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
    if (count == sorted) sorted = sort_leading(std::min(kept, std::max(kFirstSorted, 8 * sorted)), candidates_.size());
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
