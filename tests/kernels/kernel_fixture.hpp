// SPDX-License-Identifier: Apache-2.0
// Random weights in every scheme with their exact values, and the list of instruction sets to test.
#pragma once

#include "backend/cpu/simd_targets.hpp"

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/kernels.hpp"
#include "base/half.hpp"
#include "quant/layout.hpp"
#include "quant/rounding.hpp"
#include "storage/manifest.hpp"
#include "storage/tile.hpp"

namespace sluice::testing {

// Runs `body` once for every instruction set that this machine has and the kernels were compiled for.
template <class Body>
void for_each_target(const Body& body) {
  hwy::SetSupportedTargetsForTest(0);
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::GetChosenTarget().Update(target);
    body(backend::cpu::simd_target());
  }
  hwy::GetChosenTarget().DeInit();
}

enum class Kind { int4, int4_zeros, int4_bias, int8, f16, bf16, f32 };

struct WeightShape {
  uint32_t rows = 0, cols = 0;
  Kind kind = Kind::int4;
  uint32_t group = 0;

  std::string text() const {
    static constexpr const char* kNames[] = {"int4", "int4 zeros", "int4 bias", "int8", "f16", "bf16", "f32"};
    return std::to_string(rows) + "x" + std::to_string(cols) + " " + kNames[static_cast<int>(kind)] + " group " +
           std::to_string(group);
  }
};

// Minimal, ragged and even shapes in every scheme: what every backend's matmul is held against.
inline std::vector<WeightShape> shape_table() {
  const std::pair<uint32_t, uint32_t> sizes[] = {{1, 1}, {5, 63}, {17, 65}, {16, 64}, {1, 96}, {31, 130}, {48, 576}};
  std::vector<WeightShape> shapes;
  for (const auto& [rows, cols] : sizes) {
    for (const Kind kind : {Kind::int4, Kind::int4_zeros, Kind::int4_bias, Kind::int8}) {
      for (const uint32_t group : {32u, 64u, 128u}) shapes.push_back({rows, cols, kind, group});
    }
    for (const Kind kind : {Kind::f16, Kind::bf16, Kind::f32}) shapes.push_back({rows, cols, kind, 0});
  }
  return shapes;
}

// One matrix: planes as in a container, the value of every weight, and the magnitude that rounding errors scale with.
struct TestWeight {
  storage::Tensor tensor;
  quant::Planes planes;
  std::vector<float> values;     // row-major
  std::vector<float> magnitude;  // |w|, or |q s| + |b| where the kernel adds the two apart
  std::vector<uint32_t> perm;    // not empty: column k of the planes is column perm[k] of `values`
  backend::cpu::Matrix matrix() const {
    const auto bytes = [](const std::vector<std::byte>& plane) {
      return plane.empty() ? nullptr : reinterpret_cast<const uint8_t*>(plane.data());
    };
    backend::cpu::Matrix m;
    m.scheme = tensor.scheme;
    m.rows = tensor.rows;
    m.cols = tensor.cols;
    m.group_elems = tensor.group_elems;
    m.scale = std::ldexp(1.0f, tensor.scale_exponent);
    m.values = bytes(planes.values);
    m.scales = reinterpret_cast<const uint16_t*>(bytes(planes.scales));
    m.zeros = bytes(planes.zeros);
    m.bias = reinterpret_cast<const uint16_t*>(bytes(planes.bias));
    return m;
  }
};

inline std::vector<float> random_floats(size_t count, float deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> out(count);
  for (float& x : out) x = normal(random);
  return out;
}

inline void make_codes(const WeightShape& shape, TestWeight& out, std::mt19937& random) {
  const uint64_t groups = (shape.cols + shape.group - 1) / shape.group;
  const bool is_int8 = shape.kind == Kind::int8;
  std::vector<uint8_t> codes(uint64_t{shape.rows} * shape.cols);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random() & (is_int8 ? 0xff : 0x0f));
  std::vector<uint16_t> scales(shape.rows * groups), bias;
  std::normal_distribution<float> scale_of(0.0f, is_int8 ? 0.001f : 0.01f), bias_of(0.0f, 0.05f);
  for (uint16_t& scale : scales) scale = half_from_float(scale_of(random));  // both signs, as in Q4_0
  if (shape.kind == Kind::int4_bias) {
    bias.resize(scales.size());
    for (uint16_t& b : bias) b = half_from_float(bias_of(random));
  }
  out.planes = quant::lay_out_codes(out.tensor, {.values = codes, .scales = scales, .bias = bias});
  if (shape.kind == Kind::int4_zeros) {
    out.planes.zeros.resize(out.planes.scales.size() / 2);
    for (std::byte& zero : out.planes.zeros) zero = static_cast<std::byte>(random() % 17);  // GPTQ: 1 to 16
  }
  for (uint32_t n = 0; shape.kind == Kind::int4_bias && n < shape.rows; ++n) {
    for (uint32_t k = 0; k < shape.cols; ++k) {
      const uint64_t g = n * groups + k / shape.group;
      out.magnitude.push_back(std::fabs(codes[uint64_t{n} * shape.cols + k] * float_from_half(scales[g])) +
                              std::fabs(float_from_half(bias[g])));
    }
  }
}

inline TestWeight make_weight(const WeightShape& shape, std::mt19937& random) {
  using storage::Layout;
  using storage::Scheme;
  TestWeight out;
  out.tensor.role = storage::Role::q;
  out.tensor.rows = shape.rows;
  out.tensor.cols = shape.cols;
  out.tensor.scale_exponent = -1;
  out.tensor.layout = Layout::tile16x64;
  const size_t count = size_t{shape.rows} * shape.cols;
  if (shape.kind <= Kind::int8) {
    out.tensor.scheme = shape.kind == Kind::int8 ? Scheme::int8 : Scheme::int4;
    out.tensor.group_elems = shape.group;
    make_codes(shape, out, random);
  } else if (shape.kind == Kind::f32) {
    out.tensor.scheme = Scheme::f32;
    out.tensor.layout = Layout::rows;
    out.planes = quant::lay_out_floats(out.tensor, random_floats(count, 0.05f, random));
  } else {
    const bool bf16 = shape.kind == Kind::bf16;
    out.tensor.scheme = bf16 ? Scheme::bf16 : Scheme::f16;
    out.tensor.layout = Layout::tile16x16;
    std::vector<uint16_t> bits;
    for (const float x : random_floats(count, 0.05f, random)) {
      bits.push_back(bf16 ? bf16_from_float(x) : half_from_float(x));
    }
    out.planes = quant::lay_out_halves(out.tensor, bits);
  }
  out.values = quant::dequantize(out.tensor, out.planes.values, out.planes.scales, out.planes.zeros, out.planes.bias);
  if (out.magnitude.empty()) {
    for (const float w : out.values) out.magnitude.push_back(std::fabs(w));
  } else {
    for (float& x : out.magnitude) x *= std::ldexp(1.0f, out.tensor.scale_exponent);
  }
  return out;
}

// The same planes with columns that belong to others.
inline void permute_columns(TestWeight& weight, std::vector<uint32_t> perm) {
  const size_t cols = weight.tensor.cols;
  const std::vector<float> before = weight.values;
  for (size_t at = 0; at < before.size(); ++at) weight.values[at / cols * cols + perm[at % cols]] = before[at];
  weight.perm = std::move(perm);
}

}  // namespace sluice::testing
