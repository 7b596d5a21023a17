// SPDX-License-Identifier: Apache-2.0
// Every matvec shader against sums in double, over the shape table that all backends share.
#include <bit>
#include <cmath>
#include <limits>

#include "kernel_fixture.hpp"
#include "vulkan_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::testing;
using backend::vulkan::Offsets;
using backend::vulkan::x_place;
using backend::vulkan::x_stride;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-24;    // half a last bit of an FP32 number
constexpr uint32_t kMost = 67;       // rows of X
constexpr size_t kGuard = 7;         // floats behind the outputs, which no shader may touch

backend::vulkan::WeightFormat format_of(Kind kind) {
  using backend::vulkan::WeightFormat;
  switch (kind) {
    case Kind::int8: return WeightFormat::int8;
    case Kind::f16: return WeightFormat::f16;
    case Kind::bf16: return WeightFormat::bf16;
    case Kind::f32: return WeightFormat::f32;
    default: return WeightFormat::int4;
  }
}

Offsets offsets_of(Kind kind) {
  return kind == Kind::int4_zeros ? Offsets::zeros : kind == Kind::int4_bias ? Offsets::bias : Offsets::none;
}

// One matrix with activations for kMost rows, on both sides.
struct Problem {
  WeightShape shape;
  TestWeight weight;
  std::vector<float> x, vector, before;   // [kMost][cols], [rows], [kMost][rows]
  Array<std::byte> values, scales, offsets;
  Array<float> x_device, vector_device;
};

Problem make_problem(const WeightShape& shape, std::mt19937& random) {
  TestWeight weight = make_weight(shape, random);
  std::vector<float> x = random_floats(size_t{kMost} * shape.cols, 1.0f, random);
  for (size_t i = 0; i < x.size(); i += 97) x[i] *= 30;  // outliers, as real activations have
  for (float& one : x) one = float_from_half(half_from_float(one));   // so that the half form holds them too
  for (uint32_t k = 0; k < shape.cols; ++k) x[2 * shape.cols + k] *= 0x1p14f;   // ... by its scale, in this row
  std::vector<float> ordered(size_t{kMost} * x_stride(shape.cols), 0.0f);
  for (uint32_t r = 0; r < kMost; ++r) {
    for (uint32_t k = 0; k < shape.cols; ++k) {
      ordered[size_t{r} * x_stride(shape.cols) + x_place(k)] = x[size_t{r} * shape.cols + k];
    }
  }
  std::vector<float> vector = random_floats(shape.rows, 1.0f, random);
  std::vector<float> before = random_floats(size_t{kMost} * shape.rows, 1.0f, random);
  Array<std::byte> values(weight.planes.values), scales(weight.planes.scales),
      offsets(shape.kind == Kind::int4_zeros ? weight.planes.zeros : weight.planes.bias);
  Array<float> x_device(ordered), vector_device(vector);
  return {.shape = shape, .weight = std::move(weight), .x = std::move(x), .vector = std::move(vector),
          .before = std::move(before), .values = std::move(values), .scales = std::move(scales),
          .offsets = std::move(offsets), .x_device = std::move(x_device), .vector_device = std::move(vector_device)};
}

// Rows first..first+rows-1 of X; [rows][outputs] and the guard. `matrices`: by the half form of X.
std::vector<float> run(const Problem& p, uint32_t first, uint32_t rows, bool accumulate, bool matrices = false) {
  const size_t count = size_t{rows} * p.shape.rows;
  std::vector<float> before(count + kGuard, kNaN);
  if (accumulate) std::copy_n(p.before.begin(), count, before.begin());
  const Array<float> out(before);
  using backend::vulkan::x_half_bytes, backend::vulkan::x_scale_bytes;
  // Poison: rows that fill up the last eight may hold anything.
  const Array<std::byte> x_half(x_half_bytes(rows, p.shape.cols), std::byte{0xff});
  const Array<std::byte> x_scale(x_scale_bytes(rows, p.shape.cols), std::byte{0xff});
  shaders::MatvecArguments args{
      .values = p.values.address(), .scales = p.scales.address(), .offsets = p.offsets.address(),
      .x = p.x_device.address(size_t{first} * x_stride(p.shape.cols)), .vector = p.vector_device.address(),
      .out_rows = out.address(), .outputs = p.shape.rows, .columns = p.shape.cols,
      .groups = p.shape.group == 0 ? 0 : (p.shape.cols + p.shape.group - 1) / p.shape.group,
      .group_columns = p.shape.group, .rows = rows, .has_vector = !accumulate, .accumulate = accumulate,
      .scale = std::ldexp(1.0f, p.weight.tensor.scale_exponent)};
  gpu().run([&](backend::vulkan::Kernels& kernels, VkCommandBuffer commands) {
    if (matrices) {
      args.x_half = x_half.address();
      args.x_scale = x_scale.address();
      const VkResult code = kernels.halve_x(commands, {.x = args.x, .x_half = args.x_half, .x_scale = args.x_scale,
                                                       .blocks = x_stride(p.shape.cols) / 64}, rows);
      if (code != VK_SUCCESS) return code;
      backend::vulkan::full_barrier(gpu().device->vk, commands);
    }
    return kernels.matvec(commands, format_of(p.shape.kind), offsets_of(p.shape.kind), args);
  });
  return {out.values().begin(), out.values().end()};
}

bool same_bits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// Roundings on the way of one product into its output, at most; a fused multiplication and addition counts as two,
// since GLSL lets it be two. A workgroup of 128 (from 2048 columns on 256) cuts K into 4 (8) slices, each lane of
// which adds up one column in four. INT4 and INT8: up to 16 products within a group, then one product with a scale
// (and with a bias) for every 32 columns of its slice. F16: 4 for every 16 columns of its slice. F32: one in four
// columns of its slice. Then two additions over the lanes, one per slice, the vector, what was there before.
double roundings(const WeightShape& shape) {
  const double slices = shape.cols >= 2048 ? 8 : 4;
  const auto steps = [&](double columns) { return std::ceil(std::ceil(shape.cols / columns) / slices); };
  const double tail = 2 + slices + 4;
  if (shape.kind == Kind::f32) return 2 * steps(4) + tail;
  if (shape.kind == Kind::f16 || shape.kind == Kind::bf16) return 8 * steps(16) + tail;
  return 2 * 16 + 4 * 2 * steps(64) + tail;
}

// ... and by matrix instructions, which add 16 products to a sum and cut off what lies below its last bits: 4 for each
// of the 4 in a tile, for X and (bias) for its sum; then as above, in one slice where there are many rows.
double matrix_roundings(const WeightShape& shape) { return 32 + 4 * std::ceil(shape.cols / 32.0) + 2 + 8 + 4; }

void check_values(const Problem& p, uint32_t rows, bool accumulate, bool matrices = false) {
  const std::vector<float> out = run(p, 0, rows, accumulate, matrices);
  const double n = 1.01 * (matrices ? matrix_roundings(p.shape) : roundings(p.shape)) * kUnit;
  size_t wrong = 0, touched = 0;
  double worst = 0;
  for (uint32_t r = 0; r < rows; ++r) {
    for (uint32_t i = 0; i < p.shape.rows; ++i) {
      const size_t at = size_t{r} * p.shape.rows + i;
      double sum = accumulate ? double{p.before[at]} : double{p.vector[i]};
      double magnitude = std::fabs(sum);
      for (uint32_t k = 0; k < p.shape.cols; ++k) {
        const size_t w = size_t{i} * p.shape.cols + k;
        const double x = p.x[size_t{r} * p.shape.cols + k];
        sum += double{p.weight.values[w]} * x;
        magnitude += double{p.weight.magnitude[w]} * std::fabs(x);
      }
      const double error = std::fabs(double{out[at]} - sum) / (n * magnitude);
      if (!(error <= 1)) ++wrong;
      worst = std::max(worst, error);
    }
  }
  for (size_t i = size_t{rows} * p.shape.rows; i < out.size(); ++i) touched += same_bits(out[i], kNaN) ? 0 : 1;
  INFO("worst error " << worst << " of the bound");
  CHECK(wrong == 0);
  CHECK(touched == 0);
}

}  // namespace

TEST_CASE("matvec shaders agree with sums in double and give a row the same bits in every company") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  std::vector<WeightShape> shapes = shape_table();
  // Eight slices of K, and more of them than tiles of the last.
  for (const Kind kind : {Kind::int4, Kind::int4_bias, Kind::int8}) shapes.push_back({33, 2112, kind, 128});
  for (const Kind kind : {Kind::f16, Kind::f32}) shapes.push_back({33, 2112, kind, 0});
  for (const WeightShape& shape : shapes) {
    const Problem p = make_problem(shape, random);
    std::vector<std::vector<float>> alone;
    for (uint32_t r = 0; r < 19; ++r) alone.push_back(run(p, r, 1, false));
    for (const uint32_t rows : {1u, 2u, 3u, 5u, 8u, 9u, 19u}) {
      INFO("seed " << seed << ", " << shape.text() << ", " << rows << " rows");
      check_values(p, rows, false);
      check_values(p, rows, true);
      const std::vector<float> out = run(p, 0, rows, false);
      size_t different = 0;
      for (size_t i = 0; i < size_t{rows} * shape.rows; ++i) {
        different += same_bits(out[i], alone[i / shape.rows][i % shape.rows]) ? 0 : 1;
      }
      CHECK(different == 0);
    }
  }
  std::printf("%zu shapes\n", shapes.size());
}

TEST_CASE("INT4 products by matrix instructions agree with sums in double, and up to eight rows in every company") {
  if (!gpu().kernels->uses_matrices()) {
    std::printf("%s has no matrix instructions of the kind: not tested\n", gpu().device->name().c_str());
    return;
  }
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  std::vector<WeightShape> shapes = shape_table();
  for (const Kind kind : {Kind::int4, Kind::int4_zeros, Kind::int4_bias}) {
    shapes.push_back({273, 2112, kind, 128});
    shapes.push_back({130, 1088, kind, 32});
  }
  for (const WeightShape& shape : shapes) {
    if (shape.kind > Kind::int4_bias) continue;
    const Problem p = make_problem(shape, random);
    std::vector<std::vector<float>> alone;
    for (uint32_t r = 0; r < 8; ++r) alone.push_back(run(p, r, 1, false, true));
    for (const uint32_t rows : {1u, 3u, 8u, 9u, 17u, 40u, kMost}) {
      INFO("seed " << seed << ", " << shape.text() << ", " << rows << " rows");
      check_values(p, rows, false, true);
      check_values(p, rows, true, true);
      if (rows > 8) continue;
      const std::vector<float> out = run(p, 0, rows, false, true);
      size_t different = 0;
      for (size_t i = 0; i < size_t{rows} * shape.rows; ++i) {
        different += same_bits(out[i], alone[i / shape.rows][i % shape.rows]) ? 0 : 1;
      }
      CHECK(different == 0);
    }
  }
}

TEST_CASE("activations that are not finite make every output of their row NaN and of no other row") {
  std::mt19937 random(7);
  for (const float bad : {kNaN, std::numeric_limits<float>::infinity()}) {
    for (const Kind kind : {Kind::int4, Kind::int4_zeros, Kind::int4_bias, Kind::int8}) {
      const Problem p = make_problem({17, 130, kind, 32}, random);
      // Two of them of opposite sign, so that infinities meet whatever the weights.
      const size_t row = x_stride(130);
      p.x_device.values()[row + x_place(70)] = bad;
      p.x_device.values()[row + x_place(71)] = -bad;
      const std::vector<float> out = run(p, 0, 3, false);
      for (uint32_t i = 0; i < 17; ++i) {
        INFO(bad << ", kind " << static_cast<int>(kind) << ", output " << i);
        CHECK(std::isfinite(out[i]));
        CHECK_FALSE(std::isfinite(out[17 + i]));
        CHECK(std::isfinite(out[34 + i]));
      }
    }
  }
}
