// SPDX-License-Identifier: Apache-2.0
// Every matmul kernel against sums in double, over one table of shapes, on every instruction set of this machine.
#include <bit>
#include <cstdio>
#include <limits>
#include <span>

#include "backend/cpu/thread_pool.hpp"
#include "catch.hpp"
#include "kernel_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::backend::cpu;
using namespace sluice::testing;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-24;  // half a last bit of an FP32 number: the relative error of one rounding
constexpr uint32_t kMostRows = 128;
constexpr size_t kGuard = 3;       // floats behind each output row, which no kernel may touch

enum class Activations { int8, f32 };

// A chunk of activations in the form a kernel takes.
struct Form {
  Activations activations = Activations::f32;
  std::vector<QuantizedBlock> blocks;
  std::vector<float> floats;
  const float* plain = nullptr;
};

Form form_of(Kind kind, Activations activations, std::span<const float> x, uint32_t cols, uint32_t rows) {
  Form form{.activations = activations, .blocks = {}, .floats = {}, .plain = x.data()};
  if (kind > Kind::int8) {
    form.floats.assign(size_t{(cols + 15) / 16} * rows * 32, kNaN);
    spread16_rows(x.data(), cols, cols, rows, 0, rows, form.floats.data());
  } else if (activations == Activations::int8) {
    form.blocks.resize(size_t{(cols + 63) / 64} * rows);
    std::memset(static_cast<void*>(form.blocks.data()), 0xff, form.blocks.size() * sizeof(QuantizedBlock));
    quantize_rows(x.data(), cols, cols, rows, 0, rows, form.blocks.data());
  } else {
    form.floats.assign(size_t{(cols + 63) / 64} * rows * 128, kNaN);
    spread64_rows(x.data(), cols, cols, rows, 0, rows, form.floats.data());
  }
  return form;
}

// The floats a vector aligned to 64 bytes would have; kernels load accumulators with aligned loads.
struct Accumulators {
  std::vector<float> memory = std::vector<float>(kAccumulatorFloats + 16, kNaN);
  float* get() {
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / sizeof(float);
  }
};

void multiply(const Matrix& m, const Form& form, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
              const MatmulOut& out) {
  Accumulators sums;
  const bool int8 = form.activations == Activations::int8;
  switch (m.scheme) {
    case storage::Scheme::int4:
      if (int8) return matmul_int4_int8(m, form.blocks.data(), rows, first_tile, last_tile, out, sums.get());
      return matmul_int4_f32(m, form.floats.data(), rows, first_tile, last_tile, out, sums.get());
    case storage::Scheme::int8:
      if (int8) return matmul_int8_int8(m, form.blocks.data(), rows, first_tile, last_tile, out, sums.get());
      return matmul_int8_f32(m, form.floats.data(), rows, first_tile, last_tile, out, sums.get());
    case storage::Scheme::f16:
    case storage::Scheme::bf16: return matmul_f16_f32(m, form.floats.data(), rows, first_tile, last_tile, out);
    case storage::Scheme::f32: return matmul_f32_f32(m, form.plain, m.cols, rows, first_tile, last_tile, out);
  }
}

// What the quantized activations stand for; the kernels are held to these, the quantizer to the originals below.
std::vector<double> values_of(const Form& form, std::span<const float> x, uint32_t cols, uint32_t rows) {
  std::vector<double> out(x.begin(), x.end());
  if (form.blocks.empty()) return out;
  for (uint32_t r = 0; r < rows; ++r) {
    for (uint32_t block = 0; block < (cols + 63) / 64; ++block) {
      const QuantizedBlock& q = form.blocks[size_t{block} * rows + r];
      for (uint32_t p = 0; p < 64; ++p) {
        const uint32_t col = 64 * block + tile_column(p);
        if (col < cols) out[size_t{r} * cols + col] = double{q.scale[p / 4 % 2]} * q.q[p];
      }
    }
  }
  return out;
}

struct Problem {
  WeightShape shape;
  TestWeight weight;
  std::vector<float> x;        // [kMostRows][cols]
  std::vector<float> vector;   // [rows]
  std::vector<float> before;   // [kMostRows][rows + kGuard]: what the outputs hold where they are added to
};

Problem make_problem(const WeightShape& shape, std::mt19937& random) {
  Problem p{.shape = shape, .weight = make_weight(shape, random), .x = {}, .vector = {}, .before = {}};
  p.x = random_floats(size_t{kMostRows} * shape.cols, 1.0f, random);
  for (size_t i = 0; i < p.x.size(); i += 97) p.x[i] *= 30;  // outliers, as real activations have
  p.vector = random_floats(shape.rows, 1.0f, random);
  p.before = random_floats(size_t{kMostRows} * (shape.rows + kGuard), 1.0f, random);
  return p;
}

std::vector<float> run(const Problem& p, const Form& form, uint32_t rows, bool accumulate, bool split) {
  const size_t stride = p.shape.rows + kGuard;
  std::vector<float> out(p.before.begin(), p.before.begin() + static_cast<ptrdiff_t>(rows * stride));
  if (!accumulate) std::fill(out.begin(), out.end(), kNaN);
  const uint32_t tiles = (p.shape.rows + 15) / 16;
  const MatmulOut to{.out = out.data(), .stride = stride, .vector = accumulate ? nullptr : p.vector.data(),
                     .accumulate = accumulate};
  const Matrix m = p.weight.matrix();
  if (split) {
    multiply(m, form, rows, tiles / 2, tiles, to);
    multiply(m, form, rows, 0, tiles / 2, to);
  } else {
    multiply(m, form, rows, 0, tiles, to);
  }
  return out;
}

bool same_bits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// Roundings on the way of one accumulator, at most: each of n rounds everything before it by a factor 1 + kUnit, so the
// error is below 1.01 * n * kUnit * sum |w| |x|.
//   int8 activations: integer dot products are exact; per tile column one product of scales (and one of bias and sum)
//     and one fused addition each.
//   FP32 activations: a weight takes up to two roundings, an accumulator at most 32 fused additions per 64 columns
//     (f16: 2 per 16; f32: a dot product of whole vectors and its tail, at most K, in whichever order).
// Then folding the lanes (4), the tensor's scale, the vector, what was there before.
double roundings(const Problem& p, Activations activations) {
  const double cols = p.shape.cols;
  if (p.shape.kind == Kind::f32) return cols + 8;
  if (activations == Activations::int8 && p.shape.kind <= Kind::int8) return 4 * (cols / 64 + 1) + 8;
  return cols / 2 + 32 + 10;
}

// Every output of `rows` rows against the sum in double, and nothing written beside them.
void check_values(const Problem& p, Activations activations, const Form& form, uint32_t rows, bool accumulate) {
  const std::vector<float> out = run(p, form, rows, accumulate, false);
  const std::vector<double> x = values_of(form, p.x, p.shape.cols, rows);
  const size_t stride = p.shape.rows + kGuard;
  const double n = 1.01 * roundings(p, activations) * kUnit;
  size_t wrong = 0, touched = 0;
  for (uint32_t r = 0; r < rows; ++r) {
    for (uint32_t i = 0; i < p.shape.rows; ++i) {
      double sum = accumulate ? double{p.before[r * stride + i]} : double{p.vector[i]};
      double magnitude = std::fabs(sum);
      for (uint32_t k = 0; k < p.shape.cols; ++k) {
        const size_t at = size_t{i} * p.shape.cols + k;
        sum += double{p.weight.values[at]} * x[size_t{r} * p.shape.cols + k];
        magnitude += double{p.weight.magnitude[at]} * std::fabs(x[size_t{r} * p.shape.cols + k]);
      }
      if (!(std::fabs(double{out[r * stride + i]} - sum) <= n * magnitude)) ++wrong;
    }
    for (size_t i = p.shape.rows; i < stride; ++i) {
      const float want = accumulate ? p.before[r * stride + i] : kNaN;
      if (!same_bits(out[r * stride + i], want)) ++touched;
    }
  }
  CHECK(wrong == 0);
  CHECK(touched == 0);
}

// Row `which` of `rows` must have the bits it has alone, however the tiles are cut.
void check_same_row(const Problem& p, Activations activations, uint32_t rows, const std::vector<std::vector<float>>& alone) {
  const Form form = form_of(p.shape.kind, activations, p.x, p.shape.cols, rows);
  const std::vector<float> out = run(p, form, rows, false, true);
  size_t different = 0;
  for (uint32_t r = 0; r < rows; ++r) {
    for (uint32_t i = 0; i < p.shape.rows; ++i) {
      if (!same_bits(out[r * (p.shape.rows + kGuard) + i], alone[r][i])) ++different;
    }
  }
  CHECK(different == 0);
}

uint32_t printed_seed() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return seed;
}

TEST_CASE("matmul kernels agree with sums in double and give a row the same bits in every company") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  std::vector<Problem> problems;
  for (const WeightShape& shape : shape_table()) problems.push_back(make_problem(shape, random));
  size_t targets = 0;
  for_each_target([&](const char* target) {
    ++targets;
    const bool slow = std::string_view(target) == "SCALAR";
    for (const Problem& p : problems) {
      for (const Activations activations : {Activations::int8, Activations::f32}) {
        if (activations == Activations::int8 && p.shape.kind > Kind::int8) continue;
        INFO("seed " << seed << ", " << target << ", " << p.shape.text() << ", activations "
                     << (activations == Activations::int8 ? "int8" : "f32"));
        const uint32_t most = slow ? 9 : kMostRows;
        const Form form = form_of(p.shape.kind, activations, p.x, p.shape.cols, most);
        check_values(p, activations, form, most, false);
        check_values(p, activations, form, most, true);
        std::vector<std::vector<float>> alone;
        for (uint32_t r = 0; r < most; ++r) {
          const std::span<const float> x(p.x.data() + size_t{r} * p.shape.cols, p.shape.cols);
          alone.push_back(run(p, form_of(p.shape.kind, activations, x, p.shape.cols, 1), 1, false, false));
        }
        for (uint32_t rows = 1; rows <= 9; ++rows) check_same_row(p, activations, rows, alone);
        check_same_row(p, activations, most, alone);
      }
    }
  });
  std::printf("%zu shapes on %zu instruction sets\n", problems.size(), targets);
  CHECK(targets >= 1);
}

TEST_CASE("quantized activations are within half a step and in the documented order") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for_each_target([&](const char* target) {
    for (const uint32_t cols : {1u, 31u, 64u, 65u, 130u}) {
      INFO("seed " << seed << ", " << target << ", " << cols << " columns");
      const std::vector<float> x = random_floats(3 * cols, 2.0f, random);
      std::vector<QuantizedBlock> out(size_t{(cols + 63) / 64} * 3);
      quantize_rows(x.data(), cols, cols, 3, 0, 3, out.data());
      size_t wrong = 0;
      for (uint32_t r = 0; r < 3; ++r) {
        for (uint32_t c = 0; c < (cols + 63) / 64 * 64; ++c) {
          const QuantizedBlock& block = out[size_t{c / 64} * 3 + r];
          uint32_t p = 0;
          while (tile_column(p) != c % 64) ++p;
          const uint32_t half = p / 4 % 2;
          CHECK(half == c % 64 / 32);
          const double want = c < cols ? double{x[size_t{r} * cols + c]} : 0.0;
          // Half a step, and the roundings of the scale and its inverse seen from q = 127.
          const double bound = double{block.scale[half]} * (0.5 + 127 * 4 * kUnit);
          if (!(std::fabs(double{block.scale[half]} * block.q[p] - want) <= bound)) ++wrong;
        }
      }
      CHECK(wrong == 0);
      for (const QuantizedBlock& block : out) {
        for (uint32_t half = 0; half < 2; ++half) {
          int32_t sum = 0;
          for (uint32_t p = 0; p < 64; ++p) sum += p / 4 % 2 == half ? block.q[p] : 0;
          CHECK(block.neg8_sum[half] == -8 * sum);
          CHECK(block.sum[half] == static_cast<float>(sum));
        }
      }
    }
  });
}

TEST_CASE("activations that are not finite make every output of their row NaN and of no other row") {
  std::mt19937 random(7);
  for_each_target([&](const char* target) {
    for (const float bad : {kNaN, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
      for (const Kind kind : {Kind::int4, Kind::int4_zeros, Kind::int4_bias, Kind::int8}) {
        INFO(target << ", " << bad << ", kind " << static_cast<int>(kind));
        Problem p = make_problem({17, 130, kind, 32}, random);
        p.x[130 + 70] = bad;
        const Form form = form_of(kind, Activations::int8, p.x, 130, 3);
        const std::vector<float> out = run(p, form, 3, false, false);
        for (uint32_t i = 0; i < 17; ++i) {
          CHECK(std::isfinite(out[i]));
          CHECK(std::isnan(out[20 + i]));
          CHECK(std::isfinite(out[40 + i]));
        }
      }
    }
  });
}

TEST_CASE("rows of zeros and of numbers too small for a step give zero") {
  std::mt19937 random(8);
  for_each_target([&](const char* target) {
    INFO(target);
    Problem p = make_problem({17, 64, Kind::int4_bias, 32}, random);
    std::fill(p.x.begin(), p.x.begin() + 64, 0.0f);
    std::fill(p.x.begin() + 64, p.x.begin() + 128, 1e-40f);
    const std::vector<float> out = run(p, form_of(p.shape.kind, Activations::int8, p.x, 64, 2), 2, false, false);
    for (uint32_t i = 0; i < 17; ++i) {
      CHECK(out[i] == p.vector[i]);
      CHECK(out[20 + i] == p.vector[i]);
    }
  });
}

TEST_CASE("a thread pool runs every index once, whatever the number of threads and the grain") {
  for (const uint32_t threads : {1u, 2u, 3u, 5u}) {
    auto pool = ThreadPool::create(threads);
    REQUIRE(pool);
    for (uint32_t round = 0; round < 300; ++round) {
      const uint32_t count = round % 37, grain = 1 + round % 5;
      std::vector<std::atomic<int>> seen(count);
      std::atomic<bool> bad_thread{false};
      (*pool)->parallel_for(count, grain, [&](uint32_t first, uint32_t last, uint32_t thread) {
        if (thread >= threads) bad_thread = true;
        for (uint32_t i = first; i < last; ++i) ++seen[i];
      });
      CHECK_FALSE(bad_thread);
      CHECK(std::all_of(seen.begin(), seen.end(), [](const std::atomic<int>& n) { return n == 1; }));
    }
  }
}

}  // namespace
