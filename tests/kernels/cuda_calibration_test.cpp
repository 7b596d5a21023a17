// SPDX-License-Identifier: Apache-2.0
// Calibration on a GPU, cuBLAS and cuSOLVER beneath, against double. Exits with 77 where there is none of the three.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "backend/cuda/calibration.hpp"
#include "backend/cuda/cuda_error.hpp"
#include "base/half.hpp"
#include "catch.hpp"

namespace {

using namespace sluice;
using namespace sluice::backend;
using namespace sluice::backend::cuda;

// What a pass left in its slot, for whoever asks.
struct Activations {
  MatmulInput input;
  uint32_t rows = 0;
  std::vector<float> values;   // FP32 [rows][cols], as read_slot gives them

  CudaCalibration::Pass pass() {
    return {.stream = nullptr,
            .check = [](cudaError_t code, const char* what) -> Status {
              if (code == cudaSuccess) return {};
              return fail(error_of(code, what));
            },
            .flush = [] { return Status(); },
            .input = [this](Slot) { return input; },
            .read_slot = [this](Slot, std::span<float> out) -> Status {
              std::copy(values.begin(), values.end(), out.begin());
              return {};
            },
            .rows = [this] { return rows; }};
  }
};

// Before any test: a suite that cannot run says so and is skipped, not passed.
const bool kCanRun = [] {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  std::string reason;
  if (error != cudaSuccess || count == 0) reason = std::string("no CUDA device (") + cudaGetErrorString(error) + ")";
  else if (auto opened = CudaCalibration::open(Activations().pass()); !opened) reason = opened.error().message;
  if (reason.empty()) return true;
  std::printf("skipped: %s\n", reason.c_str());
  (void)std::fflush(stdout);
  std::_Exit(77);
}();

std::mt19937 seeded() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return std::mt19937(seed);
}

template <class T>
DeviceArray<T> on_device(const std::vector<T>& values) {
  auto array = DeviceArray<T>::create(values.size());
  REQUIRE(array);
  REQUIRE(cudaMemcpy(array->data(), values.data(), array->bytes(), cudaMemcpyHostToDevice) == cudaSuccess);
  return std::move(*array);
}

// Correlated rows as activations are: a few directions that all share, and noise.
std::vector<float> random_rows(uint32_t rows, uint32_t cols, std::mt19937& random) {
  constexpr uint32_t kShared = 8;
  std::normal_distribution<float> normal;
  std::vector<float> directions(size_t{kShared} * cols), values(size_t{rows} * cols);
  for (float& value : directions) value = normal(random);
  for (uint32_t r = 0; r < rows; ++r) {
    float amounts[kShared];
    for (float& amount : amounts) amount = normal(random);
    for (uint32_t c = 0; c < cols; ++c) {
      float value = normal(random);
      for (uint32_t d = 0; d < kShared; ++d) value += amounts[d] * directions[size_t{d} * cols + c];
      values[size_t{r} * cols + c] = value;
    }
  }
  return values;
}

double frobenius(const std::vector<double>& matrix) {
  double sum = 0;
  for (const double value : matrix) sum += value * value;
  return std::sqrt(sum);
}

// The inverse of the Cholesky factor of a symmetric matrix, both lower triangles [n][n].
std::vector<double> inverse_factor(const std::vector<float>& matrix, uint32_t n) {
  std::vector<double> factor(matrix.begin(), matrix.end()), inverse(size_t{n} * n);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      double sum = factor[i * n + j];
      for (size_t k = 0; k < j; ++k) sum -= factor[i * n + k] * factor[j * n + k];
      factor[i * n + j] = i == j ? std::sqrt(sum) : sum / factor[j * n + j];
    }
  }
  for (size_t col = 0; col < n; ++col) {
    for (size_t i = col; i < n; ++i) {
      double sum = i == col ? 1 : 0;
      for (size_t k = col; k < i; ++k) sum -= factor[i * n + k] * inverse[k * n + col];
      inverse[i * n + col] = sum / factor[i * n + i];
    }
  }
  return inverse;
}

double largest_eigenvalue(const std::vector<float>& matrix, uint32_t n) {
  std::vector<double> x(n, 1), y(n);
  double norm = 0;
  for (int round = 0; round < 50; ++round) {
    for (size_t i = 0; i < n; ++i) {
      y[i] = 0;
      for (size_t j = 0; j < n; ++j) y[i] += static_cast<double>(matrix[std::max(i, j) * n + std::min(i, j)]) * x[j];
    }
    norm = frobenius(y);
    for (size_t i = 0; i < n; ++i) x[i] = y[i] / norm;
  }
  return norm;
}

// Scales of rows other than 1 send them through FP32.
TEST_CASE("second moments summed on a GPU are those of the same activations in double") {
  std::mt19937 random = seeded();
  for (const bool scaled : {false, true}) {
    for (const uint32_t cols : {1u, 72u, 320u, 1031u}) {
      const uint32_t ldx = (cols + 63) / 64 * 64;
      Activations slot;
      auto calibration = CudaCalibration::open(slot.pass());
      REQUIRE(calibration);
      auto sum = (*calibration)->create_sum(cols);
      REQUIRE(sum);
      std::vector<double> expected(size_t{cols} * cols), magnitude(size_t{cols} * cols);
      uint32_t added = 0;
      for (const uint32_t rows : {1u, 40u, 257u}) {
        std::vector<float> values = random_rows(rows, cols, random);
        std::vector<uint16_t> halves(size_t{rows} * ldx);
        const std::vector<float> scales(rows, scaled ? 4096.0f : 1.0f);
        for (uint32_t r = 0; r < rows; ++r) {
          for (uint32_t c = 0; c < cols; ++c) {
            const uint16_t half = half_from_float(values[size_t{r} * cols + c]);
            halves[size_t{r} * ldx + c] = half;
            values[size_t{r} * cols + c] = float_from_half(half) * scales[r];
          }
        }
        for (uint32_t r = 0; r < rows; ++r) {
          for (size_t i = 0; i < cols; ++i) {
            for (size_t j = 0; j <= i; ++j) {
              const double product = static_cast<double>(values[size_t{r} * cols + i]) * values[size_t{r} * cols + j];
              expected[i * cols + j] += product;
              magnitude[i * cols + j] += std::abs(product);
            }
          }
        }
        const DeviceArray<uint16_t> x = on_device(halves);
        const DeviceArray<float> row_scale = on_device(scales);
        slot.input = {reinterpret_cast<const __half*>(x.data()), row_scale.data(), cols, ldx};
        slot.rows = rows;
        slot.values = values;
        REQUIRE((*calibration)->add(*sum, Slot::normed));
        REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
        added += rows;
      }
      std::vector<float> moments(size_t{cols} * cols);
      REQUIRE((*calibration)->take(*sum, moments));
      // FP32 sums of so many products: half a unit of what has been added up, for each.
      size_t wrong = 0;
      for (size_t i = 0; i < cols; ++i) {
        for (size_t j = 0; j <= i; ++j) {
          const size_t at = i * cols + j;
          const double bound = std::ldexp(magnitude[at], -24) * (added + 2);
          if (!(std::abs(moments[at] - expected[at]) <= bound)) ++wrong;
        }
      }
      INFO(cols << " columns, scaled " << scaled);
      CHECK(wrong == 0);
    }
  }
}

// Perturbation of a Cholesky factor (Sun, "Perturbation bounds for the Cholesky and QR factorizations", 1991): the
// relative error grows with the condition of the matrix, n units in the last place of it at most.
TEST_CASE("the inverse Cholesky factor of a GPU is that of double") {
  std::mt19937 random = seeded();
  Activations slot;
  auto calibration = CudaCalibration::open(slot.pass());
  REQUIRE(calibration);
  for (const uint32_t n : {1u, 72u, 320u, 701u}) {
    for (const double damp : {0.01, 1.0}) {
      const uint32_t rows = 2 * n;
      const std::vector<float> x = random_rows(rows, n, random);
      std::vector<float> matrix(size_t{n} * n);
      double mean = 0;
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j <= i; ++j) {
          double sum = 0;
          for (size_t r = 0; r < rows; ++r) sum += static_cast<double>(x[r * n + i]) * x[r * n + j];
          matrix[i * n + j] = static_cast<float>(sum / rows);
        }
        mean += static_cast<double>(matrix[i * n + i]) / n;
      }
      for (size_t i = 0; i < n; ++i) matrix[i * n + i] += static_cast<float>(damp * mean);
      const std::vector<double> expected = inverse_factor(matrix, n);
      const double condition = largest_eigenvalue(matrix, n) / (damp * mean);
      std::vector<float> inverse = matrix;
      auto positive = (*calibration)->invert_factor(inverse, n);
      REQUIRE(positive);
      REQUIRE(*positive);
      std::vector<double> difference(expected.size());
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j <= i; ++j) difference[i * n + j] = inverse[i * n + j] - expected[i * n + j];
      }
      const double error = frobenius(difference) / frobenius(expected);
      std::printf("n %u, condition %.0f: relative error %.1e\n", n, condition, error);
      CHECK(error <= std::ldexp(n * condition, -24));
    }
  }
}

TEST_CASE("a matrix that is not positive definite is called that") {
  Activations slot;
  auto calibration = CudaCalibration::open(slot.pass());
  REQUIRE(calibration);
  std::vector<float> matrix = {1, 0, 0, 2, 1, 0, 0, 0, 1};   // of eigenvalues -1, 1 and 3
  auto positive = (*calibration)->invert_factor(matrix, 3);
  REQUIRE(positive);
  CHECK_FALSE(*positive);
}

}  // namespace
