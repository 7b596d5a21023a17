// SPDX-License-Identifier: Apache-2.0
#include "model/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "catch.hpp"

namespace {

using sluice::model::argmax;
using sluice::model::Sampler;
using sluice::model::SamplerSettings;

std::map<int32_t, int> draw(const SamplerSettings& settings, const std::vector<float>& logits, int draws,
                            const std::vector<int32_t>& recent = {}) {
  Sampler sampler(settings, static_cast<uint32_t>(logits.size()));
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) ++counts[sampler.sample(logits, recent)];
  return counts;
}

std::vector<float> random_logits(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

std::vector<float> log_of(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)) + 3);
  return logits;
}

}  // namespace

TEST_CASE("temperature 0 takes the likeliest token, and of equals the first") {
  CHECK(argmax(std::vector<float>{1, 5, 2, 5}) == 1);
  CHECK(draw({.temperature = 0, .top_k = 1, .top_p = 0.1f}, {1, 5, 2, 5}, 3) == std::map<int32_t, int>{{1, 3}});
}

TEST_CASE("draws follow the softmax at the temperature") {
  const std::vector<double> p = {0.1, 0.2, 0.3, 0.4};
  const int draws = 40000;
  for (const double temperature : {0.5, 1.0, 2.0}) {
    double total = 0;
    for (const double x : p) total += std::pow(x, 1 / temperature);
    auto counts = draw({.temperature = static_cast<float>(temperature), .seed = 7}, log_of(p), draws);
    for (int i = 0; i < 4; ++i) {
      const double expected = std::pow(p[static_cast<size_t>(i)], 1 / temperature) / total;
      // Five standard deviations of a binomial count.
      const double bound = 5 * std::sqrt(expected * (1 - expected) / draws);
      CHECK(std::abs(counts[i] / static_cast<double>(draws) - expected) <= bound);
    }
  }
}

TEST_CASE("top_k keeps the k likeliest") {
  const std::vector<float> logits = random_logits(5000, 1);
  std::vector<int32_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  const std::set<int32_t> allowed(order.begin(), order.begin() + 10);
  const auto counts = draw({.temperature = 5, .top_k = 10}, logits, 5000);
  CHECK(counts.size() == 10);
  for (const auto& [id, count] : counts) CHECK(allowed.count(id) == 1);
}

TEST_CASE("the likeliest token is found wherever it is, at every length") {
  for (size_t size = 1; size <= 300; ++size) {
    std::vector<float> logits(size, -3.0f);
    for (size_t at = 0; at < size; at += 1 + size / 7) {
      logits[at] = 2.5f;
      if (at + 1 < size) logits[size - 1] = 2.5f;   // an equal one behind it
      REQUIRE(argmax(logits) == static_cast<int32_t>(at));
      logits[at] = logits[size - 1] = -3.0f;
    }
  }
  CHECK(argmax(std::vector<float>{-0.0f, 0.0f}) == 0);
}

TEST_CASE("top_k draws what sorting everything would draw, ties included") {
  std::mt19937 random(std::random_device{}());
  for (const size_t vocab : {1u, 2u, 63u, 64u, 200u, 4096u, 50000u}) {
    for (const int top_k : {1, 2, 40, 1000}) {
      for (const bool ties : {false, true}) {
        const auto seed = static_cast<uint32_t>(random());
        INFO("vocabulary " << vocab << ", top_k " << top_k << ", ties " << ties << ", seed " << seed);
        std::vector<float> logits = random_logits(vocab, seed);
        // Few different values; and the reverse of what a walk through ascending ids likes, where there are none.
        if (ties) for (float& logit : logits) logit = std::round(logit);
        else if (seed % 2 == 0) std::sort(logits.begin(), logits.end());
        std::vector<int32_t> order(vocab);
        for (size_t i = 0; i < vocab; ++i) order[i] = static_cast<int32_t>(i);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
        order.resize(std::min<size_t>(vocab, static_cast<size_t>(top_k)));
        // The draw alone, from logits that are sorted already; with the same seed it takes the same places.
        std::vector<float> sorted;
        for (const int32_t id : order) sorted.push_back(logits[static_cast<size_t>(id)]);
        Sampler whole({.temperature = 1, .top_k = top_k, .seed = 5}, static_cast<uint32_t>(vocab));
        Sampler leading({.temperature = 1, .seed = 5}, static_cast<uint32_t>(sorted.size()));
        const bool all = static_cast<size_t>(top_k) >= vocab;   // then nothing is sorted
        for (int i = 0; i < 20 && !all; ++i) {
          REQUIRE(whole.sample(logits, {}) == order[static_cast<size_t>(leading.sample(sorted, {}))]);
        }
      }
    }
  }
}

TEST_CASE("top_p keeps the fewest tokens that reach it, sorted in parts or whole") {
  CHECK(draw({.temperature = 1, .top_p = 0.65f}, log_of({0.1, 0.2, 0.3, 0.4}), 2000).size() == 2);
  CHECK(draw({.temperature = 1, .top_p = 0.75f}, log_of({0.1, 0.2, 0.3, 0.4}), 2000).size() == 3);
  CHECK(draw({.temperature = 1, .top_p = 0.0f}, log_of({0.1, 0.2, 0.3, 0.4}), 200).size() == 1);
  // 3000 equal tokens: 0.9 of them takes several rounds of partial sorting; ties fall to the smallest ids.
  const auto counts = draw({.temperature = 1, .top_p = 0.9f}, std::vector<float>(3000, 1.0f), 60000);
  CHECK(counts.rbegin()->first < 2701);
  CHECK(counts.size() > 2690);
}

TEST_CASE("min_p drops what is less likely than its share of the likeliest, with top_k or alone") {
  for (const int top_k : {0, 4}) {
    const auto counts = draw({.temperature = 1, .top_k = top_k, .min_p = 0.6f}, log_of({0.1, 0.2, 0.3, 0.4}), 2000);
    CHECK(counts.size() == 2);
    CHECK(counts.count(2) == 1);
    CHECK(counts.count(3) == 1);
  }
}

TEST_CASE("the repeat penalty divides positive logits, multiplies negative ones, once per token of the last 64") {
  const std::vector<float> logits = {2.0f, 1.5f, -1.0f};
  CHECK(draw({.temperature = 0, .repeat_penalty = 1.5f}, logits, 1, {0, 0, 0}).begin()->first == 1);
  CHECK(draw({.temperature = 0, .repeat_penalty = 1.2f}, logits, 1, {0, 0, 0}).begin()->first == 0);
  const std::vector<float> negative = {-1.0f, -1.5f};
  CHECK(draw({.temperature = 0, .repeat_penalty = 2.0f}, negative, 1, {0}).begin()->first == 1);
  std::vector<int32_t> long_ago(65, 1);
  long_ago[0] = 0;   // beyond the window
  CHECK(draw({.temperature = 0, .repeat_penalty = 2.0f}, {2.0f, 1.9f}, 1, long_ago).begin()->first == 0);
}

TEST_CASE("a penalty that makes a logit infinite makes its token certain, whatever else is asked for") {
  const std::vector<float> logits = {1.0f, 3.0f, 2.0f, -1.0f};
  const std::vector<int32_t> recent = {2};
  for (const float penalty : {0.0f, 1e-45f}) {
    for (const SamplerSettings& asked : {SamplerSettings{}, SamplerSettings{.temperature = 1},
                                         SamplerSettings{.temperature = 1, .top_k = 2},
                                         SamplerSettings{.temperature = 1, .top_p = 0.5f},
                                         SamplerSettings{.temperature = 1, .min_p = 0.1f}}) {
      SamplerSettings settings = asked;
      settings.repeat_penalty = penalty;
      Sampler sampler(settings, 4);
      CHECK(sampler.sample(logits, recent) == 2);
    }
  }
}

TEST_CASE("everything off draws from the whole vocabulary") {
  CHECK(draw({.temperature = 1}, std::vector<float>(50, 0.0f), 5000).size() == 50);
}

TEST_CASE("a draw from any number of tokens takes the place that double precision gives it") {
  std::mt19937 random(std::random_device{}());
  for (const size_t vocab : {1u, 3u, 63u, 64u, 65u, 127u, 1000u, 49152u}) {
    for (const float temperature : {0.05f, 0.6f, 1.0f, 30.0f}) {
      const auto seed = static_cast<uint32_t>(random());
      INFO("vocabulary " << vocab << ", temperature " << temperature << ", seed " << seed);
      std::vector<float> logits = random_logits(vocab, seed);
      if (vocab > 1) logits[seed % vocab] = -1e4f;   // no weight at all
      std::vector<double> up_to = {0};   // sums of weights, of the tokens before each
      const float largest = *std::max_element(logits.begin(), logits.end());
      for (const float logit : logits) {
        up_to.push_back(up_to.back() + std::exp((static_cast<double>(logit) - static_cast<double>(largest)) /
                                                static_cast<double>(temperature)));
      }
      Sampler sampler({.temperature = temperature, .seed = seed}, static_cast<uint32_t>(vocab));
      uint64_t state = seed;
      for (int i = 0; i < 50; ++i) {
        uint64_t z = (state += 0x9e3779b97f4a7c15u);   // splitmix64
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        const double drawn = static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53 * up_to.back();
        const auto id = static_cast<size_t>(sampler.sample(logits, {}));
        REQUIRE(id < vocab);
        REQUIRE(drawn >= up_to[id] - 1e-6 * up_to.back());
        REQUIRE(drawn <= up_to[id + 1] + 1e-6 * up_to.back());
      }
    }
  }
}

TEST_CASE("top_p and min_p keep of many tokens those that double precision keeps") {
  std::mt19937 random(std::random_device{}());
  const auto seed = static_cast<uint32_t>(random());
  INFO("seed " << seed);
  std::vector<float> logits = random_logits(5000, seed);
  std::vector<float> sorted = logits;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto weight = [&](float logit) { return std::exp(static_cast<double>(logit - sorted[0])); };
  double total = 0;
  for (const float logit : sorted) total += weight(logit);
  double sum = 0;
  size_t kept = 0;
  while (sum < 0.8 * total) sum += weight(sorted[kept++]);
  for (const auto& [settings, least] : {std::pair(SamplerSettings{.temperature = 9, .top_p = 0.8f}, sorted[kept - 1]),
                                        std::pair(SamplerSettings{.temperature = 9, .min_p = 0.02f},
                                                  sorted[0] + std::log(0.02f))}) {
    float seen = sorted[0];
    for (const auto& [id, count] : draw(settings, logits, 40000)) {
      seen = std::min(seen, logits[static_cast<size_t>(id)]);
    }
    CHECK(seen >= least - 2e-2f);   // a weight at top_p's border may fall on either side of it
    CHECK(seen <= least + 0.5f);
  }
}
