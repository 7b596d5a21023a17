// SPDX-License-Identifier: Apache-2.0
// FP32 weights into the container's schemes by rounding to nearest, in the container's layouts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::quant {

// The planes of one tensor in memory, ready for ContainerWriter. Empty: the tensor has no such plane.
struct Planes {
  std::vector<std::byte> values, scales, zeros, bias, residual, residual_scales, row_sums;
};

// Encodes `weights` (row-major, tensor.rows x tensor.cols) by tensor.scheme, layout and group_elems; sets
// tensor.scale_exponent. int8: s = max|w| / 127 per group. int4: symmetric, s = signed extreme / -8 as in Q4_0, the
// better in squared error of that and max|w| / 7. Scales are rounded to FP16 first, values against the rounded scale.
// f16 and bf16 sources that overflow or underflow FP16 get a power-of-two scale_exponent.
// Error: numeric (a NaN or infinity: row and column), unsupported (a range no exponent covers).
Result<Planes> round_to_nearest(storage::Tensor& tensor, std::span<const float> weights);

// What decides the scale_exponent of a tensor, gathered over its rows: a tensor that is encoded a slab at a time is
// measured first, then every slab is encoded with the exponent of the whole.
struct Extent {
  float max_abs = 0;
  float min_group_max = std::numeric_limits<float>::infinity();  // over groups that are not all zero
  int32_t lowest_bit = std::numeric_limits<int32_t>::max();      // 2^this divides every value
  int32_t significant_bits = 0;                                  // from the highest set bit to the lowest, of the worst value
  bool fits_bf16 = true;                                         // every value is a bfloat16

  void merge(const Extent& other);
};

// Measures rows of `tensor` (its scheme, cols and group_elems count; `weights` says how many rows). `first_row` is for
// the message. Error: numeric.
Result<Extent> measure(const storage::Tensor& tensor, uint32_t first_row, std::span<const float> weights);

// 0 where FP16 holds everything as it is; else the exponent that moves the largest value (f16) or scale (int8, int4) up
// to where FP16 has most room below it.
int32_t choose_scale_exponent(const storage::Tensor& tensor, const Extent& extent);

// Whether FP16 holds every value times 2^-exponent exactly.
bool fits_half(const Extent& extent, int32_t exponent);

// Encodes `weights` as tensor.rows x tensor.cols with the exponent that is set. The weights must be finite: measure
// them first.
Planes round_rows(const storage::Tensor& tensor, std::span<const float> weights);

// What rounding cost: sums over weights, as they are before the scale exponent.
struct RoundingLoss {
  double error_squares = 0;           // (w - q)^2
  double weight_squares = 0;          // w^2
  double output_squares = 0;          // GPTQ: its own estimate of the squared error of an output; else 0
  std::optional<double> fine_squares; // (w - q - r)^2, where there is a residual

  void merge(const RoundingLoss& other);
  // The same of the weights themselves, which adds up with that of tensors of other exponents.
  RoundingLoss times_exponent(int32_t scale_exponent) const;
  // RMS of an error, given as the sum of its squares, over that of the weights; 0 where all of them are.
  double relative(double squares) const;
};

// Weights that share a scale in a residual, whatever the base's groups. GPTQ leaves one weight in thirty more than a step
// away, and each of them spoils the steps of its group: groups of 128 leave twice the divergence for 9% fewer bytes.
constexpr uint32_t kResidualGroup = 32;

// Rounds what int4 `planes` leave of `weights` to a second nibble with scales of its own, and adds the residual planes: r
// lies where q does in `values`, as r + 8. Returns RoundingLoss::fine_squares.
double add_residual(const storage::Tensor& tensor, std::span<const float> weights, Planes& planes);

// Compares planes of round_rows with what they were made of.
RoundingLoss loss_of(const storage::Tensor& tensor, std::span<const float> weights, const Planes& planes);

// The inverse: every weight as float, row-major. For tests, references and requantization.
std::vector<float> dequantize(const storage::Tensor& tensor, std::span<const std::byte> values,
                              std::span<const std::byte> scales, std::span<const std::byte> zeros,
                              std::span<const std::byte> bias);

}  // namespace sluice::quant
