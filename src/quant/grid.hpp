// SPDX-License-Identifier: Apache-2.0
// The grid of INT4 values of one group: scale and zero point by a search for the least weighted error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "base/half.hpp"

namespace sluice::quant {

// Values (q - zero) * scale for q in 0..15. The scale is one that FP16 holds.
struct Int4Grid {
  float scale = 0;
  int32_t zero = 8;

  uint8_t code(float weight) const {
    if (scale == 0) return static_cast<uint8_t>(zero);
    // Rounds to nearest, ties to even, of |x| < 2^22; clamped first so that it stays there.
    const float steps = std::min(64.0f, std::max(-64.0f, weight / scale));
    const int32_t rounded = static_cast<int32_t>((steps + 12582912.0f) - 12582912.0f) + zero;
    return static_cast<uint8_t>(std::min(15, std::max(0, rounded)));
  }
  float value(uint8_t code) const { return static_cast<float>(static_cast<int32_t>(code) - zero) * scale; }
};

// Clipped ranges that are tried. Weights never won by less than half their range; what GPTQ left of them has outliers.
constexpr int kClipSteps = 17, kResidualClipSteps = 27;

// The grid that minimizes sum importance[k] * (weight[k] - nearest value)^2 among `clip_steps` ranges: 1, 0.97, 0.94... of
// the largest magnitude, with the extreme on -8 or on +-7 (symmetric: zero is 8), or of the range from lowest to highest
// weight, 0 included (asymmetric: zero in 0..15). A group of zeros has scale 0 (symmetric) or a grid that holds 0.
// `importance`: one per weight, >= 0; the diagonal of the inputs' second moments.
Int4Grid find_int4_grid(std::span<const float> weights, std::span<const float> importance, bool symmetric,
                       int clip_steps = kClipSteps);

}  // namespace sluice::quant
