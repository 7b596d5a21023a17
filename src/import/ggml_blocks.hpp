// SPDX-License-Identifier: Apache-2.0
// ggml's quantized block formats: to float, and, where the container has the same values, to codes as they are.
//
//   bytes of a block, in order (d, m, dmin: FP16; K formats hold 256 weights, the others 32)
//   Q4_0  d, 16 q      value = (q - 8) d             nibble i: weight i (low), weight i + 16 (high)
//   Q4_1  d, m, 16 q   value = q d + m
//   Q5_0  d, u32 h, 16 q   value = (q5 - 16) d       bit i of h is bit 4 of weight i
//   Q5_1  d, m, u32 h, 16 q   value = q5 d + m
//   Q8_0  d, 32 int8   value = q d
//   Q2_K  16 sc, 64 q2, d, dmin    value = d (sc & 15) q - dmin (sc >> 4), per 16 weights
//   Q3_K  32 h, 64 q2, 12 sc, d    value = d (sc6 - 32) (q3 - 4), per 16
//   Q4_K  d, dmin, 12 sc, 128 q4   value = d sc6 q - dmin m6, per 32
//   Q5_K  d, dmin, 12 sc, 32 h, 128 q4   value = d sc6 q5 - dmin m6, per 32
//   Q6_K  128 q4, 64 q2, 16 int8 sc, d   value = d sc (q6 - 32), per 16
// Source: the GGUF specification and the reference dequantization that ships with the `gguf` Python package.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "import/checkpoint.hpp"

namespace sluice::import {

inline constexpr uint32_t kBlockElems = 32;
inline constexpr uint32_t kSuperBlockElems = 256;

// Every weight of consecutive elements or blocks as float. `bytes` holds exactly out.size() weights.
void decode_to_float(SourceType type, std::span<const std::byte> bytes, std::span<float> out);

// The codes of Q4_0, Q4_1 and Q8_0 blocks, weight by weight, with their FP16 parameters: (0..15, d), (0..15, d, m),
// (int8, d). `bias` is filled for Q4_1 only.
void decode_to_codes(SourceType type, std::span<const std::byte> bytes, std::span<uint8_t> codes,
                     std::span<uint16_t> scales, std::span<uint16_t> bias);

}  // namespace sluice::import
