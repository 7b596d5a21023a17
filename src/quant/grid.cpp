// SPDX-License-Identifier: Apache-2.0
#include "quant/grid.hpp"

#include <cmath>
#include <limits>

namespace sluice::quant {
namespace {

constexpr float kClipStep = 0.03f;  // neighbours differ by less than 1% in error

// Eight partial sums in a fixed order: the compiler turns them into vectors, and every machine gets the same bits.
float weighted_error(std::span<const float> weights, std::span<const float> importance, float scale, float lowest,
                     float highest) {
  const float inverse = 1.0f / scale;
  float partial[8] = {};
  const auto one = [&](size_t i, size_t lane) {
    const float steps = std::min(highest, std::max(lowest, weights[i] * inverse));
    const float error = weights[i] - ((steps + 12582912.0f) - 12582912.0f) * scale;
    partial[lane] += importance[i] * error * error;
  };
  size_t i = 0;
  for (; i + 8 <= weights.size(); i += 8) {
    for (size_t lane = 0; lane < 8; ++lane) one(i + lane, lane);
  }
  for (; i < weights.size(); ++i) one(i, i % 8);
  float sum = 0;
  for (const float part : partial) sum += part;
  return sum;
}

class Search {
 public:
  Search(std::span<const float> weights, std::span<const float> importance)
      : weights_(weights), importance_(importance) {}

  void consider(float wanted_scale, int32_t zero) {
    const float scale = float_from_half(half_from_float(wanted_scale));
    if (scale == 0 || !std::isfinite(scale)) return;
    const float error =
        weighted_error(weights_, importance_, scale, static_cast<float>(-zero), static_cast<float>(15 - zero));
    if (error < least_) {
      least_ = error;
      best = {scale, zero};
    }
  }

  Int4Grid best;

 private:
  std::span<const float> weights_, importance_;
  float least_ = std::numeric_limits<float>::infinity();
};

}  // namespace

Int4Grid find_int4_grid(std::span<const float> weights, std::span<const float> importance, bool symmetric,
                       int clip_steps) {
  float lowest = 0, highest = 0;
  for (const float weight : weights) {
    lowest = std::min(lowest, weight);
    highest = std::max(highest, weight);
  }
  Search search(weights, importance);
  for (int step = 0; step < clip_steps; ++step) {
    const float share = 1.0f - kClipStep * static_cast<float>(step);
    if (symmetric) {
      const float extreme = -lowest > highest ? lowest : highest;
      search.consider(share * extreme / -8.0f, 8);
      search.consider(share * std::fabs(extreme) / 7.0f, 8);
    } else {
      const float scale = share * (highest - lowest) / 15.0f;
      if (scale <= 0) break;
      const float zero = std::round(-share * lowest / scale);
      search.consider(scale, static_cast<int32_t>(std::min(15.0f, std::max(0.0f, zero))));
    }
  }
  return search.best;
}

}  // namespace sluice::quant
