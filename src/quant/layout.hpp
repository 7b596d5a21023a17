// SPDX-License-Identifier: Apache-2.0
// Row-major numbers into the container's layouts (storage/tile.hpp), a run of rows at a time.
#pragma once

#include <cstdint>
#include <span>

#include "quant/rounding.hpp"
#include "storage/manifest.hpp"

namespace sluice::quant {

// Integer codes with their group parameters, row-major. Spans borrow.
struct Codes {
  std::span<const uint8_t> values;   // rows x cols: int4 as 0..15, int8 as two's complement
  std::span<const uint16_t> scales;  // rows x ceil(cols / group), FP16 bits
  std::span<const uint16_t> bias;    // the same, or empty
  std::span<const uint8_t> zeros = {};  // int4: the same, or empty; not together with bias
};

// The planes of int4 and int8 codes. `tensor` describes exactly these rows; padding becomes zero bytes. Embeddings (int8
// in `rows`) get their row sums.
Planes lay_out_codes(const storage::Tensor& tensor, const Codes& codes);

// The planes of f16 and bf16 elements (bit patterns, rows x cols) in either layout.
Planes lay_out_halves(const storage::Tensor& tensor, std::span<const uint16_t> elements);

// The plane of f32 in `rows`.
Planes lay_out_floats(const storage::Tensor& tensor, std::span<const float> values);

}  // namespace sluice::quant
