// SPDX-License-Identifier: Apache-2.0
#include "quant/rounding.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/check.hpp"
#include "base/half.hpp"
#include "base/units.hpp"
#include "quant/grid.hpp"
#include "quant/layout.hpp"
#include "storage/tile.hpp"

namespace sluice::quant {
namespace {

using storage::Layout;
using storage::PlaneKind;
using storage::Scheme;
using storage::Tensor;

constexpr float kHalfMax = 65504.0f;
constexpr float kHalfMinNormal = 0x1p-14f;
constexpr int32_t kHalfLowestBit = -24;
constexpr int32_t kHalfSignificantBits = 11;
// Where a shifted maximum goes. Scales stay below 512, so that 128 codes times a scale still fit FP16.
constexpr int kShiftedValueExponent = 14;
constexpr int kShiftedScaleExponent = 8;
constexpr float kInt8Steps = 127.0f;
constexpr float kInt4Steps = 8.0f;

bool is_quantized(Scheme scheme) { return scheme == Scheme::int8 || scheme == Scheme::int4; }

// Nearest integer, ties to even, of |x| < 2^22; unlike nearbyint it vectorizes on every x86.
float round_small(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Largest magnitude as a bit pattern (an order that integers share with floats), NaN and infinity above all.
int32_t max_magnitude_bits(std::span<const float> values) {
  int32_t largest = 0;
  for (const float value : values) {
    const int32_t magnitude = static_cast<int32_t>(std::bit_cast<uint32_t>(value) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

float max_magnitude(std::span<const float> values) {
  return std::bit_cast<float>(static_cast<uint32_t>(max_magnitude_bits(values)));
}

// The exponent of the largest power of two that divides a value, and how many bits there are from the highest set one
// down to it. `value` is finite and not zero.
struct BitSpan {
  int32_t lowest = 0, count = 0;
};
BitSpan bit_span_of(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const int32_t exponent = static_cast<int32_t>((bits >> 23) & 0xffu);
  const uint32_t mantissa = (bits & 0x7fffffu) | (exponent != 0 ? 0x800000u : 0u);
  const int32_t zeros = std::countr_zero(mantissa);
  return {std::max(exponent, 1) - 150 + zeros, 32 - std::countl_zero(mantissa) - zeros};
}

// int8: s = max|w| / 127.
uint16_t round_group_int8(std::span<const float> weights, uint8_t* codes) {
  const uint16_t scale_bits = half_from_float(max_magnitude(weights) / kInt8Steps);
  const float scale = float_from_half(scale_bits);
  if (scale == 0) {
    std::memset(codes, 0, weights.size());
    return 0;
  }
  const float inverse = 1.0f / scale;
  for (size_t i = 0; i < weights.size(); ++i) {
    const float code = std::min(127.0f, std::max(-128.0f, round_small(weights[i] * inverse)));
    codes[i] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int32_t>(code)));
  }
  return scale_bits;
}

// Codes of one int4 group against `scale`, and the sum of squared errors (in a fixed order: eight partial sums).
float round_int4_against(std::span<const float> weights, float scale, uint8_t* codes) {
  const float inverse = 1.0f / scale;
  float partial[8] = {};
  const auto one = [&](size_t i, size_t lane) {
    const float code = std::min(7.0f, std::max(-8.0f, round_small(weights[i] * inverse)));
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code) + 8);
    const float error = weights[i] - code * scale;
    partial[lane] += error * error;
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

// int4: the signed extreme onto -8 (Q4_0's choice, all 16 codes used) or the magnitude onto 7, whichever errs less.
uint16_t round_group_int4(std::span<const float> weights, uint8_t* codes) {
  const float magnitude = max_magnitude(weights);
  float extreme = magnitude;
  for (const float weight : weights) {
    if (weight == -magnitude) extreme = -magnitude;
    if (std::fabs(weight) == magnitude) break;
  }
  const uint16_t candidates[2] = {half_from_float(extreme / -kInt4Steps), half_from_float(magnitude / 7.0f)};
  uint8_t trial[storage::kTileRows * 8];
  SLUICE_CHECK(weights.size() <= sizeof trial);
  float best_error = std::numeric_limits<float>::infinity();
  uint16_t best = 0;
  std::memset(codes, 8, weights.size());
  for (const uint16_t candidate : candidates) {
    const float scale = float_from_half(candidate);
    if (scale == 0) continue;
    const float error = round_int4_against(weights, scale, trial);
    if (error < best_error) {
      best_error = error;
      best = candidate;
      std::memcpy(codes, trial, weights.size());
    }
  }
  return best;
}

Planes round_codes(const Tensor& tensor, std::span<const float> weights) {
  const uint64_t groups = ceil_div(tensor.cols, tensor.group_elems);
  std::vector<uint8_t> codes(weights.size());
  std::vector<uint16_t> scales(tensor.rows * groups);
  for (uint64_t row = 0; row < tensor.rows; ++row) {
    for (uint64_t group = 0; group < groups; ++group) {
      const uint64_t col = group * tensor.group_elems;
      const uint64_t count = std::min<uint64_t>(tensor.group_elems, tensor.cols - col);
      const auto run = weights.subspan(row * tensor.cols + col, count);
      uint8_t* out = codes.data() + row * tensor.cols + col;
      scales[row * groups + group] =
          tensor.scheme == Scheme::int4 ? round_group_int4(run, out) : round_group_int8(run, out);
    }
  }
  return lay_out_codes(tensor, {codes, scales, {}});
}

// Value of a quantized weight before the scale exponent.
float decode_quantized(const Tensor& tensor, uint64_t group_index, int32_t code, std::span<const std::byte> scales,
                       std::span<const std::byte> zeros, std::span<const std::byte> bias) {
  const auto half_at = [&](std::span<const std::byte> plane) {
    uint16_t bits;
    std::memcpy(&bits, plane.data() + group_index * 2, 2);
    return float_from_half(bits);
  };
  const float scale = half_at(scales);
  if (tensor.scheme == Scheme::int8) return static_cast<float>(code) * scale;
  if (!bias.empty()) return static_cast<float>(code) * scale + half_at(bias);
  const int32_t zero = zeros.empty() ? 8 : static_cast<int32_t>(zeros[group_index]);
  return static_cast<float>(code - zero) * scale;
}

}  // namespace

void Extent::merge(const Extent& other) {
  max_abs = std::max(max_abs, other.max_abs);
  min_group_max = std::min(min_group_max, other.min_group_max);
  lowest_bit = std::min(lowest_bit, other.lowest_bit);
  significant_bits = std::max(significant_bits, other.significant_bits);
  fits_bf16 = fits_bf16 && other.fits_bf16;
}

Result<Extent> measure(const Tensor& tensor, uint32_t first_row, std::span<const float> weights) {
  Extent extent;
  const uint64_t group = is_quantized(tensor.scheme) ? tensor.group_elems : tensor.cols;
  for (uint64_t start = 0; start < weights.size(); start += tensor.cols) {
    for (uint64_t col = 0; col < tensor.cols; col += group) {
      const auto run = weights.subspan(start + col, std::min<uint64_t>(group, tensor.cols - col));
      const float largest = max_magnitude(run);
      if (!(largest <= std::numeric_limits<float>::max())) {
        const auto bad = std::find_if(run.begin(), run.end(), [](float value) { return !std::isfinite(value); });
        return fail(ErrorCode::numeric,
                    fmt::format("{}: weight at row {}, column {} is {}; the checkpoint is damaged, download it again",
                                tensor.name, first_row + start / tensor.cols, col + uint64_t(bad - run.begin()), *bad));
      }
      extent.max_abs = std::max(extent.max_abs, largest);
      if (largest != 0) extent.min_group_max = std::min(extent.min_group_max, largest);
    }
  }
  if (tensor.scheme == Scheme::f16 || tensor.scheme == Scheme::bf16) {
    uint32_t below_bf16 = 0;
    for (const float value : weights) {
      below_bf16 |= std::bit_cast<uint32_t>(value) & 0xffffu;
      if (value == 0) continue;
      const BitSpan span = bit_span_of(value);
      extent.lowest_bit = std::min(extent.lowest_bit, span.lowest);
      extent.significant_bits = std::max(extent.significant_bits, span.count);
    }
    extent.fits_bf16 = below_bf16 == 0;
  }
  return extent;
}

bool fits_half(const Extent& extent, int32_t exponent) {
  if (extent.max_abs == 0) return true;
  return std::ldexp(extent.max_abs, -exponent) <= kHalfMax && extent.lowest_bit - exponent >= kHalfLowestBit &&
         extent.significant_bits <= kHalfSignificantBits;
}

int32_t choose_scale_exponent(const Tensor& tensor, const Extent& extent) {
  if (extent.max_abs == 0) return 0;
  const auto shift_to = [&](float largest, int target) { return std::clamp(std::ilogb(largest) - target, -100, 120); };
  switch (tensor.scheme) {
    case Scheme::f32:
    case Scheme::bf16: return 0;
    case Scheme::f16: {
      if (fits_half(extent, 0)) return 0;
      const int32_t shifted = shift_to(extent.max_abs, kShiftedValueExponent);
      // Bits below FP16's reach are lost either way: where the largest weight is far above them, 0 loses no more than
      // FP16's own rounding of that weight, and saves the kernels a multiplication.
      const bool harmless_as_is = extent.max_abs <= kHalfMax && extent.max_abs >= 0x1p-9f;
      return harmless_as_is && !fits_half(extent, shifted) ? 0 : shifted;
    }
    case Scheme::int8:
    case Scheme::int4: {
      const float steps = tensor.scheme == Scheme::int8 ? kInt8Steps : 7.0f;
      const float smallest_steps = tensor.scheme == Scheme::int8 ? kInt8Steps : kInt4Steps;
      const float largest_scale = extent.max_abs / steps;
      const bool fits = largest_scale < 512.0f && extent.min_group_max / smallest_steps >= kHalfMinNormal;
      return fits ? 0 : shift_to(largest_scale, kShiftedScaleExponent);
    }
  }
  return 0;
}

Planes round_rows(const Tensor& tensor, std::span<const float> weights) {
  SLUICE_CHECK(weights.size() == uint64_t{tensor.rows} * tensor.cols);
  if (tensor.scheme == Scheme::f32) return lay_out_floats(tensor, weights);
  std::vector<float> shifted;
  if (tensor.scale_exponent != 0) {
    shifted.assign(weights.begin(), weights.end());
    const float factor = std::ldexp(1.0f, -tensor.scale_exponent);
    for (float& value : shifted) value *= factor;
    weights = shifted;
  }
  if (is_quantized(tensor.scheme)) return round_codes(tensor, weights);
  std::vector<uint16_t> halves(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    halves[i] = tensor.scheme == Scheme::bf16 ? bf16_from_float(weights[i]) : half_from_float(weights[i]);
  }
  return lay_out_halves(tensor, halves);
}

Result<Planes> round_to_nearest(Tensor& tensor, std::span<const float> weights) {
  SLUICE_TRY_ASSIGN(extent, measure(tensor, 0, weights));
  tensor.scale_exponent = choose_scale_exponent(tensor, extent);
  return round_rows(tensor, weights);
}

void RoundingLoss::merge(const RoundingLoss& other) {
  error_squares += other.error_squares;
  weight_squares += other.weight_squares;
  output_squares += other.output_squares;
  if (other.fine_squares) fine_squares = fine_squares.value_or(0) + *other.fine_squares;
}

RoundingLoss RoundingLoss::times_exponent(int32_t scale_exponent) const {
  const double factor = std::ldexp(1.0, 2 * scale_exponent);
  RoundingLoss loss = *this;
  for (double* squares : {&loss.error_squares, &loss.weight_squares, &loss.output_squares}) *squares *= factor;
  if (loss.fine_squares) *loss.fine_squares *= factor;
  return loss;
}

double RoundingLoss::relative(double squares) const {
  return weight_squares > 0 ? std::sqrt(squares / weight_squares) : 0.0;
}

double add_residual(const Tensor& tensor, std::span<const float> weights, Planes& planes) {
  SLUICE_CHECK(tensor.scheme == Scheme::int4);
  const float unscale = std::ldexp(1.0f, -tensor.scale_exponent);
  std::vector<float> left = dequantize(tensor, planes.values, planes.scales, planes.zeros, planes.bias);
  for (size_t i = 0; i < left.size(); ++i) left[i] = (weights[i] - left[i]) * unscale;
  const uint32_t group_elems = tensor.residual_group();
  const uint64_t groups = ceil_div(tensor.cols, group_elems);
  const std::vector<float> alike(group_elems, 1.0f);
  std::vector<uint8_t> codes(left.size());
  std::vector<uint16_t> scales(tensor.rows * groups);
  double squares = 0;
  for (uint64_t row = 0; row < tensor.rows; ++row) {
    for (uint64_t group = 0; group < groups; ++group) {
      const uint64_t at = row * tensor.cols + group * group_elems;
      const uint64_t count = std::min<uint64_t>(group_elems, tensor.cols - group * group_elems);
      const auto run = std::span(left).subspan(at, count);
      const Int4Grid grid = find_int4_grid(run, std::span(alike).first(count), true);
      scales[row * groups + group] = half_from_float(grid.scale);
      for (uint64_t i = 0; i < count; ++i) {
        codes[at + i] = grid.code(run[i]);
        const double error = static_cast<double>(run[i]) - static_cast<double>(grid.value(codes[at + i]));
        squares += error * error;
      }
    }
  }
  Planes second = lay_out_codes(tensor.residual(), {.values = codes, .scales = scales, .bias = {}});
  planes.residual = std::move(second.values);
  planes.residual_scales = std::move(second.scales);
  return squares;
}

RoundingLoss loss_of(const Tensor& tensor, std::span<const float> weights, const Planes& planes) {
  RoundingLoss loss;
  const std::vector<float> stored = dequantize(tensor, planes.values, planes.scales, planes.zeros, planes.bias);
  const double unscale = std::ldexp(1.0, -tensor.scale_exponent);
  for (size_t i = 0; i < weights.size(); ++i) {
    const double weight = static_cast<double>(weights[i]) * unscale;
    const double error = weight - static_cast<double>(stored[i]) * unscale;
    loss.error_squares += error * error;
    loss.weight_squares += weight * weight;
  }
  return loss;
}

std::vector<float> dequantize(const Tensor& tensor, std::span<const std::byte> values,
                              std::span<const std::byte> scales, std::span<const std::byte> zeros,
                              std::span<const std::byte> bias) {
  std::vector<float> weights(uint64_t{tensor.rows} * tensor.cols);
  const float factor = std::ldexp(1.0f, tensor.scale_exponent);
  const auto half_element = [&](uint64_t index) {
    uint16_t bits;
    std::memcpy(&bits, values.data() + index * 2, 2);
    return tensor.scheme == Scheme::bf16 ? float_from_bf16(bits) : float_from_half(bits);
  };
  for (uint32_t row = 0; row < tensor.rows; ++row) {
    for (uint32_t col = 0; col < tensor.cols; ++col) {
      const uint64_t flat = uint64_t{row} * tensor.cols + col;
      const bool rows = tensor.layout == Layout::rows;
      float value = 0;
      if (tensor.scheme == Scheme::f32) {
        std::memcpy(&value, values.data() + flat * 4, 4);
      } else if (!is_quantized(tensor.scheme)) {
        value = half_element(rows ? flat : storage::tile16x16_element(row, col, tensor.cols));
      } else {
        const uint64_t group = rows ? storage::row_scale_element(row, col, tensor.cols, tensor.group_elems)
                                    : storage::tiled_scale_element(row, col, tensor.cols, tensor.group_elems);
        int32_t code = 0;
        if (tensor.scheme == Scheme::int4) {
          const auto at = storage::int4_address(row, col, tensor.cols);
          const auto byte = static_cast<int32_t>(values[at.byte]);
          code = at.high ? byte >> 4 : byte & 15;
        } else {
          const uint64_t at = rows ? flat : storage::int8_address(row, col, tensor.cols);
          code = static_cast<int8_t>(values[at]);
        }
        value = decode_quantized(tensor, group, code, scales, zeros, bias);
      }
      weights[flat] = value * factor;
    }
  }
  return weights;
}

}  // namespace sluice::quant
