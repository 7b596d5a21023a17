// SPDX-License-Identifier: Apache-2.0
// Rounding to nearest: what fits stays exact, what does not errs no more than half a step.
#include "quant/rounding.hpp"

#include <cmath>
#include <random>

#include "base/half.hpp"
#include "base/units.hpp"
#include "catch.hpp"

using namespace sluice;
using namespace sluice::quant;
using storage::Layout;
using storage::Scheme;
using storage::Tensor;

namespace {

Tensor tensor_of(Scheme scheme, uint32_t rows, uint32_t cols, uint32_t group) {
  Tensor tensor;
  tensor.name = "w";
  tensor.role = storage::Role::q;
  tensor.rows = rows;
  tensor.cols = cols;
  tensor.scheme = scheme;
  tensor.group_elems = group;
  tensor.layout = group != 0 ? Layout::tile16x64 : scheme == Scheme::f32 ? Layout::rows : Layout::tile16x16;
  return tensor;
}

std::vector<float> round_trip(Tensor& tensor, const std::vector<float>& weights) {
  const auto planes = round_to_nearest(tensor, weights);
  REQUIRE(planes);
  return dequantize(tensor, planes->values, planes->scales, planes->zeros, planes->bias);
}

std::vector<float> random_weights(size_t count, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> weights(count);
  for (float& weight : weights) weight = normal(random);
  return weights;
}

}  // namespace

TEST_CASE("int8 and int4 err by half a step at most, ragged shapes and all magnitudes included") {
  const uint32_t seed = 11;
  CAPTURE(seed);
  for (const auto& [rows, cols] : {std::pair<uint32_t, uint32_t>{1, 1}, {16, 64}, {17, 65}, {33, 200}, {48, 576}}) {
    for (const uint32_t group : {32u, 64u, 128u}) {
      for (const float spread : {1e-12f, 1e-3f, 1.0f, 1e5f}) {
        CAPTURE(rows, cols, group, spread);
        const auto weights = random_weights(uint64_t{rows} * cols, spread, seed);
        for (const Scheme scheme : {Scheme::int8, Scheme::int4}) {
          Tensor tensor = tensor_of(scheme, rows, cols, group);
          const auto stored = round_trip(tensor, weights);
          for (uint32_t row = 0; row < rows; ++row) {
            for (uint32_t col = 0; col < cols; col += group) {
              const uint32_t count = std::min(group, cols - col);
              double largest = 0, squares = 0, worst = 0;
              for (uint32_t i = 0; i < count; ++i) {
                const uint64_t at = uint64_t{row} * cols + col + i;
                largest = std::max(largest, std::fabs(static_cast<double>(weights[at])));
                const double error = std::fabs(static_cast<double>(weights[at]) - static_cast<double>(stored[at]));
                worst = std::max(worst, error);
                squares += error * error;
              }
              // Half a step, of a scale that FP16 rounds by 2^-11 and, where a group lies far below the largest of its
              // tensor, by half of FP16's smallest step; clipping costs as much again at the extreme code.
              const double lsb = std::ldexp(1.0, -25 + tensor.scale_exponent);
              const double steps = scheme == Scheme::int8 ? 127 : 7;
              const double scale = largest / steps * (1 + 0x1p-11) + lsb;
              const double bound = scale / 2 + steps * (largest / steps * 0x1p-11 + lsb) + 1e-6 * largest;
              if (scheme == Scheme::int8) {
                REQUIRE(worst <= bound);
              } else {
                REQUIRE(squares <= count * bound * bound);  // it minimizes squares, over that scale and another
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("a residual says what is left, and losses of tensors with different exponents add up") {
  RoundingLoss all;
  double errors = 0, weight_squares = 0, left = 0;  // in double, of the weights as they are
  for (const float spread : {1e-12f, 0.02f, 1e7f}) {
    CAPTURE(spread);
    const auto weights = random_weights(33 * 200, spread, 12);
    Tensor tensor = tensor_of(Scheme::int4, 33, 200, 128);
    tensor.residual_group_elems = kResidualGroup;
    auto planes = round_to_nearest(tensor, weights);
    REQUIRE(planes);
    CHECK((spread == 0.02f) == (tensor.scale_exponent == 0));
    RoundingLoss loss = loss_of(tensor, weights, *planes);
    CHECK_FALSE(loss.fine_squares);
    loss.fine_squares = add_residual(tensor, weights, *planes);
    const auto base = dequantize(tensor, planes->values, planes->scales, planes->zeros, planes->bias);
    const auto second = dequantize(tensor.residual(), planes->residual, planes->residual_scales, {}, {});
    double of_base = 0, of_both = 0, squares = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const double error = static_cast<double>(weights[i]) - static_cast<double>(base[i]);
      of_base += error * error;
      of_both += std::pow(error - static_cast<double>(second[i]), 2);
      squares += static_cast<double>(weights[i]) * static_cast<double>(weights[i]);
    }
    CHECK(loss.relative(loss.error_squares) == Approx(std::sqrt(of_base / squares)).epsilon(1e-9));
    // The residual is rounded from w - q in FP32, which is off by 2^-24 of it and by 2^-20 of what is left.
    CHECK(loss.relative(*loss.fine_squares) == Approx(std::sqrt(of_both / squares)).epsilon(1e-5));
    CHECK(of_both < of_base / 50);
    all.merge(loss.times_exponent(tensor.scale_exponent));
    errors += of_base, weight_squares += squares, left += of_both;
  }
  CHECK(all.error_squares == Approx(errors).epsilon(1e-9));
  CHECK(all.weight_squares == Approx(weight_squares).epsilon(1e-9));
  REQUIRE(all.fine_squares);
  CHECK(*all.fine_squares == Approx(left).epsilon(1e-5));
  CHECK(RoundingLoss().relative(0) == 0);
}

TEST_CASE("FP16 values of any power-of-two range stay exact") {
  const auto weights = random_weights(16 * 32, 1.0f, 3);
  for (const int exponent : {-40, -20, 0, 20, 60}) {
    CAPTURE(exponent);
    std::vector<float> halves;
    for (const float weight : weights) {
      // A mantissa of 11 bits within 2^8 of the largest: fits wherever the exponent moves it.
      const float clamped = std::copysign(std::clamp(std::fabs(weight), 0x1p-4f, 4.0f), weight);
      halves.push_back(std::ldexp(float_from_half(half_from_float(clamped)), exponent));
    }
    Tensor tensor = tensor_of(Scheme::f16, 16, 32, 0);
    CHECK(round_trip(tensor, halves) == halves);
    CHECK((exponent == 0) == (tensor.scale_exponent == 0));
  }
}

TEST_CASE("a value between two FP16 values is not said to fit") {
  Tensor tensor = tensor_of(Scheme::f16, 1, 4, 0);
  const auto extent_of = [&](std::vector<float> weights) {
    const auto extent = measure(tensor, 0, weights);
    REQUIRE(extent);
    return *extent;
  };
  CHECK(fits_half(extent_of({1.0f, -2.0f, 0.0f, 1.0f + 0x1p-10f}), 0));
  CHECK_FALSE(fits_half(extent_of({1.0f, -2.0f, 0.0f, 1.0f + 0x1p-11f}), 0));
  CHECK_FALSE(fits_half(extent_of({1.0f, 0.5f, 0.0f, 1.0f + 0x1p-20f}), 0));
  CHECK(fits_half(extent_of({0x1p-24f, 3 * 0x1p-24f, 0.0f, 0.0f}), 0));
  CHECK_FALSE(fits_half(extent_of({0x1p-25f, 1.0f, 0.0f, 0.0f}), 0));
  CHECK(fits_half(extent_of({0x1p-25f, 1.0f, 0.0f, 0.0f}), -1));
  CHECK_FALSE(fits_half(extent_of({65536.0f, 1.0f, 0.0f, 0.0f}), 0));
  CHECK(fits_half(extent_of({65536.0f, 1.0f, 0.0f, 0.0f}), 1));
}

TEST_CASE("all zeros stay zeros in every scheme") {
  for (const Scheme scheme : {Scheme::f32, Scheme::f16, Scheme::bf16, Scheme::int8, Scheme::int4}) {
    Tensor tensor = tensor_of(scheme, 17, 65, scheme == Scheme::int8 || scheme == Scheme::int4 ? 32 : 0);
    const std::vector<float> zeros(17 * 65);
    CHECK(round_trip(tensor, zeros) == zeros);
    CHECK(tensor.scale_exponent == 0);
  }
}

TEST_CASE("rounding refuses what is not finite and says where") {
  for (const Scheme scheme : {Scheme::f16, Scheme::int8, Scheme::int4}) {
    Tensor tensor = tensor_of(scheme, 4, 64, scheme == Scheme::f16 ? 0 : 32);
    std::vector<float> weights(4 * 64, 1.0f);
    weights[3 * 64 + 40] = NAN;
    const auto planes = round_to_nearest(tensor, weights);
    REQUIRE_FALSE(planes);
    CHECK(planes.error().code == ErrorCode::numeric);
    CHECK(planes.error().message.find("row 3, column 40") != std::string::npos);
  }
}
