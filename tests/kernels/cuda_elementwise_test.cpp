// SPDX-License-Identifier: Apache-2.0
// The kernels between the matrices on a GPU against double. Exits with 77 where there is none.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "base/half.hpp"
#include "catch.hpp"
#include "cuda/elementwise.hpp"

namespace {

using namespace sluice;
using namespace sluice::cuda;

// Before any test: a suite that cannot run says so and is skipped, not passed.
const bool kHasDevice = [] {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return true;
  std::printf("skipped: no CUDA device (%s)\n", cudaGetErrorString(error));
  std::fflush(stdout);
  std::_Exit(77);
}();

void check(cudaError_t error) {
  INFO(cudaGetErrorString(error));
  REQUIRE(error == cudaSuccess);
}

// Device memory of `count` elements, poisoned: what nobody writes is NaN or far out of range.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<size_t>(count, 1) * sizeof(T)));
    data_ = static_cast<T*>(memory);
    check(cudaMemset(data_, 0xff, count * sizeof(T)));
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  T* get() const { return data_; }
  std::vector<T> fetch() const {
    std::vector<T> values(count_);
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

std::vector<float> random_floats(size_t count, float magnitude, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, magnitude);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::mt19937 seeded() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return std::mt19937(seed);
}

// X as it must be: within half a unit of FP16 of the true value, columns past the width zero, the scale a power of two
// that is 1 where it can be.
void check_x(const std::vector<double>& expected, uint32_t rows, uint32_t width, const Device<__half>& x,
             const Device<float>& scales) {
  const std::vector<__half> halves = x.fetch();
  const std::vector<float> scale = scales.fetch();
  const uint32_t stride = x_stride(width);
  for (uint32_t r = 0; r < rows; ++r) {
    double largest = 0;
    for (uint32_t c = 0; c < width; ++c) largest = std::max(largest, std::abs(expected[size_t{r} * width + c]));
    int exponent = 0;
    REQUIRE(std::frexp(scale[r], &exponent) == 0.5f);
    if (largest < 65000) REQUIRE(scale[r] == 1.0f);
    for (uint32_t c = 0; c < stride; ++c) {
      const uint16_t bits = __half_raw(halves[size_t{r} * stride + c]).x;
      const double got = static_cast<double>(float_from_half(bits)) * scale[r];
      if (c >= width) {
        REQUIRE(bits == 0);
        continue;
      }
      const double want = expected[size_t{r} * width + c];
      // Half a unit of FP16, the smallest subnormal, and FP32 arithmetic of a few operations before.
      const double bound = std::abs(want) * (0x1p-11 + 0x1p-19) + scale[r] * 0x1p-25;
      if (std::abs(got - want) > bound) {
        INFO("row " << r << ", column " << c << ": " << got << " instead of " << want);
        REQUIRE(false);
      }
    }
  }
}

const uint32_t kWidths[] = {1, 3, 30, 64, 66, 100, 576, 1024, 4096, 8192, 14337, 28672};

}  // namespace

TEST_CASE("RMSNorm gives what double gives, for every width, with and without a weight") {
  std::mt19937 random = seeded();
  for (const uint32_t width : kWidths) {
    for (const uint32_t rows : {1u, 5u}) {
      for (const float magnitude : {1.0f, 3e4f}) {
        for (const bool weighted : {true, false}) {
          INFO("width " << width << ", rows " << rows << ", magnitude " << magnitude);
          const std::vector<float> in = random_floats(size_t{rows} * width, magnitude, random);
          // Weights so large that the product passes FP16's range.
          const std::vector<float> weight = random_floats(width, magnitude, random);
          std::vector<double> expected;
          for (uint32_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (uint32_t c = 0; c < width; ++c) sum += std::pow(double{in[size_t{r} * width + c]}, 2);
            const double factor = 1 / std::sqrt(sum / width + double{1e-5f});
            for (uint32_t c = 0; c < width; ++c) {
              expected.push_back(in[size_t{r} * width + c] * factor * (weighted ? double{weight[c]} : 1.0));
            }
          }
          const Device<float> device_in(in), device_weight(weight), scale(rows);
          const Device<__half> out(size_t{rows} * x_stride(width));
          check(launch_rms_norm({.in = device_in.get(), .weight = weighted ? device_weight.get() : nullptr, .eps = 1e-5f,
                                 .rows = rows, .width = width, .out = out.get(), .row_scale = scale.get()}, nullptr));
          check_x(expected, rows, width, out, scale);
        }
      }
    }
  }
}

TEST_CASE("copies of a norm are the same bits") {
  std::mt19937 random = seeded();
  for (const uint32_t width : kWidths) {
    const uint32_t rows = 2, copies = 4;
    const size_t elems = size_t{rows} * x_stride(width);
    const Device<float> in(random_floats(size_t{rows} * width, 1.0f, random)), scale(rows);
    const Device<__half> out(copies * elems);
    check(launch_rms_norm({.in = in.get(), .eps = 1e-5f, .rows = rows, .width = width, .out = out.get(),
                           .copies = copies, .row_scale = scale.get()}, nullptr));
    const std::vector<__half> all = out.fetch();
    for (uint32_t copy = 1; copy < copies; ++copy) {
      INFO("width " << width << ", copy " << copy);
      CHECK(std::memcmp(all.data(), all.data() + copy * elems, elems * sizeof(__half)) == 0);
    }
  }
}

TEST_CASE("SwiGLU gives what double gives, scales rows that FP16 does not hold, and leaves its counters zero") {
  std::mt19937 random = seeded();
  for (const uint32_t width : kWidths) {
    const uint32_t rows = 4;
    INFO("width " << width);
    std::vector<float> gate = random_floats(size_t{rows} * width, 4.0f, random);
    std::vector<float> up = random_floats(size_t{rows} * width, 4.0f, random);
    // Row 1 holds one product of 10^9, row 3 many.
    gate[width + width / 2] = 30000.0f;
    up[width + width / 2] = 30000.0f;
    for (uint32_t c = 0; c < width; ++c) gate[size_t{3} * width + c] *= 5000.0f;
    gate[size_t{3} * width] = 5000.0f;
    up[size_t{3} * width] = 60.0f;
    std::vector<double> expected;
    for (size_t i = 0; i < gate.size(); ++i) expected.push_back(double{gate[i]} / (1 + std::exp(-double{gate[i]})) * up[i]);
    const Device<float> device_gate(gate), device_up(up), scale(rows);
    const Device<__half> out(size_t{rows} * x_stride(width));
    const Device<uint2> sync(std::vector<uint2>(rows, make_uint2(0, 0)));
    for (int repeat = 0; repeat < 2; ++repeat) {
      check(launch_swiglu({.gate = device_gate.get(), .up = device_up.get(), .rows = rows, .width = width,
                           .out = out.get(), .row_scale = scale.get(), .sync = sync.get()}, nullptr));
      check_x(expected, rows, width, out, scale);
      CHECK(scale.fetch()[1] > 1.0f);
      for (const uint2 words : sync.fetch()) CHECK((words.x == 0 && words.y == 0));
    }
  }
}

TEST_CASE("infinities and NaN reach the matmul as what they are") {
  const float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
  const uint32_t width = 8192;
  for (const float bad : {kInfinity, -kInfinity, kNaN}) {
    std::vector<float> gate(width, 1.0f), up(width, 1.0f);
    up[5000] = bad;
    const Device<float> device_gate(gate), device_up(up), scale(1);
    const Device<__half> out(width);
    const Device<uint2> sync(std::vector<uint2>(1, make_uint2(0, 0)));
    check(launch_swiglu({.gate = device_gate.get(), .up = device_up.get(), .rows = 1, .width = width, .out = out.get(),
                         .row_scale = scale.get(), .sync = sync.get()}, nullptr));
    CHECK(!std::isfinite(float_from_half(__half_raw(out.fetch()[5000]).x) * scale.fetch()[0]));
  }
}

TEST_CASE("a row's bits do not depend on the rows beside it") {
  std::mt19937 random = seeded();
  for (const uint32_t width : {576u, 8192u, 28672u}) {
    const std::vector<float> gate = random_floats(size_t{8} * width, 4.0f, random);
    const std::vector<float> up = random_floats(size_t{8} * width, 4.0f, random);
    const Device<float> device_gate(gate), device_up(up), scale(8);
    const Device<uint2> sync(std::vector<uint2>(8, make_uint2(0, 0)));
    const auto run = [&](uint32_t first, uint32_t rows, bool swiglu) {
      const Device<__half> out(size_t{rows} * x_stride(width));
      if (swiglu) {
        check(launch_swiglu({.gate = device_gate.get() + size_t{first} * width, .up = device_up.get() + size_t{first} * width,
                             .rows = rows, .width = width, .out = out.get(), .row_scale = scale.get(),
                             .sync = sync.get()}, nullptr));
      } else {
        check(launch_rms_norm({.in = device_gate.get() + size_t{first} * width, .weight = device_up.get(), .eps = 1e-5f,
                               .rows = rows, .width = width, .out = out.get(), .row_scale = scale.get()}, nullptr));
      }
      std::vector<uint16_t> bits;
      for (const __half value : out.fetch()) bits.push_back(__half_raw(value).x);
      return bits;
    };
    for (const bool swiglu : {false, true}) {
      const std::vector<uint16_t> together = run(0, 8, swiglu);
      for (uint32_t r = 0; r < 8; ++r) {
        const std::vector<uint16_t> alone = run(r, 1, swiglu);
        CHECK(std::equal(alone.begin(), alone.end(), together.begin() + size_t{r} * x_stride(width)));
      }
    }
  }
}

TEST_CASE("a pass begins with its embeddings, its rows and their angles in device memory") {
  std::mt19937 random = seeded();
  for (const uint32_t hidden : {30u, 576u, 8192u}) {
    const uint32_t rows = 7, stride = 16, pairs = 40;
    const std::vector<float> embeddings = random_floats(size_t{rows} * hidden, 1.0f, random);
    std::vector<uint32_t> table(3 * stride);
    for (uint32_t r = 0; r < rows; ++r) {
      table[r] = r % 3;
      table[stride + r] = random() % 131072;
      table[2 * stride + r] = r;
    }
    std::vector<float> frequencies(pairs);
    for (uint32_t p = 0; p < pairs; ++p) frequencies[p] = static_cast<float>(std::pow(500000.0, -static_cast<double>(p) / pairs));
    // Pinned memory is read in place: device memory serves as well.
    const Device<float> host_embeddings(embeddings), inverse_frequencies(frequencies), residual(size_t{rows} * hidden);
    const Device<uint32_t> host_table(table), sessions(rows), positions(rows), selected(rows);
    const Device<float2> angles(size_t{rows} * pairs);
    check(launch_begin_pass({.host_embeddings = host_embeddings.get(), .host_table = host_table.get(),
                             .table_stride = stride, .inverse_frequencies = inverse_frequencies.get(),
                             .attention_factor = 1.25f, .rows = rows, .hidden = hidden, .pairs = pairs,
                             .residual = residual.get(),
                             .table = {.sessions = sessions.get(), .positions = positions.get(),
                                       .selected = selected.get()},
                             .angles = angles.get()}, nullptr));
    CHECK(residual.fetch() == embeddings);
    const std::vector<float2> got = angles.fetch();
    for (uint32_t r = 0; r < rows; ++r) {
      CHECK(sessions.fetch()[r] == table[r]);
      CHECK(positions.fetch()[r] == table[stride + r]);
      CHECK(selected.fetch()[r] == r);
      for (uint32_t p = 0; p < pairs; ++p) {
        const double angle = double{frequencies[p]} * table[stride + r];
        const float2 a = got[size_t{r} * pairs + p];
        REQUIRE(std::abs(a.x - 1.25 * std::cos(angle)) < 1e-6);
        REQUIRE(std::abs(a.y - 1.25 * std::sin(angle)) < 1e-6);
      }
    }
  }
}

TEST_CASE("rows that want logits move to the front and keep their bits") {
  std::mt19937 random = seeded();
  for (const uint32_t width : {30u, 576u, 8192u}) {
    const std::vector<float> in = random_floats(size_t{40} * width, 1.0f, random);
    for (const std::vector<uint32_t>& selected :
         {std::vector<uint32_t>{0}, {39}, {0, 1, 2}, {3, 4, 5, 6, 39}, {1, 2, 3, 4, 5, 6, 7, 8}}) {
      const Device<float> rows(in);
      const Device<uint32_t> table(selected);
      check(launch_select_rows({.rows = rows.get(), .selected = table.get(),
                                .selected_rows = static_cast<uint32_t>(selected.size()), .width = width}, nullptr));
      const std::vector<float> got = rows.fetch();
      for (size_t i = 0; i < selected.size(); ++i) {
        CHECK(std::equal(got.begin() + static_cast<ptrdiff_t>(i * width), got.begin() + static_cast<ptrdiff_t>((i + 1) * width),
                         in.begin() + static_cast<ptrdiff_t>(size_t{selected[i]} * width)));
      }
    }
  }
}

TEST_CASE("columns are gathered bit for bit, the padding is zero, and an entry out of range reads the last column") {
  std::mt19937 random = seeded();
  for (const uint32_t width : {1u, 2u, 63u, 64u, 130u, 1000u, 8192u, 28672u}) {
    for (const uint32_t rows : {1u, 3u, 64u}) {
      INFO(width << " columns, " << rows << " rows");
      const uint32_t stride = x_stride(width);
      std::vector<uint16_t> in(size_t{rows} * stride);
      for (uint16_t& half : in) half = static_cast<uint16_t>(random());
      std::vector<uint32_t> perm(width);
      std::iota(perm.begin(), perm.end(), 0u);
      std::shuffle(perm.begin(), perm.end(), random);
      perm[width / 2] = 0xffffffffu;
      const Device<uint16_t> x(in), out(in.size());
      const Device<uint32_t> order(perm);
      check(launch_gather_columns({.x = reinterpret_cast<const __half*>(x.get()), .perm = order.get(), .rows = rows,
                                   .width = width, .out = reinterpret_cast<__half*>(out.get())}, nullptr));
      const std::vector<uint16_t> got = out.fetch();
      size_t different = 0;
      for (uint32_t r = 0; r < rows; ++r) {
        for (uint32_t k = 0; k < stride; ++k) {
          const uint16_t want = k < width ? in[size_t{r} * stride + std::min(perm[k], width - 1)] : uint16_t{0};
          different += got[size_t{r} * stride + k] == want ? 0 : 1;
        }
      }
      CHECK(different == 0);
    }
  }
}

TEST_CASE("a pass ends with its logits and stamps in host memory, its own among them") {
  std::mt19937 random = seeded();
  float* host_logits = nullptr;
  Stamp* host_stamps = nullptr;
  constexpr uint32_t kMost = 128256 + 8, kStamps = 1000;
  check(cudaHostAlloc(reinterpret_cast<void**>(&host_logits), kMost * sizeof(float), cudaHostAllocDefault));
  check(cudaHostAlloc(reinterpret_cast<void**>(&host_stamps), kStamps * sizeof(Stamp), cudaHostAllocDefault));
  for (const uint32_t count : {0u, 1u, 3u, 4u, 4095u, 4096u, 4097u, 50257u, 128256u}) {
    for (const uint32_t stamp_count : {0u, 1u, 257u, kStamps}) {
      INFO(count << " logits, " << stamp_count << " stamps");
      const std::vector<float> expected = random_floats(count, 3.0f, random);
      const Device<float> logits(expected);
      std::vector<Stamp> before(kStamps);
      for (uint32_t i = 0; i < kStamps; ++i) before[i] = {i + 1, i + 2};
      const Device<Stamp> stamps(before);
      std::fill(host_logits, host_logits + kMost, -7.0f);
      std::fill(host_stamps, host_stamps + kStamps, Stamp{});
      check(launch_finish_pass({.logits = logits.get(), .host_logits = host_logits, .logit_count = count,
                                .stamps = stamps.get(), .host_stamps = host_stamps, .stamp_count = stamp_count},
                               nullptr));
      check(cudaDeviceSynchronize());
      CHECK(std::equal(expected.begin(), expected.end(), host_logits));
      CHECK(host_logits[count] == -7.0f);
      for (uint32_t i = 0; i < kStamps; ++i) {
        const bool own = i + 1 == stamp_count;
        const unsigned long long begin = i < stamp_count ? i + 1 : 0, end = i < stamp_count ? i + 2 : 0;
        REQUIRE((own ? host_stamps[i].begin_ns > 1'000'000 : host_stamps[i].begin_ns == begin));
        REQUIRE(host_stamps[i].end_ns == end);
      }
    }
  }
  check(cudaFreeHost(host_logits));
  check(cudaFreeHost(host_stamps));
}

TEST_CASE("kernels stamp their beginning and end in the order in which they run") {
  std::mt19937 random = seeded();
  constexpr uint32_t kRows = 5, kWidth = 4096;
  const Device<float> in(random_floats(kRows * kWidth, 1.0f, random)), up(random_floats(kRows * kWidth, 1.0f, random));
  const Device<__half> out(kRows * kWidth);
  const Device<float> scale(kRows);
  const Device<uint2> sync(std::vector<uint2>(kRows, uint2{0, 0}));
  const Device<uint32_t> selected(std::vector<uint32_t>{1, 3});
  const Device<Stamp> stamps(std::vector<Stamp>(5, Stamp{}));
  check(launch_stamp(stamps.get(), false, nullptr));
  check(launch_rms_norm({.in = in.get(), .rows = kRows, .width = kWidth, .out = out.get(), .row_scale = scale.get(),
                         .stamp = stamps.get() + 1}, nullptr));
  check(launch_swiglu({.gate = in.get(), .up = up.get(), .rows = kRows, .width = kWidth, .out = out.get(),
                       .row_scale = scale.get(), .sync = sync.get(), .stamp = stamps.get() + 2}, nullptr));
  check(launch_select_rows({.rows = in.get(), .selected = selected.get(), .selected_rows = 2, .width = kWidth,
                            .stamp = stamps.get() + 3}, nullptr));
  check(launch_stamp(stamps.get() + 4, true, nullptr));
  const std::vector<Stamp> got = stamps.fetch();
  CHECK(got[0].begin_ns > 0);
  CHECK(got[0].end_ns == 0);
  CHECK(got[1].begin_ns >= got[0].begin_ns);
  CHECK(got[1].end_ns >= got[1].begin_ns);
  CHECK(got[2].begin_ns >= got[1].end_ns);
  CHECK(got[2].end_ns >= got[2].begin_ns);
  CHECK(got[3].begin_ns >= got[2].end_ns);
  CHECK(got[3].end_ns == 0);
  CHECK(got[4].end_ns >= got[3].begin_ns);
  CHECK(got[4].begin_ns == 0);
  CHECK(launch_stamp(nullptr, true, nullptr) == cudaErrorInvalidValue);
}

TEST_CASE("shapes without sense are refused before anything is launched") {
  CHECK(launch_rms_norm({}, nullptr) == cudaErrorInvalidValue);
  CHECK(launch_swiglu({}, nullptr) == cudaErrorInvalidValue);
  CHECK(launch_begin_pass({}, nullptr) == cudaErrorInvalidValue);
  CHECK(launch_select_rows({}, nullptr) == cudaErrorInvalidValue);
  CHECK(launch_gather_columns({}, nullptr) == cudaErrorInvalidValue);
}
