// SPDX-License-Identifier: Apache-2.0
// The next token out of logits. Everything is allocated at creation: one step takes no memory.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace sluice::model {

// Applied in this order, which is that of llama.cpp's chain: repeat_penalty over the last tokens, top_k, top_p, min_p,
// temperature, draw. top_p and min_p therefore look at the probabilities before the temperature.
struct SamplerSettings {
  float temperature = 0;       // 0: the likeliest token, and only repeat_penalty matters
  int32_t top_k = 0;           // 0: off
  float top_p = 1;             // 1: off
  float min_p = 0;             // 0: off
  float repeat_penalty = 1;    // 1: off; positive logits of recent tokens are divided by it, negative ones multiplied
  uint64_t seed = 1;
};

inline constexpr size_t kPenaltyTokens = 64;   // how far back repeat_penalty looks

// One sequence of draws. The same settings, seed and logits give the same tokens on every machine.
class Sampler {
 public:
  Sampler(const SamplerSettings& settings, uint32_t vocab);

  // `logits`: FP32 [vocab], finite. `recent`: the sequence so far, of which the last kPenaltyTokens count.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> recent);

 private:
  struct Candidate {
    float logit = 0;
    int32_t id = 0;
  };
  size_t gather_leading(std::span<const float> logits, size_t wanted);
  void sort_leading(size_t wanted, size_t count);
  size_t keep_top_p(std::span<const float> logits, float largest, size_t kept, bool chosen);
  size_t keep_min_p(std::span<const float> logits, float largest, size_t kept, bool chosen);
  double weigh(std::span<const float> logits, float largest, float temperature);
  double weigh_candidates(size_t kept, float largest, float temperature);
  size_t draw(size_t count, double total);
  double next_uniform();       // [0, 1)

  SamplerSettings settings_;
  uint64_t state_;
  std::vector<float> logits_;           // with the penalty
  std::vector<Candidate> candidates_;
  std::vector<float> chosen_;           // the candidates' logits
  std::vector<float> weights_;          // what weigh() was given, in whole blocks
  std::vector<double> sums_;            // of each block
};

// The likeliest token; of equals the one with the smallest id.
int32_t argmax(std::span<const float> logits);

}  // namespace sluice::model
