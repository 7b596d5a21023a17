// SPDX-License-Identifier: Apache-2.0
// GPTQ against what its own mathematics says, in double.
#include "quant/gptq.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "catch.hpp"
#include "quant/grid.hpp"

namespace {

using namespace sluice;
using namespace sluice::quant;
using storage::Tensor;

Tensor int4_tensor(uint32_t rows, uint32_t cols, uint32_t group) {
  Tensor tensor;
  tensor.name = "w";
  tensor.role = storage::Role::q;
  tensor.rows = rows;
  tensor.cols = cols;
  tensor.scheme = storage::Scheme::int4;
  tensor.layout = storage::Layout::tile16x64;
  tensor.group_elems = group;
  return tensor;
}

std::vector<float> normal(size_t count, float deviation, std::mt19937& random) {
  std::normal_distribution<float> draw(0.0f, deviation);
  std::vector<float> out(count);
  for (float& x : out) x = draw(random);
  return out;
}

// Inputs whose columns go together, as those of real layers do, and differ in size.
std::vector<float> correlated_rows(uint32_t count, uint32_t cols, std::mt19937& random) {
  const uint32_t hidden = cols / 4;
  const std::vector<float> mix = normal(size_t{hidden} * cols, 1.0f, random);
  std::vector<float> rows;
  for (uint32_t r = 0; r < count; ++r) {
    const std::vector<float> z = normal(hidden, 1.0f, random), noise = normal(cols, 0.3f, random);
    for (uint32_t c = 0; c < cols; ++c) {
      float x = noise[c];
      for (uint32_t h = 0; h < hidden; ++h) x += z[h] * mix[size_t{h} * cols + c];
      rows.push_back(x * (c % 17 == 0 ? 5.0f : 1.0f));
    }
  }
  return rows;
}

// mean x x^T plus damping on the diagonal, in double.
std::vector<double> moments_of(const std::vector<float>& rows, uint32_t cols, double damp) {
  std::vector<double> h(size_t{cols} * cols);
  const size_t count = rows.size() / cols;
  for (size_t r = 0; r < count; ++r) {
    for (uint32_t i = 0; i < cols; ++i) {
      for (uint32_t j = 0; j < cols; ++j) {
        h[size_t{i} * cols + j] += double{rows[r * cols + i]} * double{rows[r * cols + j]} / static_cast<double>(count);
      }
    }
  }
  double mean = 0;
  for (uint32_t i = 0; i < cols; ++i) mean += h[size_t{i} * cols + i] / cols;
  for (uint32_t i = 0; i < cols; ++i) h[size_t{i} * cols + i] += damp * mean;
  return h;
}

// tr((W - Q) H (W - Q)^T)
double output_error(const std::vector<float>& w, const std::vector<float>& q, const std::vector<double>& h,
                    uint32_t cols) {
  double sum = 0;
  std::vector<double> difference(cols);
  for (size_t row = 0; row < w.size() / cols; ++row) {
    for (uint32_t k = 0; k < cols; ++k) difference[k] = double{w[row * cols + k]} - double{q[row * cols + k]};
    for (uint32_t i = 0; i < cols; ++i) {
      for (uint32_t j = 0; j < cols; ++j) sum += difference[i] * h[size_t{i} * cols + j] * difference[j];
    }
  }
  return sum;
}

std::vector<float> values_of(const Tensor& tensor, const Planes& planes) {
  return dequantize(tensor, planes.values, planes.scales, planes.zeros, planes.bias);
}

GptqFactor factor_of(const std::vector<float>& rows, uint32_t cols, float damp = 0.01f, uint32_t threads = 2) {
  SecondMoments moments(cols);
  moments.add(rows, static_cast<uint32_t>(rows.size() / cols), threads);
  auto factor = GptqFactor::create(std::move(moments), damp, "test");
  REQUIRE(factor);
  return std::move(*factor);
}

uint32_t printed_seed() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return seed;
}

}  // namespace

TEST_CASE("the factor of the second moments is that of their inverse, columns by falling importance") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (const uint32_t cols : {1u, 5u, 64u, 300u}) {
    INFO("seed " << seed << ", " << cols << " columns");
    const std::vector<float> rows =
        cols < 4 ? normal(size_t{50} * cols, 1.0f, random) : correlated_rows(2 * cols, cols, random);
    const GptqFactor factor = factor_of(rows, cols);
    const std::vector<double> h = moments_of(rows, cols, 0.01);
    const std::span<const uint32_t> order = factor.order();
    for (uint32_t i = 1; i < cols; ++i) CHECK(factor.importance()[order[i - 1]] >= factor.importance()[order[i]]);
    // U H U^T = 1: with condition numbers up to a thousand or two, FP32 leaves a relative error of 1e-3 at most.
    double worst = 0;
    for (uint32_t i = 0; i < cols; ++i) {
      std::vector<double> uh(cols);
      for (uint32_t k = i; k < cols; ++k) {
        for (uint32_t j = 0; j < cols; ++j) uh[j] += double{factor.row(i)[k]} * h[size_t{order[k]} * cols + order[j]];
      }
      for (uint32_t j = 0; j < cols; ++j) {
        double product = 0;
        for (uint32_t k = j; k < cols; ++k) product += uh[k] * double{factor.row(j)[k]};
        worst = std::max(worst, std::fabs(product - (i == j ? 1.0 : 0.0)));
      }
    }
    std::printf("%u columns: U H U^T off 1 by %.1e\n", cols, worst);
    CHECK(worst < 1e-3);
  }
}

TEST_CASE("GPTQ's own estimate is the error of the outputs, and far below that of rounding to nearest") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (const bool symmetric : {true, false}) {
    for (const uint32_t group : {32u, 64u, 128u}) {
      constexpr uint32_t kRows = 80, kCols = 200;  // ragged in every way
      INFO("seed " << seed << ", group " << group << (symmetric ? ", symmetric" : ", with zeros"));
      const std::vector<float> x = correlated_rows(3 * kCols, kCols, random);
      const std::vector<float> w = normal(size_t{kRows} * kCols, 0.05f, random);
      const std::vector<double> h = moments_of(x, kCols, 0.01);
      const GptqFactor factor = factor_of(x, kCols);
      Tensor tensor = int4_tensor(kRows, kCols, group);
      RoundingLoss loss;
      const Planes planes = round_by_gptq(tensor, w, factor, symmetric, loss);
      CHECK(planes.zeros.empty() == symmetric);
      const std::vector<float> q = values_of(tensor, planes);
      const double measured = output_error(w, q, h, kCols);
      CHECK(std::fabs(loss.output_squares - measured) <= 0.01 * measured);

      Tensor nearest = int4_tensor(kRows, kCols, group);
      auto rounded = round_to_nearest(nearest, w);
      REQUIRE(rounded);
      const double by_rtn = output_error(w, values_of(nearest, *rounded), h, kCols);
      std::printf("group %u%s: output error %.3f of rounding to nearest\n", group, symmetric ? "" : " with zeros",
                  measured / by_rtn);
      CHECK(measured < 0.5 * by_rtn);
      double squares = 0, weights = 0;
      for (size_t i = 0; i < w.size(); ++i)
        squares += std::pow(double{w[i]} - double{q[i]}, 2), weights += double{w[i]} * double{w[i]};
      CHECK(std::fabs(loss.error_squares - squares) <= 1e-4 * squares);
      CHECK(std::fabs(loss.weight_squares - weights) <= 1e-4 * weights);
    }
  }
}

TEST_CASE("a residual by GPTQ says what is left of the weights") {
  const uint32_t seed = printed_seed();
  INFO("seed " << seed);
  std::mt19937 random(seed);
  constexpr uint32_t kRows = 80, kCols = 200;
  const std::vector<float> w = normal(size_t{kRows} * kCols, 0.05f, random);
  const GptqFactor factor = factor_of(correlated_rows(3 * kCols, kCols, random), kCols);
  Tensor tensor = int4_tensor(kRows, kCols, 128);
  tensor.residual_group_elems = kResidualGroup;
  RoundingLoss loss;
  Planes planes = round_by_gptq(tensor, w, factor, true, loss);
  const double left = add_residual_by_gptq(tensor, w, factor, planes);
  const std::vector<float> base = values_of(tensor, planes);
  const std::vector<float> second = dequantize(tensor.residual(), planes.residual, planes.residual_scales, {}, {});
  double squares = 0;
  for (size_t i = 0; i < w.size(); ++i) squares += std::pow(double{w[i]} - double{base[i]} - double{second[i]}, 2);
  CHECK(std::fabs(left - squares) <= 1e-4 * squares);
  CHECK(left < loss.error_squares / 4);
}

TEST_CASE("rows are rounded alike in every company, and moments do not depend on the number of threads") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  constexpr uint32_t kCols = 320;
  const std::vector<float> x = correlated_rows(64, kCols, random);
  const std::vector<float> w = normal(size_t{192} * kCols, 0.05f, random);
  const GptqFactor one = factor_of(x, kCols, 0.01f, 1), three = factor_of(x, kCols, 0.01f, 3);
  for (uint32_t i = 0; i < kCols; ++i) REQUIRE(std::equal(one.row(i) + i, one.row(i) + kCols, three.row(i) + i));
  RoundingLoss loss;
  const std::vector<float> whole =
      values_of(int4_tensor(192, kCols, 64), round_by_gptq(int4_tensor(192, kCols, 64), w, one, true, loss));
  for (uint32_t first = 0; first < 192; first += 64) {
    const Tensor part = int4_tensor(64, kCols, 64);
    const auto rows = std::span(w).subspan(size_t{first} * kCols, size_t{64} * kCols);
    const std::vector<float> alone = values_of(part, round_by_gptq(part, rows, one, true, loss));
    CHECK(std::equal(alone.begin(), alone.end(), whole.begin() + size_t{first} * kCols));
  }
}

TEST_CASE("inputs that never come are rounded to nearest, and inputs that are not finite are refused") {
  constexpr uint32_t kCols = 64;
  std::mt19937 random(3);
  const std::vector<float> w = normal(size_t{16} * kCols, 0.05f, random);
  const GptqFactor silent = factor_of(std::vector<float>(kCols, 0.0f), kCols);
  RoundingLoss loss;
  const Tensor tensor = int4_tensor(16, kCols, 64);
  const std::vector<float> q = values_of(tensor, round_by_gptq(tensor, w, silent, true, loss));
  for (size_t i = 0; i < w.size(); ++i) {
    const float step = *std::max_element(w.begin(), w.end());
    CHECK(std::fabs(w[i] - q[i]) < step);
  }

  SecondMoments broken(kCols);
  std::vector<float> rows(kCols, 1.0f);
  rows[5] = std::numeric_limits<float>::infinity();
  broken.add(rows, 1, 1);
  const auto refused = GptqFactor::create(std::move(broken), 0.01f, "model: q_proj");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::numeric);
  CHECK(refused.error().message.find("model: q_proj: the inputs that the calibration text gives are not finite") == 0);
}

TEST_CASE("moments that are not positive definite are refused with the damping that was tried") {
  constexpr uint32_t kCols = 40;
  std::mt19937 random(9);
  SecondMoments moments(kCols);
  const std::vector<float> row = normal(kCols, 1e10f, random);
  moments.add(row, 1, 1);
  // One direction, and everywhere else FP32's rounding of it, 6e-8: damping up to 1e-10 is lost in that.
  const auto refused = GptqFactor::create(std::move(moments), 1e-12f, "model: q_proj");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::numeric);
  CHECK(refused.error().message.find("not positive definite even with damping 1e-10") != std::string::npos);
}

TEST_CASE("a grid's search is never worse than the whole range, and follows the important weights") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (int round = 0; round < 200; ++round) {
    INFO("seed " << seed << ", round " << round);
    std::vector<float> w = normal(64, 0.05f, random), importance(64, 1.0f);
    if (round % 3 == 0) w[7] *= 8;
    const auto error_of = [&](const Int4Grid& grid, size_t first, size_t last) {
      double sum = 0;
      for (size_t i = first; i < last; ++i) sum += std::pow(double{w[i]} - double{grid.value(grid.code(w[i]))}, 2);
      return sum;
    };
    float largest = 0;
    for (const float x : w) largest = std::max(largest, std::fabs(x));
    const Int4Grid plain{float_from_half(half_from_float(largest / 7)), 8};
    for (const bool symmetric : {true, false}) {
      const Int4Grid found = find_int4_grid(w, importance, symmetric);
      CHECK((found.zero == 8 || !symmetric));
      if (symmetric) CHECK(error_of(found, 0, 64) <= error_of(plain, 0, 64) * (1 + 1e-5));
    }
    std::vector<float> half = importance;
    std::fill(half.begin() + 32, half.end(), 0.0f);
    CHECK(error_of(find_int4_grid(w, half, true), 0, 32) <=
          error_of(find_int4_grid(w, importance, true), 0, 32) * (1 + 1e-5));
  }
  CHECK(find_int4_grid(std::vector<float>(32, 0.0f), std::vector<float>(32, 1.0f), true).scale == 0);
  CHECK(find_int4_grid(std::vector<float>(32, 0.0f), std::vector<float>(32, 1.0f), false).scale == 0);
}
