// SPDX-License-Identifier: Apache-2.0
// Every CUDA matmul kernel against sums in double, over one table of shapes.
#define CATCH_CONFIG_RUNNER
#include <cuda_runtime_api.h>

#include <bit>
#include <cstdio>
#include <limits>
#include <memory>
#include <span>

#include "catch.hpp"
#include "cuda/matmul.hpp"
#include "kernel_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::testing;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-24;      // half a last bit of an FP32 number
constexpr size_t kGuard = 3;           // floats behind each output row, which no kernel may touch
constexpr uint32_t kSampledRows = 48;  // of a large matrix that are compared

// Device memory with what a vector held, or poison.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes, int fill = 0xff) {
    if (bytes == 0) return;
    REQUIRE(cudaMalloc(&memory_, bytes) == cudaSuccess);
    REQUIRE(cudaMemset(memory_, fill, bytes) == cudaSuccess);
  }
  template <class T>
  explicit DeviceBuffer(std::span<const T> values) : DeviceBuffer(values.size_bytes()) {
    if (memory_ == nullptr) return;
    REQUIRE(cudaMemcpy(memory_, values.data(), values.size_bytes(), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(memory_); }

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
};

cuda::WeightFormat format_of(Kind kind) {
  switch (kind) {
    case Kind::int8:
      return cuda::WeightFormat::int8;
    case Kind::f16:
      return cuda::WeightFormat::f16;
    case Kind::bf16:
      return cuda::WeightFormat::bf16;
    case Kind::f32:
      return cuda::WeightFormat::f32;
    default:
      return cuda::WeightFormat::int4;
  }
}

// One matrix with activations for `most` rows, on both sides.
struct Problem {
  WeightShape shape;
  uint32_t most = 0, ldx = 0;
  TestWeight weight;
  std::vector<float> x;           // [most][cols], halves as floats, unscaled
  std::vector<float> row_scale;   // [most]
  std::vector<float> vector;      // [rows]
  std::vector<float> before;      // [most][rows + kGuard]
  std::vector<uint32_t> sampled;  // rows of the matrix to compare
  DeviceBuffer values, scales, zeros, bias, x_half, row_scale_device, vector_device;

  size_t stride() const { return shape.rows + kGuard; }
};

Problem make_problem(const WeightShape& shape, uint32_t most, std::mt19937& random) {
  Problem p;
  p.shape = shape;
  p.most = most;
  p.ldx = (shape.cols + 63) / 64 * 64;
  p.weight = make_weight(shape, random);
  p.x = random_floats(size_t{most} * shape.cols, 1.0f, random);
  for (size_t i = 0; i < p.x.size(); i += 97) p.x[i] *= 30;  // outliers, as real activations have
  std::vector<uint16_t> halves(size_t{most} * p.ldx, 0);
  for (uint32_t r = 0; r < most; ++r) {
    for (uint32_t k = 0; k < shape.cols; ++k) {
      uint16_t& half = halves[size_t{r} * p.ldx + k];
      half = half_from_float(p.x[size_t{r} * shape.cols + k]);
      p.x[size_t{r} * shape.cols + k] = float_from_half(half);
    }
    p.row_scale.push_back(std::ldexp(1.0f, static_cast<int>(random() % 9) - 2));
  }
  p.vector = random_floats(shape.rows, 1.0f, random);
  p.before = random_floats(size_t{most} * p.stride(), 1.0f, random);
  for (uint32_t i = 0; i < shape.rows; ++i) p.sampled.push_back(i);
  if (shape.rows > 4 * kSampledRows) {
    std::shuffle(p.sampled.begin(), p.sampled.end(), random);
    p.sampled.resize(kSampledRows);
    p.sampled.back() = shape.rows - 1;
  }
  const auto plane = [](const std::vector<std::byte>& bytes) {
    return DeviceBuffer(std::span<const std::byte>(bytes));
  };
  p.values = plane(p.weight.planes.values);
  p.scales = plane(p.weight.planes.scales);
  p.zeros = plane(p.weight.planes.zeros);
  p.bias = plane(p.weight.planes.bias);
  p.x_half = DeviceBuffer(std::span<const uint16_t>(halves));
  p.row_scale_device = DeviceBuffer(std::span<const float>(p.row_scale));
  p.vector_device = DeviceBuffer(std::span<const float>(p.vector));
  return p;
}

cuda::MatmulWeight weight_of(const Problem& p) {
  cuda::MatmulWeight w;
  w.format = format_of(p.shape.kind);
  w.rows = p.shape.rows;
  w.cols = p.shape.cols;
  w.group_elems = p.shape.group;
  w.scale = std::ldexp(1.0f, p.weight.tensor.scale_exponent);
  w.values = p.values.as<void>();
  w.scales = p.scales.as<__half>();
  w.zeros = p.zeros.as<uint8_t>();
  w.bias = p.bias.as<__half>();
  return w;
}

// Zeroed counters, poisoned partial sums; one for all calls, which must leave the counters zero.
struct Workspace {
  uint64_t bytes = uint64_t{64} << 20;
  DeviceBuffer memory{size_t{64} << 20};
  Workspace() { REQUIRE(cudaMemset(memory.as<void>(), 0, cuda::kMatmulCounterBytes) == cudaSuccess); }
};

Workspace& workspace() {
  static Workspace* one = new Workspace;  // outlives the device's destruction order
  return *one;
}

cuda::MatmulCall call_of(const Problem& p, uint32_t first_row, uint32_t rows, float* out, bool accumulate) {
  cuda::MatmulCall call;
  call.x = p.x_half.as<__half>() + size_t{first_row} * p.ldx;
  call.ldx = p.ldx;
  call.row_scale = accumulate ? nullptr : p.row_scale_device.as<float>() + first_row;
  call.rows = rows;
  call.parts = 1;
  call.part[0].weight = weight_of(p);
  call.part[0].out = out;
  call.part[0].ldo = static_cast<uint32_t>(p.stride());
  call.part[0].vector = accumulate ? nullptr : p.vector_device.as<float>();
  call.accumulate = accumulate;
  call.workspace = workspace().memory.as<void>();
  call.workspace_bytes = workspace().bytes;
  return call;
}

std::vector<float> fetch(const DeviceBuffer& out, size_t count) {
  std::vector<float> host(count);
  REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
  REQUIRE(cudaMemcpy(host.data(), out.as<float>(), count * sizeof(float), cudaMemcpyDeviceToHost) == cudaSuccess);
  return host;
}

std::vector<float> run(const Problem& p, uint32_t first_row, uint32_t rows, bool accumulate) {
  std::vector<float> before(p.before.begin(), p.before.begin() + static_cast<ptrdiff_t>(rows * p.stride()));
  if (!accumulate) std::fill(before.begin(), before.end(), kNaN);
  const DeviceBuffer out{std::span<const float>(before)};
  REQUIRE(cuda::matmul(call_of(p, first_row, rows, out.as<float>(), accumulate), nullptr) == cudaSuccess);
  return fetch(out, before.size());
}

bool same_bits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// Roundings that a product meets on its way into an output, at most, in halves of a last bit of the sum of magnitudes.
// The matrix units add 16 products to a sum and cut off what lies below its last bits: 4 for each of the 8 of a group.
// Then the product with the scale, an addition per group or 64 columns, 8 warps, slabs, and what is added at the end.
// f16 and bf16 have one sum through all of K: 4 (bf16: twice 4) for every 16 columns. f32: K / 32 additions and a tree.
double roundings(const WeightShape& shape) {
  const double cols = shape.cols;
  switch (shape.kind) {
    case Kind::f32:
      return cols / 32 + 16;
    case Kind::bf16:
      return cols / 2 + 40;
    case Kind::f16:
      return cols / 4 + 40;
    default:
      return 32 + cols / 32 + 8 + cols / 4096 + 8;
  }
}

// Every output of `rows` rows against the sum in double (of a large matrix some), none left unwritten, nothing beside
// them.
void compare(const Problem& p, uint32_t rows, bool accumulate, const std::vector<float>& out) {
  const double n = 1.01 * roundings(p.shape) * kUnit;
  size_t wrong = 0, touched = 0;
  double worst = 0;
  for (uint32_t r = 0; r < rows; ++r) {
    const double scale = accumulate ? 1.0 : double{p.row_scale[r]};
    for (const uint32_t i : p.sampled) {
      double sum = 0, magnitude = 0;
      const float* w = p.weight.values.data() + size_t{i} * p.shape.cols;
      const float* m = p.weight.magnitude.data() + size_t{i} * p.shape.cols;
      const float* x = p.x.data() + size_t{r} * p.shape.cols;
      for (uint32_t k = 0; k < p.shape.cols; ++k) {
        sum += double{w[k]} * double{x[k]};
        magnitude += double{m[k]} * std::fabs(double{x[k]});
      }
      const double add = accumulate ? double{p.before[r * p.stride() + i]} : double{p.vector[i]};
      const double error = std::fabs(double{out[r * p.stride() + i]} - (sum * scale + add));
      const double bound = n * (magnitude * scale + std::fabs(add));
      if (!(error <= bound)) ++wrong;
      if (!(error / bound <= worst)) worst = error / bound;
    }
    for (uint32_t i = 0; i < p.shape.rows && !accumulate; ++i) {
      if (std::isnan(out[r * p.stride() + i])) ++wrong;
    }
    for (size_t i = p.shape.rows; i < p.stride(); ++i) {
      if (!same_bits(out[r * p.stride() + i], accumulate ? p.before[r * p.stride() + i] : kNaN)) ++touched;
    }
  }
  INFO("worst error " << worst << " of the bound");
  CHECK(wrong == 0);
  CHECK(touched == 0);
}

void check_values(const Problem& p, uint32_t rows, bool accumulate) {
  compare(p, rows, accumulate, run(p, 0, rows, accumulate));
}

// Each of rows first..first+count-1 has the bits it has alone.
void check_same_rows(const Problem& p, uint32_t count, const std::vector<std::vector<float>>& alone) {
  const std::vector<float> out = run(p, 0, count, false);
  size_t different = 0;
  for (uint32_t r = 0; r < count; ++r) {
    for (uint32_t i = 0; i < p.shape.rows; ++i) {
      if (!same_bits(out[r * p.stride() + i], alone[r][i])) ++different;
    }
  }
  CHECK(different == 0);
}

std::vector<WeightShape> small_shapes() {
  const std::pair<uint32_t, uint32_t> sizes[] = {{1, 1},    {5, 63},   {17, 65},    {16, 64},  {1, 96},
                                                 {31, 130}, {48, 576}, {273, 1088}, {33, 4160}};
  std::vector<WeightShape> shapes;
  for (const auto& [rows, cols] : sizes) {
    for (const Kind kind : {Kind::int4, Kind::int4_zeros, Kind::int4_bias, Kind::int8}) {
      for (const uint32_t group : {32u, 64u, 128u}) shapes.push_back({rows, cols, kind, group});
    }
    for (const Kind kind : {Kind::f16, Kind::bf16, Kind::f32}) shapes.push_back({rows, cols, kind, 0});
  }
  return shapes;
}

// Every multiprocessor at work, several slabs, odd slices (14336), more row tiles than blocks, and so many that blocks
// take some by a counter.
std::vector<WeightShape> large_shapes() {
  return {{4112, 8192, Kind::int4, 128},      {2050, 14336, Kind::int4, 128}, {520, 28672, Kind::int4_bias, 32},
          {13000, 6144, Kind::int4_zeros, 64}, {20000, 1088, Kind::int4_bias, 32},
          {1030, 8192, Kind::int4_zeros, 64}, {3000, 4096, Kind::int8, 128},  {600, 8192, Kind::int8, 32},
          {700, 8256, Kind::f16, 0},          {700, 4096, Kind::bf16, 0},     {300, 2048, Kind::f32, 0}};
}

uint32_t printed_seed() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return seed;
}

void check_shape(const Problem& p, std::initializer_list<uint32_t> row_counts) {
  for (const uint32_t rows : row_counts) {
    INFO(rows << " rows");
    check_values(p, rows, false);
    check_values(p, rows, true);
  }
}

void check_company(const Problem& p) {
  std::vector<std::vector<float>> alone;
  for (uint32_t r = 0; r < 8; ++r) alone.push_back(run(p, r, 1, false));
  for (uint32_t rows = 2; rows <= 8; ++rows) {
    INFO(rows << " rows in company");
    check_same_rows(p, rows, alone);
  }
}

TEST_CASE("cuda matmul kernels agree with sums in double on small and ragged shapes", "[small]") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (const WeightShape& shape : small_shapes()) {
    INFO("seed " << seed << ", " << shape.text());
    const Problem p = make_problem(shape, 130, random);
    check_shape(p, {1, 3, 8, 9, 16, 17, 64, 130});
    check_company(p);
  }
}

TEST_CASE("cuda matmul kernels agree with sums in double on large shapes", "[large]") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (const WeightShape& shape : large_shapes()) {
    INFO("seed " << seed << ", " << shape.text());
    const Problem p = make_problem(shape, 300, random);
    check_shape(p, {1, 2, 5, 8, 12, 64, 100, 300});
    check_company(p);
  }
}

// More pairs of tiles than clusters of blocks: whole waves, and a rest that is cut along K.
TEST_CASE("cuda matmul kernels agree with sums in double over several waves of tiles", "[large]") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  for (const WeightShape& shape : {WeightShape{4112, 2112, Kind::int4_zeros, 64}, {17000, 1152, Kind::int4_bias, 32}}) {
    INFO("seed " << seed << ", " << shape.text());
    const Problem p = make_problem(shape, 1100, random);
    check_shape(p, {24, 60, 520, 1100});
  }
}

// A few launches of every kernel, for compute-sanitizer, which takes minutes over the whole table. Run by name only.
TEST_CASE("cuda matmul kernels agree with sums in double under a sanitizer", "[.sanitizer]") {
  std::mt19937 random(printed_seed());
  for (const WeightShape& shape :
       {WeightShape{17, 65, Kind::int4, 32}, WeightShape{33, 4160, Kind::int4, 128},
        WeightShape{150, 576, Kind::int4_zeros, 64}, WeightShape{40, 12352, Kind::int4, 64},
        WeightShape{48, 576, Kind::int4_bias, 32}, WeightShape{33, 4160, Kind::int8, 128},
        WeightShape{48, 576, Kind::f16, 0}, WeightShape{31, 130, Kind::bf16, 0}, WeightShape{5, 63, Kind::f32, 0}}) {
    INFO(shape.text());
    check_shape(make_problem(shape, 130, random), {1, 8, 16, 64, 130});
  }
}

TEST_CASE("cuda matmul gives the same bits in every run", "[small][large]") {
  std::mt19937 random(printed_seed());
  for (const WeightShape& shape :
       {WeightShape{4112, 8192, Kind::int4, 128}, WeightShape{1030, 14336, Kind::int4_bias, 32}}) {
    const Problem p = make_problem(shape, 200, random);
    for (const uint32_t rows : {1u, 8u, 64u, 200u}) {
      const std::vector<float> first = run(p, 0, rows, true);
      for (int again = 0; again < 10; ++again) {
        const std::vector<float> out = run(p, 0, rows, true);
        CHECK(std::memcmp(out.data(), first.data(), out.size() * sizeof(float)) == 0);
      }
    }
  }
}

// From 9 rows on the bits may differ, since what a call multiplies together decides where K is cut.
TEST_CASE("cuda matmul of several matrices gives what one call for each does", "[small]") {
  const uint32_t seed = printed_seed();
  std::mt19937 random(seed);
  const Kind kinds[][3] = {{Kind::int4, Kind::int4, Kind::int4},
                           {Kind::int4_bias, Kind::int4, Kind::int4_zeros},
                           {Kind::int4, Kind::int8, Kind::f16},
                           {Kind::f16, Kind::f16, Kind::f16}};
  const uint32_t heights[3] = {80, 17, 33};
  for (const auto& kind : kinds) {
    std::vector<Problem> parts;
    for (int i = 0; i < 3; ++i) {
      parts.push_back(make_problem({heights[i], 4224, kind[i], kind[i] == Kind::f16 ? 0u : 64u}, 70, random));
      parts[i].x = parts[0].x;   // the matrices of a call multiply one input
      parts[i].row_scale = parts[0].row_scale;
    }
    for (const uint32_t rows : {1u, 7u, 20u, 70u}) {
      INFO("seed " << seed << ", " << rows << " rows, kinds " << int(kind[0]) << int(kind[1]) << int(kind[2]));
      std::vector<DeviceBuffer> outs;
      cuda::MatmulCall call;
      for (int i = 0; i < 3; ++i) {
        const std::vector<float> poison(rows * parts[i].stride(), kNaN);
        outs.emplace_back(std::span<const float>(poison));
        Problem& p = parts[i];
        const cuda::MatmulCall one = call_of(p, 0, rows, outs.back().as<float>(), false);
        if (i == 0) call = one;
        call.part[i] = one.part[0];
      }
      call.parts = 3;
      REQUIRE(cuda::matmul(call, nullptr) == cudaSuccess);
      for (int i = 0; i < 3; ++i) {
        const std::vector<float> together = fetch(outs[i], rows * parts[i].stride());
        compare(parts[i], rows, false, together);
        if (rows > 8) continue;
        const DeviceBuffer single(rows * parts[i].stride() * sizeof(float));
        cuda::MatmulCall one = call;
        one.parts = 1;
        one.part[0] = call.part[i];
        one.part[0].out = single.as<float>();
        REQUIRE(cuda::matmul(one, nullptr) == cudaSuccess);
        const std::vector<float> apart = fetch(single, together.size());
        size_t different = 0;
        for (uint32_t r = 0; r < rows; ++r) {
          for (uint32_t n = 0; n < heights[i]; ++n) {
            const size_t at = r * parts[i].stride() + n;
            if (std::isnan(apart[at]) || !same_bits(apart[at], together[at])) ++different;
          }
        }
        CHECK(different == 0);
      }
    }
  }
}

TEST_CASE("copies of x give the bits of one", "[small]") {
  std::mt19937 random(printed_seed());
  for (const WeightShape& shape : {WeightShape{33, 4160, Kind::int4_bias, 32}, WeightShape{4112, 576, Kind::int4, 64},
                                   WeightShape{1030, 14336, Kind::int4, 128}}) {
    const Problem p = make_problem(shape, 2, random);
    for (const uint32_t rows : {1u, 2u}) {
      const std::vector<float> expected = run(p, 0, rows, false);
      const size_t elems = size_t{2} * p.ldx + 64;  // poison between them
      const DeviceBuffer copies(4 * elems * sizeof(uint16_t)), out(rows * p.stride() * sizeof(float));
      for (size_t i = 0; i < 4; ++i) {
        REQUIRE(cudaMemcpy(copies.as<uint16_t>() + i * elems, p.x_half.as<uint16_t>(),
                           size_t{2} * p.ldx * sizeof(uint16_t), cudaMemcpyDeviceToDevice) == cudaSuccess);
      }
      cuda::MatmulCall call = call_of(p, 0, rows, out.as<float>(), false);
      call.x = copies.as<__half>();
      call.x_copies = 4;
      call.x_copy_elems = elems;
      REQUIRE(cuda::matmul(call, nullptr) == cudaSuccess);
      const std::vector<float> got = fetch(out, expected.size());
      for (uint32_t r = 0; r < rows; ++r) {
        CHECK(std::memcmp(&got[r * p.stride()], &expected[r * p.stride()], shape.rows * sizeof(float)) == 0);
      }
    }
  }
}

TEST_CASE("a chain of programmatic launches gives the bits of plain ones", "[small][large]") {
  std::mt19937 random(printed_seed());
  for (const WeightShape& shape : {WeightShape{17, 130, Kind::int4, 32}, WeightShape{4112, 8192, Kind::int4, 128}}) {
    const Problem p = make_problem(shape, 64, random);
    for (const uint32_t rows : {1u, 8u, 64u}) {
      std::vector<float> results[2];
      for (const bool programmatic : {false, true}) {
        const DeviceBuffer out(rows * p.stride() * sizeof(float), 0);
        cuda::MatmulCall call = call_of(p, 0, rows, out.as<float>(), true);
        call.programmatic = call.weights_early = programmatic;
        for (int i = 0; i < 9; ++i) REQUIRE(cuda::matmul(call, nullptr) == cudaSuccess);
        results[programmatic] = fetch(out, rows * p.stride());
      }
      CHECK(std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("cuda matmul refuses what its header rules out and enqueues nothing", "[small]") {
  std::mt19937 random(9);
  const Problem p = make_problem({17, 130, Kind::int4, 32}, 4, random);
  const DeviceBuffer out(4 * p.stride() * sizeof(float));
  const cuda::MatmulCall good = call_of(p, 0, 4, out.as<float>(), false);
  const auto refused = [&](auto&& change) {
    cuda::MatmulCall call = good;
    change(call);
    return cuda::matmul(call, nullptr) == cudaErrorInvalidValue;
  };
  CHECK(refused([](cuda::MatmulCall& c) { c.rows = 0; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.rows = cuda::kMatmulMaxRows + 1; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.ldx = 130; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.x = c.x + 1; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.parts = 4; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.part[0].weight.group_elems = 48; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.part[0].weight.scales = nullptr; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.part[0].ldo = 16; }));
  CHECK(refused([](cuda::MatmulCall& c) { c.workspace_bytes = 0; }));
  CHECK(refused([&](cuda::MatmulCall& c) {
    c.parts = 2;
    c.part[1] = c.part[0];
    c.part[1].weight.cols = 64;
  }));
  for (const float x : fetch(out, 4 * p.stride())) CHECK(std::isnan(x));
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: skipped\n");
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
