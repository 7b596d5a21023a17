// SPDX-License-Identifier: Apache-2.0
// RoPE parameters, as checkpoints give them, into inverse frequencies.
#pragma once

#include <cstdint>
#include <string>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

struct RopeParameters {
  std::string type = "default";       // default (or none), linear, llama3
  double theta = 10000.0;
  double factor = 1.0;                // linear, llama3
  double low_freq_factor = 1.0;       // llama3 only, as the next two
  double high_freq_factor = 4.0;
  double original_context = 8192.0;
  uint32_t rotary_dims = 0;           // even
};

// inverse_frequencies[i] = theta^(-2i / rotary_dims), then
//   linear  / factor
//   llama3  wavelength w = 2 pi / f: f if w < original / high, f / factor if w > original / low, between them
//           (1 - s) f / factor + s f with s = (original / w - low) / (high - low)
// Source: modeling_rope_utils of Hugging Face transformers, and the Llama 3.1 reference code.
// Errors: corrupt (a number out of range), unsupported (another type, named); `where` begins the message.
Result<storage::Rope> make_rope(const RopeParameters& parameters, const std::string& where);

}  // namespace sluice::import
