// SPDX-License-Identifier: Apache-2.0
// FP32 weights into the container's schemes by rounding to nearest, in the container's layouts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::quant {

// The planes of one tensor in memory, ready for ContainerWriter. Empty: the tensor has no such plane.
struct Planes {
  std::vector<std::byte> values, scales, zeros, bias, row_sums;
};

// Encodes `weights` (row-major, tensor.rows x tensor.cols) by tensor.scheme, layout and group_elems; sets
// tensor.scale_exponent. int8: s = max|w| / 127 per group. int4: symmetric, s = signed extreme / -8 as in Q4_0, the
// better in squared error of that and max|w| / 7. Scales are rounded to FP16 first, values against the rounded scale.
// f16 and bf16 sources that overflow or underflow FP16 get a power-of-two scale_exponent.
// Error: numeric (a NaN or infinity: row and column), unsupported (a range no exponent covers).
Result<Planes> round_to_nearest(storage::Tensor& tensor, std::span<const float> weights);

// The inverse: every weight as float, row-major. For tests, references and requantization.
std::vector<float> dequantize(const storage::Tensor& tensor, std::span<const std::byte> values,
                              std::span<const std::byte> scales, std::span<const std::byte> zeros,
                              std::span<const std::byte> bias);

}  // namespace sluice::quant
