// SPDX-License-Identifier: Apache-2.0
// Attention, RMSNorm, RoPE, SwiGLU and FP16 stores against double, on every instruction set of this machine.
#include <bit>
#include <cstdio>
#include <limits>
#include <numeric>

#include "backend/backend.hpp"
#include "catch.hpp"
#include "kernel_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::backend::cpu;
using namespace sluice::testing;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kUnit = 0x1p-24;
constexpr uint32_t kBlock = sluice::backend::kKvBlockTokens;

uint32_t printed_seed() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return seed;
}

// Keys and values of one KV head in shuffled blocks; what lies past `positions` is NaN.
struct KvFixture {
  uint32_t head_dim, positions;
  std::vector<float> keys, values;  // [positions][head_dim], as FP16 holds them
  std::vector<uint16_t> memory;
  std::vector<uint32_t> blocks;

  KvFixture(uint32_t dim, uint32_t count, std::mt19937& random) : head_dim(dim), positions(count) {
    keys = random_floats(size_t{dim} * count, 1.0f, random);
    values = random_floats(size_t{dim} * count, 1.0f, random);
    blocks.resize((count + kBlock - 1) / kBlock);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), random);
    memory.assign(blocks.size() * stride(), half_from_float(kNaN));
    for (uint32_t p = 0; p < count; ++p) {
      uint16_t* block = memory.data() + blocks[p / kBlock] * stride();
      for (uint32_t i = 0; i < dim; ++i) {
        const uint16_t k = half_from_float(keys[size_t{p} * dim + i]), v = half_from_float(values[size_t{p} * dim + i]);
        block[i * kBlock + p % kBlock] = k;
        block[size_t{dim} * kBlock + p % kBlock * dim + i] = v;
        keys[size_t{p} * dim + i] = float_from_half(k);
        values[size_t{p} * dim + i] = float_from_half(v);
      }
    }
  }

  size_t stride() const { return size_t{head_dim} * kBlock * 2 + 32; }
  KvHead head() const {
    return {.k = memory.data(), .v = memory.data() + size_t{head_dim} * kBlock, .block_stride = stride(),
            .blocks = blocks.data()};
  }
};

// Expected output of one query, and how far FP32 may be from it. A score takes head_dim + 1 roundings, which at most
// shifts it by delta = 1.01 (head_dim + 1) kUnit * scale * sum |q k|; a weight exp(score - maximum) is then off by a
// factor 1 + 2 * delta (its own score's and the maximum's cancel at best), plus 4 last bits of exp (Highway states 1)
// and one per block of rescaling; sums over positions round once each; both numerator and denominator are so.
struct Expected {
  std::vector<double> out, bound;
};

Expected expect_attention(const float* q, const KvFixture& kv, uint32_t position, double scale) {
  std::vector<double> scores;
  double largest = -1e300, delta = 0;
  for (uint32_t p = 0; p <= position; ++p) {
    double sum = 0, magnitude = 0;
    for (uint32_t i = 0; i < kv.head_dim; ++i) {
      const double product = double{q[i]} * double{kv.keys[size_t{p} * kv.head_dim + i]};
      sum += product;
      magnitude += std::fabs(product);
    }
    scores.push_back(sum * scale);
    largest = std::max(largest, sum * scale);
    delta = std::max(delta, 1.01 * (kv.head_dim + 1) * kUnit * scale * magnitude);
  }
  Expected e;
  e.out.resize(kv.head_dim);
  e.bound.resize(kv.head_dim);
  double total = 0;
  for (uint32_t p = 0; p <= position; ++p) {
    const double weight = std::exp(scores[p] - largest);
    total += weight;
    for (uint32_t i = 0; i < kv.head_dim; ++i) {
      e.out[i] += weight * double{kv.values[size_t{p} * kv.head_dim + i]};
      e.bound[i] += weight * std::fabs(double{kv.values[size_t{p} * kv.head_dim + i]});
    }
  }
  const double relative = 2 * (2 * delta + (8 + 2 * (position / kBlock + 1) + position + 1) * kUnit);
  for (uint32_t i = 0; i < kv.head_dim; ++i) {
    e.out[i] /= total;
    e.bound[i] *= relative / total;
  }
  return e;
}

TEST_CASE("attention agrees with double for every head size, group and position, and ignores what lies beyond") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for_each_target([&](const char* target) {
    for (const uint32_t dim : {8u, 20u, 32u, 64u, 80u, 128u, 256u}) {
      for (const uint32_t position : {0u, 1u, 62u, 63u, 64u, 127u, 200u}) {
        const KvFixture kv(dim, position + 1, random);
        const std::vector<float> q = random_floats(size_t{dim} * kQueryGroup, 2.0f, random);
        const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
        std::vector<std::vector<float>> alone(kQueryGroup);
        for (uint32_t count = 1; count <= kQueryGroup; ++count) {
          INFO("seed " << seed << ", " << target << ", head_dim " << dim << ", position " << position << ", " << count
                       << " queries");
          std::vector<float> out(size_t{dim} * count, kNaN);
          Query queries[kQueryGroup];
          for (uint32_t j = 0; j < count; ++j) queries[j] = {&q[j * dim], &out[j * dim], position};
          attend(queries, count, kv.head(), dim, scale);
          size_t wrong = 0, different = 0;
          for (uint32_t j = 0; j < count; ++j) {
            const Expected e = expect_attention(&q[j * dim], kv, position, double{scale});
            for (uint32_t i = 0; i < dim; ++i) {
              if (!(std::fabs(double{out[j * dim + i]} - e.out[i]) <= e.bound[i])) ++wrong;
            }
            std::vector<float> row(out.begin() + j * dim, out.begin() + (j + 1) * dim);
            if (alone[j].empty()) {
              alone[j].resize(dim);
              const Query query{&q[j * dim], alone[j].data(), position};
              attend(&query, 1, kv.head(), dim, scale);
            }
            for (uint32_t i = 0; i < dim; ++i) {
              if (std::bit_cast<uint32_t>(row[i]) != std::bit_cast<uint32_t>(alone[j][i])) ++different;
            }
          }
          CHECK(wrong == 0);
          CHECK(different == 0);
        }
      }
    }
  });
}

TEST_CASE("queries at different positions of one call each see their own past only") {
  std::mt19937 random(printed_seed());
  for_each_target([&](const char* target) {
    INFO(target);
    const KvFixture kv(64, 201, random);
    const std::vector<float> q = random_floats(64 * 4, 2.0f, random);
    std::vector<float> out(64 * 4, kNaN), alone(64, kNaN);
    const uint32_t positions[] = {3, 64, 200, 63};
    Query queries[4];
    for (uint32_t j = 0; j < 4; ++j) queries[j] = {&q[j * 64], &out[j * 64], positions[j]};
    attend(queries, 4, kv.head(), 64, 0.125f);
    for (uint32_t j = 0; j < 4; ++j) {
      const Query query{&q[j * 64], alone.data(), positions[j]};
      attend(&query, 1, kv.head(), 64, 0.125f);
      CHECK(std::memcmp(alone.data(), &out[j * 64], 64 * sizeof(float)) == 0);
    }
  });
}

TEST_CASE("a query, key or value that is not finite shows in the attention output") {
  std::mt19937 random(3);
  for_each_target([&](const char* target) {
    for (const float bad : {kNaN, kInfinity}) {
      INFO(target << ", " << bad);
      const KvFixture kv(64, 100, random);
      std::vector<float> q = random_floats(64, 1.0f, random), out(64, 0.0f);
      const Query query{q.data(), out.data(), 99};
      const auto is_nan = [](float x) { return std::isnan(x); };
      KvFixture bad_value = kv, bad_key = kv;
      store_half(&bad, 1, &bad_value.memory[kv.blocks[1] * kv.stride() + 64 * kBlock + 20 * 64 + 7], 1);
      attend(&query, 1, bad_value.head(), 64, 0.125f);
      CHECK_FALSE(std::isfinite(out[7]));
      CHECK(std::count_if(out.begin(), out.end(), [](float x) { return std::isfinite(x); }) == 63);
      store_half(&bad, 1, &bad_key.memory[kv.blocks[0] * kv.stride() + 9 * kBlock + 30], 1);
      q[9] = 1.0f;
      attend(&query, 1, bad_key.head(), 64, 0.125f);
      CHECK(std::all_of(out.begin(), out.end(), is_nan));
      q[5] = bad;
      attend(&query, 1, kv.head(), 64, 0.125f);
      CHECK(std::all_of(out.begin(), out.end(), is_nan));
    }
  });
}

TEST_CASE("RMSNorm agrees with double, in place too") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for_each_target([&](const char* target) {
    for (const uint32_t width : {1u, 7u, 16u, 64u, 129u, 576u}) {
      for (const bool weighted : {false, true}) {
        INFO("seed " << seed << ", " << target << ", width " << width);
        const std::vector<float> x = random_floats(width, 100.0f, random), w = random_floats(width, 1.0f, random);
        std::vector<float> out(width + 1, kNaN), in_place = x;
        rms_norm_row(x.data(), weighted ? w.data() : nullptr, width, 1e-5f, out.data());
        rms_norm_row(in_place.data(), weighted ? w.data() : nullptr, width, 1e-5f, in_place.data());
        double sum = 0;
        for (const float v : x) sum += double{v} * double{v};
        const double factor = 1 / std::sqrt(sum / width + double{1e-5f});
        for (uint32_t i = 0; i < width; ++i) {
          const double want = double{x[i]} * factor * (weighted ? double{w[i]} : 1.0);
          // The sum of squares rounds at most width / 4 + 4 times, half of which the root keeps; then three products.
          CHECK(std::fabs(double{out[i]} - want) <= (width / 8.0 + 6) * kUnit * std::fabs(want));
          CHECK(in_place[i] == out[i]);
        }
        CHECK(std::isnan(out[width]));
      }
    }
  });
}

TEST_CASE("RoPE turns pairs half a head apart and leaves the rest") {
  std::mt19937 random(printed_seed());
  for_each_target([&](const char* target) {
    for (const uint32_t dims : {2u, 6u, 32u, 64u, 96u}) {
      INFO(target << ", " << dims << " dimensions");
      const std::vector<float> before = random_floats(dims + 5, 1.0f, random);
      const std::vector<float> angles = random_floats(dims / 2, 3.0f, random);
      std::vector<float> cos, sin, head = before;
      for (const float a : angles) {
        cos.push_back(std::cos(a));
        sin.push_back(std::sin(a));
      }
      rope_head(head.data(), cos.data(), sin.data(), dims);
      for (uint32_t i = 0; i < dims / 2; ++i) {
        const double a = double{before[i]}, b = double{before[dims / 2 + i]}, c = double{cos[i]}, s = double{sin[i]};
        // Two roundings of each product and one of the sum.
        const double bound = 2 * kUnit * (std::fabs(a) + std::fabs(b)) * (std::fabs(c) + std::fabs(s));
        CHECK(std::fabs(double{head[i]} - (a * c - b * s)) <= bound);
        CHECK(std::fabs(double{head[dims / 2 + i]} - (b * c + a * s)) <= bound);
      }
      for (uint32_t i = dims; i < dims + 5; ++i) CHECK(head[i] == before[i]);
    }
  });
}

TEST_CASE("SwiGLU agrees with double from very negative to very positive, and a NaN stays one") {
  for_each_target([&](const char* target) {
    std::vector<float> gate = {0.0f, -0.0f, 1e-30f, -1e30f, 1e30f, -87.0f, 88.5f, -104.0f, -200.0f, 200.0f};
    for (int i = -50; i <= 50; ++i) gate.push_back(static_cast<float>(i) * 0.37f);
    for (size_t count = 1; count <= gate.size(); count += count < 20 ? 1 : 13) {
      std::vector<float> out(gate.begin(), gate.begin() + static_cast<ptrdiff_t>(count));
      out.push_back(kNaN);
      const std::vector<float> up(count, 3.0f);
      swiglu(out.data(), up.data(), count);
      for (size_t i = 0; i < count; ++i) {
        INFO(target << ", silu of " << gate[i]);
        const double x = double{gate[i]}, want = 3 * x / (1 + std::exp(-x));
        // exp to 4 last bits, then a sum, a quotient and a product; below 1e-36 the clamp at exp(88) shows.
        CHECK(std::fabs(double{out[i]} - want) <= 8 * kUnit * std::fabs(want) + 1e-7 * (x < -80 ? 1 : 0));
      }
      CHECK(std::isnan(out[count]));
    }
    std::vector<float> bad = {kNaN, 1.0f, 1.0f};
    const std::vector<float> up = {1.0f, kNaN, 1.0f};
    swiglu(bad.data(), up.data(), 3);
    CHECK(std::isnan(bad[0]));
    CHECK(std::isnan(bad[1]));
    CHECK(std::isfinite(bad[2]));
  });
}

TEST_CASE("FP16 stores round to nearest, saturate what is finite and keep what is not") {
  const std::vector<float> in = {0.0f,     1.0f,      -1.5f,     65504.0f, 65519.0f, 65520.0f,   1e30f,  -1e30f, 1e-8f, 6e-8f,
                                 0.333333f, kInfinity, -kInfinity, kNaN,     2049.0f,  -0.0f, 3.14159f};
  for_each_target([&](const char* target) {
    for (const size_t stride : {size_t{1}, size_t{64}}) {
      for (uint32_t count = 1; count <= in.size(); ++count) {
        std::vector<uint16_t> out(in.size() * stride, 0xdead);
        store_half(in.data(), count, out.data(), stride);
        for (uint32_t i = 0; i < in.size(); ++i) {
          INFO(target << ", " << in[i] << ", stride " << stride);
          if (i >= count) {
            CHECK(out[i * stride] == 0xdead);
          } else if (std::isnan(in[i])) {
            CHECK(std::isnan(float_from_half(out[i * stride])));
          } else {
            const float want = std::isfinite(in[i]) ? std::clamp(in[i], -65504.0f, 65504.0f) : in[i];
            CHECK(out[i * stride] == half_from_float(want));
          }
          for (size_t k = 1; k < stride; ++k) {
            if (out[i * stride + k] != 0xdead) FAIL("wrote between the strides");
          }
        }
      }
    }
  });
}

}  // namespace
