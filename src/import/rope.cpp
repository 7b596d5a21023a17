// SPDX-License-Identifier: Apache-2.0
#include "import/rope.hpp"

#include <fmt/format.h>

#include <cmath>
#include <numbers>

#include "import/text.hpp"

namespace sluice::import {

Result<storage::Rope> make_rope(const RopeParameters& parameters, const std::string& where) {
  const bool plain = parameters.type == "default" || parameters.type == "none";
  const bool linear = parameters.type == "linear";
  const bool llama3 = parameters.type == "llama3";
  if (!plain && !linear && !llama3) {
    return fail(ErrorCode::unsupported, fmt::format("{}: RoPE scaling of type {}; supported are none, linear and llama3",
                                                    where, in_quotes(parameters.type)));
  }
  if (!(parameters.theta > 1.0) || !std::isfinite(parameters.theta)) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the RoPE base is {}, expected above 1", where, parameters.theta));
  }
  if (!plain && (!(parameters.factor > 0) || !std::isfinite(parameters.factor))) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the RoPE scaling factor is {}", where, parameters.factor));
  }
  if (llama3 && (!(parameters.low_freq_factor > 0) || !(parameters.high_freq_factor > parameters.low_freq_factor) ||
                 !(parameters.original_context > 0))) {
    return fail(ErrorCode::corrupt,
                fmt::format("{}: RoPE scaling \"llama3\" with low_freq_factor {}, high_freq_factor {} and "
                            "original_max_position_embeddings {}", where, parameters.low_freq_factor,
                            parameters.high_freq_factor, parameters.original_context));
  }
  if (parameters.rotary_dims == 0 || parameters.rotary_dims % 2 != 0) {
    return fail(ErrorCode::corrupt, fmt::format("{}: RoPE over {} dimensions; an even number is needed", where,
                                                parameters.rotary_dims));
  }
  storage::Rope rope;
  rope.rotary_dims = parameters.rotary_dims;
  for (uint32_t i = 0; i < parameters.rotary_dims / 2; ++i) {
    double frequency = std::pow(parameters.theta, -2.0 * i / parameters.rotary_dims);
    if (linear) frequency /= parameters.factor;
    if (llama3) {
      const double wavelength = 2 * std::numbers::pi / frequency;
      if (wavelength > parameters.original_context / parameters.low_freq_factor) {
        frequency /= parameters.factor;
      } else if (wavelength >= parameters.original_context / parameters.high_freq_factor) {
        const double smooth = (parameters.original_context / wavelength - parameters.low_freq_factor) /
                              (parameters.high_freq_factor - parameters.low_freq_factor);
        frequency = (1 - smooth) * frequency / parameters.factor + smooth * frequency;
      }
    }
    rope.inverse_frequencies.push_back(static_cast<float>(frequency));
  }
  return rope;
}

}  // namespace sluice::import
