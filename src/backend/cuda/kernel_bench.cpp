// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/kernel_bench.hpp"

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <random>
#include <utility>

#include "backend/cuda/cublas.hpp"
#include "backend/cuda/cuda_error.hpp"
#include "backend/cuda/device.hpp"
#include "backend/cuda/scratch.hpp"
#include "backend/cuda/weight_planes.hpp"
#include "base/check.hpp"
#include "base/half.hpp"
#include "base/units.hpp"
#include "cuda/elementwise.hpp"
#include "cuda/matmul.hpp"
#include "cuda/memory_read.hpp"

namespace sluice::backend::cuda {

namespace {

using sluice::cuda::MatmulCall;
using sluice::cuda::MatmulPart;
using storage::Scheme;

constexpr uint64_t kColdBytes = kGiB;             // of weight copies: twenty times the L2 of an H100
constexpr uint64_t kPatternBytes = 16 * kMiB;     // random bytes, repeated through the pools
constexpr uint64_t kCublasWorkspaceBytes = 64 * kMiB;
constexpr uint64_t kSinkBytes = 4096;             // read_memory()'s
constexpr int kWarmUps = 2;
// Launches of a graph, and its replays: a quarter of a second a figure at most.
constexpr int kFewestLaunches = 4, kMostLaunches = 160, kReplays = 9;
constexpr double kGraphSeconds = 5e-3;

uint64_t copy_bytes(const BenchShape& shape) {
  uint64_t bytes = 0;
  for (const BenchShape::Matrix& m : shape.matrices) {
    bytes += align_up(value_bytes(m.scheme, m.rows, shape.cols), 256);
  }
  return align_up(bytes, 4096);
}
// Scales, zeros and bias lie in a pool of their own: small FP16 numbers, which as zero points are as good as any bytes.
uint64_t parameter_bytes(const BenchShape& shape) {
  uint64_t bytes = 0;
  for (const BenchShape::Matrix& m : shape.matrices) {
    const uint64_t count = parameter_count(m.rows, shape.cols, m.group_elems);
    bytes += align_up(count * 2, 256) + (m.has_zeros ? align_up(count, 256) : 0) +
             (m.has_bias ? align_up(count * 2, 256) : 0);
  }
  return align_up(bytes, 4096);
}
uint64_t half_bytes(const BenchShape& shape) { return uint64_t{shape.outputs()} * shape.cols * 2; }

double median(std::vector<float>& milliseconds) {
  std::sort(milliseconds.begin(), milliseconds.end());
  return double{milliseconds[milliseconds.size() / 2]} * 1e-3;
}

class Bench final : public KernelBench {
 public:
  explicit Bench(Device device) : device_(std::move(device)) {}
  ~Bench() override {
    cublas_.reset();
    for (void* memory : memory_) cudaFree(memory);
    for (const cudaEvent_t event : {start_, stop_}) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    cudaGetLastError();
  }

  Status allocate(const std::vector<BenchShape>& shapes, const std::vector<uint32_t>& row_counts);
  Status fill_pools(uint64_t x_bytes);

  std::string device_name() const override { return device_.name; }
  std::string cublas() const override { return cublas_ ? cublas_->version() : no_cublas_; }
  Result<double> read_rate() override;
  Result<BenchTime> time(const BenchShape& shape, uint32_t rows) override;

 private:
  using Launch = std::function<cudaError_t(int)>;

  Status check(cudaError_t code, const char* what) const {
    if (code == cudaSuccess) return {};
    cudaGetLastError();
    return fail(error_of(code, fmt::format("{}: {}", device_.name, what)));
  }
  template <class T>
  Status take(T*& pointer, uint64_t bytes, const char* what) {
    void* memory = nullptr;
    SLUICE_TRY(check(cudaMalloc(&memory, bytes), what));
    memory_.push_back(memory);
    pointer = static_cast<T*>(memory);
    return {};
  }
  Status fill(std::byte* pool, uint64_t bytes, const std::vector<uint32_t>& pattern);
  Status replay(cudaGraphExec_t graph, int times, std::vector<float>& milliseconds);
  Result<double> seconds_per_launch(int launches, const Launch& launch);
  // How many launches make a graph that is long against its own start.
  Result<double> measured(const Launch& launch);
  MatmulCall call_of(const BenchShape& shape, uint32_t rows, int copy) const;

  Device device_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  std::vector<void*> memory_;
  std::byte* values_ = nullptr;                   // random bits: quantized values
  std::byte* numbers_ = nullptr;                  // FP16 numbers of about 0.01, either sign: parameters, FP16 weights
  std::byte* x_ = nullptr;
  float* out_ = nullptr;
  std::byte* workspace_ = nullptr;
  std::byte* cublas_workspace_ = nullptr;
  uint64_t value_pool_bytes_ = 0, number_pool_bytes_ = 0, workspace_bytes_ = 0;
  std::unique_ptr<Cublas> cublas_;
  std::string no_cublas_;
};

Status Bench::fill(std::byte* pool, uint64_t bytes, const std::vector<uint32_t>& pattern) {
  uint64_t filled = std::min(bytes, kPatternBytes);
  SLUICE_TRY(check(cudaMemcpy(pool, pattern.data(), filled, cudaMemcpyHostToDevice), "writing weights"));
  while (filled < bytes) {
    const uint64_t more = std::min(filled, bytes - filled);
    SLUICE_TRY(check(cudaMemcpy(pool + filled, pool, more, cudaMemcpyDeviceToDevice), "writing weights"));
    filled += more;
  }
  return {};
}

Status Bench::allocate(const std::vector<BenchShape>& shapes, const std::vector<uint32_t>& row_counts) {
  const uint32_t max_rows = *std::max_element(row_counts.begin(), row_counts.end());
  SLUICE_TRY(check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream"));
  for (cudaEvent_t* event : {&start_, &stop_}) SLUICE_TRY(check(cudaEventCreate(event), "creating an event"));

  const uint64_t free = device_.free_bytes();
  value_pool_bytes_ = number_pool_bytes_ = std::min(kColdBytes, align_down(free / 8, kMiB));
  uint64_t x_bytes = 0, out_bytes = 0;
  workspace_bytes_ = sluice::cuda::kMatmulCounterBytes;
  for (const BenchShape& shape : shapes) {
    value_pool_bytes_ = std::max(value_pool_bytes_, copy_bytes(shape));
    number_pool_bytes_ = std::max(number_pool_bytes_, std::max(copy_bytes(shape), parameter_bytes(shape)));
    if (half_bytes(shape) < free / 3) number_pool_bytes_ = std::max(number_pool_bytes_, half_bytes(shape));
    x_bytes = std::max(x_bytes, std::max(max_rows, kNormedCopies * kCopiedRows) * sluice::cuda::x_stride(shape.cols) *
                                    sizeof(uint16_t));
    out_bytes = std::max(out_bytes, uint64_t{max_rows} * shape.outputs() * sizeof(float));
    for (const uint32_t rows : row_counts) {
      workspace_bytes_ = std::max(workspace_bytes_, sluice::cuda::matmul_workspace_bytes(call_of(shape, rows, 0)));
    }
  }
  SLUICE_TRY(take(values_, value_pool_bytes_, "allocating weights"));
  SLUICE_TRY(take(numbers_, number_pool_bytes_, "allocating weights"));
  SLUICE_TRY(take(x_, x_bytes, "allocating activations"));
  SLUICE_TRY(take(out_, std::max(out_bytes, kSinkBytes), "allocating results"));
  SLUICE_TRY(take(workspace_, workspace_bytes_, "allocating a workspace"));
  SLUICE_TRY(take(cublas_workspace_, kCublasWorkspaceBytes, "allocating a workspace"));
  SLUICE_TRY(check(cudaMemset(workspace_, 0, workspace_bytes_), "clearing a workspace"));
  SLUICE_TRY(fill_pools(x_bytes));

  Result<std::unique_ptr<Cublas>> cublas = Cublas::open(stream_, cublas_workspace_, kCublasWorkspaceBytes);
  if (cublas) cublas_ = std::move(*cublas);
  else no_cublas_ = cublas.error().message;
  return check(cudaDeviceSynchronize(), "preparing");
}

Status Bench::fill_pools(uint64_t x_bytes) {
  std::mt19937 random(1);   // what is timed does not depend on the numbers, as long as they are numbers
  std::vector<uint32_t> pattern(kPatternBytes / sizeof(uint32_t));
  for (uint32_t& word : pattern) word = static_cast<uint32_t>(random());
  SLUICE_TRY(fill(values_, value_pool_bytes_, pattern));
  for (uint32_t& word : pattern) word = (word & 0x83ff83ffu) | 0x20002000u;
  SLUICE_TRY(fill(numbers_, number_pool_bytes_, pattern));
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(x_bytes / 2);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i < 65536 ? half_from_float(normal(random)) : x[i % 65536];
  return check(cudaMemcpy(x_, x.data(), x_bytes, cudaMemcpyHostToDevice), "writing activations");
}

Status Bench::replay(cudaGraphExec_t graph, int times, std::vector<float>& milliseconds) {
  for (int i = 0; i < times; ++i) {
    SLUICE_TRY(check(cudaEventRecord(start_, stream_), "recording an event"));
    SLUICE_TRY(check(cudaGraphLaunch(graph, stream_), "starting a graph"));
    SLUICE_TRY(check(cudaEventRecord(stop_, stream_), "recording an event"));
    SLUICE_TRY(check(cudaEventSynchronize(stop_), "running kernels"));
    float ms = 0;
    SLUICE_TRY(check(cudaEventElapsedTime(&ms, start_, stop_), "taking the time"));
    if (i >= kWarmUps) milliseconds.push_back(ms);
  }
  return {};
}

Result<double> Bench::seconds_per_launch(int launches, const Launch& launch) {
  SLUICE_TRY(check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capturing a graph"));
  cudaError_t launched = cudaSuccess;
  for (int i = 0; i < launches && launched == cudaSuccess; ++i) launched = launch(i);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
  Status status = check(launched != cudaSuccess ? launched : ended, "capturing a graph");
  if (status) status = check(cudaGraphInstantiate(&executable, graph, 0), "instantiating a graph");
  std::vector<float> milliseconds;
  if (status) status = replay(executable, kWarmUps + kReplays, milliseconds);
  if (executable != nullptr) cudaGraphExecDestroy(executable);
  if (graph != nullptr) cudaGraphDestroy(graph);
  SLUICE_TRY(std::move(status));
  return median(milliseconds) / launches;
}

Result<double> Bench::measured(const Launch& launch) {
  SLUICE_TRY_ASSIGN(once, seconds_per_launch(kFewestLaunches, launch));
  const int launches = std::clamp(static_cast<int>(kGraphSeconds / once), kFewestLaunches, kMostLaunches);
  return seconds_per_launch(launches, launch);
}

Result<double> Bench::read_rate() {
  const uint64_t bytes = align_down(value_pool_bytes_, 16);
  SLUICE_TRY_ASSIGN(seconds, seconds_per_launch(kFewestLaunches, [&](int) {
    return sluice::cuda::read_memory(values_, bytes, reinterpret_cast<uint32_t*>(out_), stream_);
  }));
  return static_cast<double>(bytes) / seconds;
}

// Copy number `copy` of the weights: at the place in the pools where it comes round.
MatmulCall Bench::call_of(const BenchShape& shape, uint32_t rows, int copy) const {
  const auto round = [copy](uint64_t pool, uint64_t bytes) {
    return static_cast<uint64_t>(copy) % std::max<uint64_t>(1, pool / std::max<uint64_t>(1, bytes)) * bytes;
  };
  uint64_t value_at = round(value_pool_bytes_, copy_bytes(shape));
  uint64_t number_at = round(number_pool_bytes_, copy_bytes(shape));
  uint64_t parameter_at = round(number_pool_bytes_, parameter_bytes(shape));
  const auto parameters = [&](uint64_t bytes) {
    return numbers_ + std::exchange(parameter_at, parameter_at + align_up(bytes, 256));
  };
  MatmulCall call;
  call.x = reinterpret_cast<const __half*>(x_);
  call.ldx = sluice::cuda::x_stride(shape.cols);
  call.rows = rows;
  call.x_copies = shape.reads_norm ? copies_of_normed(rows) : 1;
  call.x_copy_elems = uint64_t{rows} * call.ldx;
  call.programmatic = call.weights_early = device_.programmatic_launch;
  call.workspace = workspace_;
  call.workspace_bytes = workspace_bytes_;
  float* out = out_;
  for (const BenchShape::Matrix& matrix : shape.matrices) {
    const bool quantized = matrix.group_elems != 0;
    const uint64_t count = parameter_count(matrix.rows, shape.cols, matrix.group_elems);
    const uint64_t bytes = align_up(value_bytes(matrix.scheme, matrix.rows, shape.cols), 256);
    MatmulPart& part = call.part[call.parts++];
    part.weight = {.format = format_of(matrix.scheme), .rows = matrix.rows, .cols = shape.cols,
                   .group_elems = matrix.group_elems, .values = quantized ? values_ + value_at : numbers_ + number_at};
    (quantized ? value_at : number_at) += bytes;
    if (quantized) part.weight.scales = reinterpret_cast<const __half*>(parameters(2 * count));
    if (matrix.has_zeros) part.weight.zeros = reinterpret_cast<const uint8_t*>(parameters(count));
    if (matrix.has_bias) part.weight.bias = reinterpret_cast<const __half*>(parameters(2 * count));
    part.out = out;
    part.ldo = matrix.rows;
    out += uint64_t{rows} * matrix.rows;
  }
  return call;
}

Result<BenchTime> Bench::time(const BenchShape& shape, uint32_t rows) {
  BenchTime time;
  SLUICE_TRY_ASSIGN(seconds, measured([&](int i) { return sluice::cuda::matmul(call_of(shape, rows, i), stream_); }));
  time.seconds = seconds;
  const uint64_t bytes = half_bytes(shape);
  if (cublas_ == nullptr || bytes > number_pool_bytes_) return time;
  SLUICE_TRY_ASSIGN(cublas_seconds, measured([&](int i) {
    const std::byte* weights = numbers_ + static_cast<uint64_t>(i) % (number_pool_bytes_ / bytes) * bytes;
    return cublas_->multiply(x_, weights, out_, rows, shape.outputs(), shape.cols) ? cudaSuccess : cudaErrorUnknown;
  }));
  time.cublas_seconds = cublas_seconds;
  return time;
}

}  // namespace

Result<std::unique_ptr<KernelBench>> KernelBench::open(int device, const std::vector<BenchShape>& shapes,
                                                       const std::vector<uint32_t>& row_counts) {
  SLUICE_CHECK(!shapes.empty() && !row_counts.empty());
  SLUICE_TRY_ASSIGN(opened, Device::open(device));
  auto bench = std::make_unique<Bench>(std::move(opened));
  SLUICE_TRY(bench->allocate(shapes, row_counts));
  return std::unique_ptr<KernelBench>(std::move(bench));
}

}  // namespace sluice::backend::cuda
