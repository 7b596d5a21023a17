// SPDX-License-Identifier: Apache-2.0
// RMSNorm, RoPE and KV store, attention, SwiGLU and row selection on a Vulkan device against double.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/half.hpp"
#include "vulkan_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::testing;
using backend::vulkan::Kernels;
using backend::vulkan::kAttentionStep;
using backend::vulkan::x_place;
using backend::vulkan::x_stride;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-24;    // half a last bit of an FP32 number
// Vulkan allows sqrt and division 2.5 last bits and exp(x) 3 + 2 |x| of them ("Precision and Operation of SPIR-V
// Instructions"); in halves of a last bit.
constexpr double kDivision = 5;
double exp_error(double x) { return 2 * (3 + 2 * std::fabs(x)); }

std::vector<float> random_floats(size_t count, float deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> out(count);
  for (float& x : out) x = normal(random);
  return out;
}

bool same_bits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// Values that are further off than their bound, NaN included.
struct Misses {
  size_t count = 0;
  double worst = 0;                  // error / bound
  void add(double value, double want, double bound) {
    const double error = std::fabs(value - want);
    if (!(error <= bound)) ++count;
    if (bound > 0) worst = std::max(worst, error / bound);
  }
};

// The row table of a pass in front of a shuffled block table, as scratch.hpp lays them out.
struct Table {
  uint32_t max_rows = 0, blocks_per_session = 0;
  std::vector<uint32_t> words;

  Table(const std::vector<std::pair<uint32_t, uint32_t>>& rows, uint32_t sessions, uint32_t blocks, std::mt19937& random)
      : max_rows(static_cast<uint32_t>(rows.size()) + 2), blocks_per_session(blocks), words(3 * max_rows) {
    for (uint32_t r = 0; r < rows.size(); ++r) {
      words[r] = rows[r].first;
      words[max_rows + r] = rows[r].second;
    }
    std::vector<uint32_t> table(size_t{sessions} * blocks);
    std::iota(table.begin(), table.end(), 0u);
    std::shuffle(table.begin(), table.end(), random);
    words.insert(words.end(), table.begin(), table.end());
  }
  uint32_t block(uint32_t session, uint32_t position) const {
    return words[3 * max_rows + session * blocks_per_session + position / 64];
  }
};

struct Dims {
  uint32_t heads, kv_heads, head_dim, layers = 2;
  size_t block_halves() const { return size_t{layers} * kv_heads * 2 * 64 * head_dim; }
  size_t at(const Table& table, uint32_t session, uint32_t position, uint32_t layer, uint32_t head, bool value) const {
    return table.block(session, position) * block_halves() + ((size_t{layer} * kv_heads + head) * 2 + value) * 64 * head_dim +
           size_t{position % 64} * head_dim;
  }
};

}  // namespace

TEST_CASE("RMSNorm agrees with double and leaves the padding of X alone") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (const uint32_t width : {1u, 7u, 64u, 129u, 576u, 8192u}) {
    for (const bool weighted : {false, true}) {
      INFO("seed " << seed << ", width " << width);
      const std::vector<float> x = random_floats(3 * width, 100.0f, random), w = random_floats(width, 1.0f, random);
      const Array<float> in(x), weight(w), out(3 * x_stride(width), kNaN);
      gpu().run([&](Kernels& kernels, VkCommandBuffer commands) {
        return kernels.rms_norm(commands, {.in_rows = in.address(), .weight = weight.address(), .x = out.address(),
                                           .width = width, .has_weight = weighted, .eps = 1e-5f}, 3);
      });
      Misses misses;
      for (uint32_t r = 0; r < 3; ++r) {
        double sum = 0;
        for (uint32_t i = 0; i < width; ++i) sum += double{x[r * width + i]} * double{x[r * width + i]};
        const double factor = 1 / std::sqrt(sum / width + double{1e-5f});
        // 2 roundings for each of width / 256 squares, 8 for the tree, half of which the root keeps; the mean, the
        // root, the quotient, two products.
        const double n = (2 * std::ceil(width / 256.0) + 8 + kDivision) / 2 + 2 * kDivision + 3;
        for (uint32_t i = 0; i < width; ++i) {
          const double want = double{x[r * width + i]} * factor * (weighted ? double{w[i]} : 1.0);
          misses.add(double{out.values()[r * x_stride(width) + x_place(i)]}, want, n * kUnit * std::fabs(want));
        }
        for (uint32_t i = width; i < x_stride(width); ++i) {
          CHECK(std::isnan(out.values()[r * x_stride(width) + x_place(i)]));
        }
      }
      INFO("worst " << misses.worst << " of the bound");
      CHECK(misses.count == 0);
    }
  }
}

TEST_CASE("RoPE turns q and k, and k and v land in their block as FP16, saturated where finite") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (const Dims dims : {Dims{3, 1, 8}, Dims{9, 3, 64}, Dims{4, 2, 20}, Dims{8, 8, 80}, Dims{8, 1, 128}, Dims{2, 2, 256}}) {
    for (const uint32_t norms : {0u, 3u}) {
      INFO("seed " << seed << ", heads of " << dims.head_dim << ", norms " << norms);
      const uint32_t dim = dims.head_dim, pairs = dim / 2 - (dim == 20 ? 2 : 0);   // partial rotation too
      const Table table({{1, 63}, {1, 64}, {0, 5}}, 2, 3, random);
      const size_t q_width = size_t{dims.heads} * dim, kv_width = size_t{dims.kv_heads} * dim;
      const std::vector<float> q = random_floats(3 * q_width, 1.0f, random), k = random_floats(3 * kv_width, 1.0f, random);
      std::vector<float> v = random_floats(3 * kv_width, 1.0f, random), angles;
      v[0] = 1e6f, v[1] = -1e30f, v[2] = kNaN, v[3] = -std::numeric_limits<float>::infinity();
      for (uint32_t i = 0; i < 3 * pairs; ++i) {
        const float angle = random_floats(1, 3.0f, random)[0];
        angles.insert(angles.end(), {std::cos(angle), std::sin(angle)});
      }
      const std::vector<float> weights[2] = {random_floats(dim, 1.0f, random), random_floats(dim, 1.0f, random)};
      const Array<float> q_rows(q), k_rows(k), v_rows(v), angle_rows(angles), q_norm(weights[0]), k_norm(weights[1]);
      const Array<uint32_t> words(table.words);
      const Array<uint16_t> cache(6 * dims.block_halves(), 0xdead);
      gpu().run([&](Kernels& kernels, VkCommandBuffer commands) {
        return kernels.head_norm_rope(commands, {.q = q_rows.address(), .k = k_rows.address(), .v = v_rows.address(),
                                                 .q_norm = q_norm.address(), .k_norm = k_norm.address(),
                                                 .angles = angle_rows.address(), .table = words.address(),
                                                 .cache = cache.address(), .max_rows = table.max_rows,
                                                 .heads = dims.heads, .kv_heads = dims.kv_heads, .pairs = pairs,
                                                 .layer = 1, .layers = dims.layers,
                                                 .blocks_per_session = table.blocks_per_session, .norms = norms,
                                                 .eps = 1e-6f}, dim, 3);
      });
      // Norm: 16 at most of the tree and the root, see above; then two products of 2 roundings each.
      const auto turned = [&](const float* head, const std::vector<float>& weight, uint32_t row, Misses& misses,
                              const auto& got, double store) {
        std::vector<double> x(head, head + dim);
        double sum = 0;
        for (const double one : x) sum += one * one;
        const double factor = 1 / std::sqrt(sum / dim + double{1e-6f});
        for (uint32_t i = 0; i < dim && norms != 0; ++i) x[i] *= factor * double{weight[i]};
        for (uint32_t i = 0; i < dim; ++i) {
          const uint32_t pair = i < pairs ? i : i - pairs;
          const bool rotates = i < 2 * pairs;
          const double c = rotates ? double{angles[(row * pairs + pair) * 2]} : 1;
          const double s = rotates ? double{angles[(row * pairs + pair) * 2 + 1]} : 0;
          const double other = !rotates ? 0 : i < pairs ? -x[i + pairs] : x[i - pairs];
          const double want = x[i] * c + other * s;
          const double magnitude = std::fabs(x[i] * c) + std::fabs(other * s);
          misses.add(got(i), want, ((norms != 0 ? 30 : 0) + 4) * kUnit * magnitude + store * (std::fabs(want) + 0x1p-14));
        }
      };
      Misses misses;
      const std::pair<uint32_t, uint32_t> rows[] = {{1, 63}, {1, 64}, {0, 5}};
      size_t wrong_v = 0, written = 0;
      for (uint32_t r = 0; r < 3; ++r) {
        for (uint32_t h = 0; h < dims.heads; ++h) {
          turned(&q[r * q_width + h * dim], weights[0], r, misses,
                 [&](uint32_t i) { return double{q_rows.values()[r * q_width + h * dim + i]}; }, 0);
        }
        for (uint32_t h = 0; h < dims.kv_heads; ++h) {
          const size_t k_at = dims.at(table, rows[r].first, rows[r].second, 1, h, false);
          const size_t v_at = dims.at(table, rows[r].first, rows[r].second, 1, h, true);
          turned(&k[r * kv_width + h * dim], weights[1], r, misses,
                 [&](uint32_t i) { return double{float_from_half(cache.values()[k_at + i])}; }, 0x1p-11);
          for (uint32_t i = 0; i < dim; ++i) {
            const float x = v[r * kv_width + h * dim + i];
            const uint16_t got = cache.values()[v_at + i];
            const uint16_t want = half_from_float(std::isfinite(x) ? std::clamp(x, -65504.0f, 65504.0f) : x);
            wrong_v += std::isnan(x) ? !std::isnan(float_from_half(got)) : got != want;
          }
        }
      }
      for (const uint16_t half : cache.values()) written += half != 0xdead;
      INFO("worst " << misses.worst << " of the bound");
      CHECK(misses.count == 0);
      CHECK(wrong_v == 0);
      CHECK(written <= 3 * 2 * kv_width);
    }
  }
}

namespace {

struct AttentionCase {
  Dims dims;
  std::vector<std::pair<uint32_t, uint32_t>> rows;   // session, position
  uint32_t chunk_positions = kAttentionStep;
};

// [rows][heads * head_dim], in plain order; `chunks`: 0 for one workgroup per row and KV head.
std::vector<float> attend(const AttentionCase& c, const Table& table, const Array<uint16_t>& cache,
                          const std::vector<float>& q, bool split) {
  const auto rows = static_cast<uint32_t>(c.rows.size());
  const uint32_t width = c.dims.heads * c.dims.head_dim;
  const uint32_t chunks = (table.blocks_per_session * 64 + c.chunk_positions - 1) / c.chunk_positions;
  const size_t slots = size_t{rows} * c.dims.heads * chunks;
  const Array<float> q_rows(q), attended(size_t{rows} * x_stride(width), kNaN), out(slots * c.dims.head_dim, kNaN),
      sum(slots * 2, kNaN);
  const Array<uint32_t> words(table.words);
  gpu().run([&](Kernels& kernels, VkCommandBuffer commands) {
    const VkResult code = kernels.attention(
        commands, {.q = q_rows.address(), .attended = attended.address(), .partial_out = out.address(),
                   .partial_sum = sum.address(), .table = words.address(), .cache = cache.address(),
                   .max_rows = table.max_rows, .heads = c.dims.heads, .kv_heads = c.dims.kv_heads, .layer = 1,
                   .layers = c.dims.layers, .blocks_per_session = table.blocks_per_session, .x_stride = x_stride(width),
                   .chunk_positions = c.chunk_positions, .chunks = split ? chunks : 0,
                   .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c.dims.head_dim)))},
        c.dims.head_dim, rows, split ? chunks : 1);
    if (code != VK_SUCCESS || !split) return code;
    backend::vulkan::full_barrier(gpu().device->vk, commands);
    return kernels.attention_merge(commands, {.partial_out = out.address(), .partial_sum = sum.address(),
                                              .attended = attended.address(), .table = words.address(),
                                              .max_rows = table.max_rows, .heads = c.dims.heads,
                                              .head_dim = c.dims.head_dim, .x_stride = x_stride(width),
                                              .chunk_positions = c.chunk_positions, .chunks = chunks}, rows);
  });
  std::vector<float> plain(size_t{rows} * width);
  for (uint32_t r = 0; r < rows; ++r) {
    for (uint32_t i = 0; i < width; ++i) {
      plain[size_t{r} * width + i] = attended.values()[size_t{r} * x_stride(width) + x_place(i)];
    }
  }
  return plain;
}

// A score takes 2 roundings per dimension and one for the scale: delta = 1.01 (2 head_dim + 1) kUnit scale sum |q k| at
// most. A weight exp(score - largest) is off by a factor 1 + 2 delta, the error of exp, and one rounding of the
// difference times its size; a running maximum rescales once more per step. Sums round twice a position, numerator and
// denominator alike; then the quotient.
void check_attention(const AttentionCase& c, const Table& table, const Array<uint16_t>& cache, const std::vector<float>& q,
                     const std::vector<float>& out) {
  const uint32_t dim = c.dims.head_dim, group = c.dims.heads / c.dims.kv_heads;
  const double scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
  Misses misses;
  for (size_t r = 0; r < c.rows.size(); ++r) {
    const auto [session, position] = c.rows[r];
    for (uint32_t h = 0; h < c.dims.heads; ++h) {
      const float* query = &q[(r * c.dims.heads + h) * dim];
      std::vector<double> scores;
      double largest = -1e300, smallest = 1e300, delta = 0;
      for (uint32_t p = 0; p <= position; ++p) {
        const size_t at = c.dims.at(table, session, p, 1, h / group, false);
        double sum = 0, magnitude = 0;
        for (uint32_t i = 0; i < dim; ++i) {
          const double product = double{query[i]} * double{float_from_half(cache.values()[at + i])};
          sum += product;
          magnitude += std::fabs(product);
        }
        scores.push_back(sum * scale);
        largest = std::max(largest, sum * scale);
        smallest = std::min(smallest, sum * scale);
        delta = std::max(delta, 1.01 * (2 * dim + 1) * kUnit * scale * magnitude);
      }
      const double range = largest - smallest, steps = position / kAttentionStep + 1;
      const double relative = 2 * (2 * delta + (2 * (exp_error(range) + range) + 2 * steps + 2 * (position + 1.0)) * kUnit) +
                              kDivision * kUnit;
      std::vector<double> want(dim), magnitude(dim);
      double total = 0;
      for (uint32_t p = 0; p <= position; ++p) {
        const size_t at = c.dims.at(table, session, p, 1, h / group, true);
        const double weight = std::exp(scores[p] - largest);
        total += weight;
        for (uint32_t i = 0; i < dim; ++i) {
          const double v = double{float_from_half(cache.values()[at + i])};
          want[i] += weight * v;
          magnitude[i] += weight * std::fabs(v);
        }
      }
      for (uint32_t i = 0; i < dim; ++i) {
        misses.add(double{out[(r * c.dims.heads + h) * dim + i]}, want[i] / total, relative * magnitude[i] / total);
      }
    }
  }
  INFO("worst " << misses.worst << " of the bound");
  CHECK(misses.count == 0);
}

// Positions up to each row's own are random, everything else is NaN. At both sides of every block and step border V is
// a hundred times larger: one of those missed, or one too many, is far outside any tolerance.
Array<uint16_t> filled_cache(const AttentionCase& c, const Table& table, uint32_t sessions, std::mt19937& random) {
  std::vector<uint16_t> halves(sessions * table.blocks_per_session * c.dims.block_halves(), half_from_float(kNaN));
  std::normal_distribution<float> normal(0.0f, 1.0f);
  for (const auto& [session, position] : c.rows) {
    for (uint32_t p = 0; p <= position; ++p) {
      const bool planted = p % 64 == 0 || p % 64 == 63 || p == position;
      for (uint32_t h = 0; h < c.dims.kv_heads; ++h) {
        for (uint32_t i = 0; i < c.dims.head_dim; ++i) {
          halves[c.dims.at(table, session, p, 1, h, false) + i] = half_from_float(normal(random));
          halves[c.dims.at(table, session, p, 1, h, true) + i] = half_from_float(normal(random) * (planted ? 100.0f : 1.0f));
        }
      }
    }
  }
  return Array<uint16_t>(halves);
}

}  // namespace

TEST_CASE("attention agrees with double, split or not, whatever the heads, the position and the company") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  const std::vector<std::pair<uint32_t, uint32_t>> rows = {{0, 0}, {1, 63}, {2, 64}, {3, 127}, {4, 128}, {5, 300}};
  const AttentionCase cases[] = {
      {{1, 1, 8}, rows},         {{3, 1, 64}, rows},       {{9, 3, 64}, rows},     {{4, 2, 20}, rows},
      {{14, 2, 64}, rows, 256},  {{20, 2, 32}, rows},      {{8, 8, 80}, {{0, 200}}}, {{8, 1, 128}, rows, 256},
      {{16, 1, 128}, {{0, 130}, {1, 7}}}, {{2, 2, 256}, {{0, 190}}}};
  for (const AttentionCase& c : cases) {
    INFO("seed " << seed << ", " << c.dims.heads << " heads on " << c.dims.kv_heads << " of " << c.dims.head_dim);
    const auto sessions = static_cast<uint32_t>(c.rows.size());
    const Table table(c.rows, sessions, 5, random);
    const Array<uint16_t> cache = filled_cache(c, table, sessions, random);
    const size_t width = size_t{c.dims.heads} * c.dims.head_dim;
    const std::vector<float> q = random_floats(c.rows.size() * width, 2.0f, random);
    for (const bool split : {false, true}) {
      const std::vector<float> out = attend(c, table, cache, q, split);
      check_attention(c, table, cache, q, out);
      size_t different = 0;
      for (size_t r = 0; r < c.rows.size(); ++r) {
        AttentionCase one = c;
        one.rows = {c.rows[r]};
        Table alone = table;   // the same blocks, this row in front
        alone.words[0] = c.rows[r].first;
        alone.words[alone.max_rows] = c.rows[r].second;
        const std::vector<float> own(q.begin() + static_cast<ptrdiff_t>(r * width),
                                     q.begin() + static_cast<ptrdiff_t>((r + 1) * width));
        const std::vector<float> single = attend(one, alone, cache, own, split);
        for (size_t i = 0; i < width; ++i) different += same_bits(single[i], out[r * width + i]) ? 0 : 1;
      }
      CHECK(different == 0);
    }
  }
}

TEST_CASE("SwiGLU agrees with double from very negative to very positive, and a NaN stays one") {
  std::vector<float> gate = {0.0f, -0.0f, 1e-30f, -1e30f, 1e30f, -87.0f, 88.5f, -104.0f, -200.0f, 200.0f, kNaN, 1.0f};
  for (int i = -50; i <= 50; ++i) gate.push_back(static_cast<float>(i) * 0.37f);
  std::vector<float> up(gate.size(), 3.0f);
  up[11] = kNaN;
  const auto width = static_cast<uint32_t>(gate.size());
  const Array<float> gate_rows(gate), up_rows(up), x(x_stride(width), kNaN);
  gpu().run([&](Kernels& kernels, VkCommandBuffer commands) {
    return kernels.swiglu(commands, {.gate = gate_rows.address(), .up = up_rows.address(), .x = x.address(), .width = width}, 1);
  });
  for (uint32_t i = 0; i < width; ++i) {
    INFO("silu of " << gate[i]);
    const double got = double{x.values()[x_place(i)]}, g = double{gate[i]}, want = 3 * g / (1 + std::exp(-g));
    if (i == 10 || i == 11) {
      CHECK(std::isnan(got));
      continue;
    }
    // exp, a sum, a quotient, a product; below 1e-36 the clamp at exp(88) shows.
    const double n = exp_error(std::min(std::fabs(g), 88.0)) + 1 + kDivision + 1;
    CHECK(std::fabs(got - want) <= n * kUnit * std::fabs(want) + 1e-7 * (g < -80 ? 1 : 0));
  }
}

TEST_CASE("rows that want logits move to the front in order") {
  std::mt19937 random(5);
  const uint32_t width = 300, count = 9;
  const std::vector<float> before = random_floats(count * width, 1.0f, random);
  const std::vector<uint32_t> selected = {0, 2, 3, 8};
  std::vector<uint32_t> words(3 * 16, 0);
  std::copy(selected.begin(), selected.end(), words.begin() + 32);
  const Array<float> rows(before);
  const Array<uint32_t> table(words);
  gpu().run([&](Kernels& kernels, VkCommandBuffer commands) {
    return kernels.select_rows(commands, {.rows = rows.address(), .table = table.address(), .max_rows = 16, .selected = 4,
                                          .width = width});
  });
  for (uint32_t r = 0; r < 4; ++r) {
    CHECK(std::equal(&rows.values()[r * width], &rows.values()[(r + 1) * width - 1], &before[selected[r] * width]));
  }
}

TEST_CASE("columns are gathered bit for bit, the padding is zero, and an entry out of range reads the last column") {
  std::mt19937 random(6);
  for (const uint32_t width : {1u, 63u, 64u, 130u, 1000u}) {
    constexpr uint32_t kRows = 3;
    INFO(width << " columns");
    const uint32_t stride = x_stride(width);
    const std::vector<float> in = random_floats(size_t{kRows} * stride, 1.0f, random);
    std::vector<uint32_t> order(width);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    order[width / 2] = 0xffffffffu;
    const Array<float> x(in), gathered(size_t{kRows} * stride, kNaN);
    const Array<uint32_t> perm(order);
    gpu().run([&](Kernels& kernels, VkCommandBuffer commands) {
      return kernels.gather_columns(commands, {.x = x.address(), .perm = perm.address(), .gathered = gathered.address(),
                                               .width = width}, kRows);
    });
    size_t different = 0;
    for (uint32_t r = 0; r < kRows; ++r) {
      for (uint32_t k = 0; k < stride; ++k) {
        const float want = k < width ? in[r * stride + x_place(std::min(order[k], width - 1))] : 0.0f;
        different += same_bits(gathered.values()[r * stride + x_place(k)], want) ? 0 : 1;
      }
    }
    CHECK(different == 0);
  }
}
