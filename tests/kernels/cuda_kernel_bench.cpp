// SPDX-License-Identifier: Apache-2.0
// Times the CUDA matmul kernels with cold weights, next to what the memory of this card delivers in the same run.
// Usage: cuda_kernel_bench [substring of a case's name [most rows]]. Each figure is the median of graph replays, a
// graph being launches back to back as a pass makes them, over copies of the weights that are together several times
// the L2 cache. cuBLAS stands beside where libcublas is found at run time.
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/matmul.hpp"
#include "cuda/memory_read.hpp"

namespace {

using namespace sluice::cuda;

constexpr uint64_t kColdBytes = uint64_t{1} << 30;
constexpr uint64_t kReadBytes = uint64_t{2} << 30;
constexpr uint32_t kRowCounts[] = {1, 2, 4, 8, 16, 64, 512};
constexpr uint32_t kMostRows = 512;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct Case {
  const char* name;
  WeightFormat format;
  uint32_t group;
  uint32_t cols;
  uint32_t rows[kMatmulParts];
  bool bias;
};

uint64_t value_bytes(const Case& c, uint32_t rows) {
  const uint64_t tiles = (rows + 15) / 16, cols64 = (c.cols + 63) / 64;
  return tiles * cols64 * (c.format == WeightFormat::int4 ? 512 : c.format == WeightFormat::int8 ? 1024 : 2048);
}
uint64_t scale_bytes(const Case& c, uint32_t rows) {
  return c.group == 0 ? 0 : uint64_t{(rows + 15) / 16} * ((c.cols + c.group - 1) / c.group) * 32;
}
uint64_t weight_bytes(const Case& c) {
  uint64_t bytes = 0;
  for (const uint32_t rows : c.rows)
    bytes += rows == 0 ? 0 : value_bytes(c, rows) + scale_bytes(c, rows) * (c.bias ? 2 : 1);
  return bytes;
}
uint32_t all_rows(const Case& c) { return c.rows[0] + c.rows[1] + c.rows[2]; }

// cuBLAS by its C names; nothing where the library is not there.
struct Cublas {
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                       const void*, void*, int, int, int, int);
  void* handle = nullptr;
  Gemm gemm = nullptr;
  int (*set_stream)(void*, cudaStream_t) = nullptr;
  int (*set_workspace)(void*, void*, size_t) = nullptr;

  bool open() {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      void* library = dlopen(name, RTLD_NOW);
      if (library == nullptr) continue;
      const auto create = reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasCreate_v2"));
      gemm = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx"));
      set_stream = reinterpret_cast<int (*)(void*, cudaStream_t)>(dlsym(library, "cublasSetStream_v2"));
      set_workspace = reinterpret_cast<int (*)(void*, void*, size_t)>(dlsym(library, "cublasSetWorkspace_v2"));
      if (create != nullptr && gemm != nullptr && set_stream != nullptr && create(&handle) == 0) return true;
    }
    return false;
  }
};

class Bench {
 public:
  Bench() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    require(cudaEventCreate(&start_), "event");
    require(cudaEventCreate(&stop_), "event");
    require(cudaMalloc(&weights_, kColdBytes + (uint64_t{1200} << 20)), "weights");
    require(cudaMalloc(&x_, size_t{kMostRows} * 28672 * 2), "x");
    require(cudaMalloc(&out_, size_t{kMostRows} * 131072 * 4), "out");
    require(cudaMalloc(&workspace_, kWorkspace), "workspace");
    require(cudaMemset(workspace_, 0, kWorkspace), "workspace");
    std::mt19937 random(1);
    std::vector<uint32_t> words((16 << 20) / 4);
    // Small FP16 numbers throughout, whatever a plane makes of them. (As int4 they are half as random as real weights
    // are.)
    for (uint32_t& word : words) word = (static_cast<uint32_t>(random()) & 0x83ff83ffu) | 0x20002000u;
    for (uint64_t at = 0; at < kColdBytes + (uint64_t{1184} << 20); at += words.size() * 4) {
      require(cudaMemcpy(static_cast<char*>(weights_) + at, words.data(), words.size() * 4, cudaMemcpyHostToDevice),
              "fill");
    }
    std::normal_distribution<float> normal;
    std::vector<__half> x(size_t{kMostRows} * 28672);
    for (__half& value : x) value = __float2half(normal(random));
    require(cudaMemcpy(x_, x.data(), x.size() * 2, cudaMemcpyHostToDevice), "x");
    cublas_ = blas_.open();
    if (cublas_) {
      blas_.set_stream(blas_.handle, stream_);
      void* space = nullptr;
      require(cudaMalloc(&space, 64 << 20), "cublas workspace");
      if (blas_.set_workspace != nullptr) blas_.set_workspace(blas_.handle, space, 64 << 20);
    }
  }

  // Seconds per launch: the median of replays of a graph of `launches`.
  double time(int launches, int replays, const std::function<cudaError_t(int)>& launch) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capture");
    for (int i = 0; i < launches; ++i) require(launch(i), "launch");
    require(cudaStreamEndCapture(stream_, &graph), "capture");
    require(cudaGraphInstantiate(&executable, graph, 0), "graph");
    std::vector<float> times;
    for (int i = 0; i < replays + 2; ++i) {
      float ms = 0;
      require(cudaEventRecord(start_, stream_), "event");
      require(cudaGraphLaunch(executable, stream_), "graph");
      require(cudaEventRecord(stop_, stream_), "event");
      require(cudaEventSynchronize(stop_), "replay");
      require(cudaEventElapsedTime(&ms, start_, stop_), "event");
      if (i >= 2) times.push_back(ms);
    }
    require(cudaGraphExecDestroy(executable), "graph");
    require(cudaGraphDestroy(graph), "graph");
    std::sort(times.begin(), times.end());
    return double{times[times.size() / 2]} / 1e3 / launches;
  }

  double read_ceiling() {
    return double{kReadBytes} / time(4, 9, [&](int) {
             return read_memory(weights_, kReadBytes, static_cast<uint32_t*>(workspace_) + kMatmulCounterBytes / 4,
                                stream_);
           });
  }

  double time_matmul(const Case& c, uint32_t rows) {
    const uint64_t copy_bytes = (weight_bytes(c) + 4095) / 4096 * 4096;
    const uint64_t copies = std::max<uint64_t>(1, kColdBytes / copy_bytes);
    const int launches = static_cast<int>(rows > 64 ? 4 : std::clamp<uint64_t>(copies, 8, 40));
    return time(launches, rows > 64 ? 5 : 9, [&](int i) {
      char* at = static_cast<char*>(weights_) + static_cast<uint64_t>(i) % copies * copy_bytes;
      MatmulCall call;
      call.x = static_cast<__half*>(x_);
      call.ldx = (c.cols + 63) / 64 * 64;
      call.rows = rows;
      call.programmatic = call.weights_early = true;
      call.workspace = workspace_;
      call.workspace_bytes = kWorkspace;
      float* out = static_cast<float*>(out_);
      for (uint32_t p = 0; p < kMatmulParts && c.rows[p] != 0; ++p) {
        MatmulPart& part = call.part[call.parts++];
        part.weight.format = c.format;
        part.weight.rows = c.rows[p];
        part.weight.cols = c.cols;
        part.weight.group_elems = c.group;
        part.weight.values = at;
        at += value_bytes(c, c.rows[p]);
        if (c.group != 0) {
          part.weight.scales = reinterpret_cast<__half*>(at);
          at += scale_bytes(c, c.rows[p]);
        }
        if (c.bias) {
          part.weight.bias = reinterpret_cast<__half*>(at);
          at += scale_bytes(c, c.rows[p]);
        }
        part.out = out;
        part.ldo = c.rows[p];
        out += size_t{rows} * c.rows[p];
      }
      return matmul(call, stream_);
    });
  }

  // FP16 weights, as many rows as the case has; 0 where cuBLAS is not there or the weights do not fit.
  double time_cublas(const Case& c, uint32_t rows) {
    const uint64_t bytes = uint64_t{all_rows(c)} * c.cols * 2;
    if (!cublas_ || bytes > kColdBytes) return 0;
    const uint64_t copies = kColdBytes / bytes;
    const float one = 1, zero = 0;
    return time(8, 5, [&](int i) {
      const char* weights = static_cast<char*>(weights_) + static_cast<uint64_t>(i) % copies * bytes;
      const int n = static_cast<int>(all_rows(c)), m = static_cast<int>(rows), k = static_cast<int>(c.cols);
      constexpr int kTranspose = 1, kPlain = 0, kHalf = 2, kCompute32F = 68, kDefault = -1;
      const int status = blas_.gemm(blas_.handle, kTranspose, kPlain, n, m, k, &one, weights, kHalf, k, x_, kHalf, k,
                                    &zero, out_, kHalf, n, kCompute32F, kDefault);
      return status == 0 ? cudaSuccess : cudaErrorUnknown;
    });
  }

 private:
  static constexpr uint64_t kWorkspace = uint64_t{128} << 20;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  void *weights_ = nullptr, *x_ = nullptr, *out_ = nullptr, *workspace_ = nullptr;
  Cublas blas_;
  bool cublas_ = false;
};

void print_case(Bench& bench, const Case& c, uint32_t most_rows, double ceiling) {
  for (const uint32_t rows : kRowCounts) {
    if (rows > most_rows || (c.format != WeightFormat::int4 && rows == 512)) continue;
    const double seconds = bench.time_matmul(c, rows);
    const double blas = rows == 1 || rows >= 8 ? bench.time_cublas(c, rows) : 0;
    const double rate = static_cast<double>(weight_bytes(c)) / seconds;
    const double flops = 2.0 * all_rows(c) * c.cols * rows / seconds;
    std::printf("%-22s %6u x %5u  rows %4u  %8.2f us  %5.2f TB/s  %5.1f%%  %6.1f TFLOP/s", c.name, all_rows(c), c.cols,
                rows, seconds * 1e6, rate / 1e12, 100 * rate / ceiling, flops / 1e12);
    if (blas > 0) std::printf("  cublas %8.2f us  x%.2f", blas * 1e6, blas / seconds);
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: skipped\n");
    return 77;
  }
  cudaDeviceProp properties = {};
  require(cudaGetDeviceProperties(&properties, 0), "device");
  const Case cases[] = {
      {"int4 g128 gate or up", WeightFormat::int4, 128, 8192, {28672, 0, 0}, false},
      {"int4 g128 down", WeightFormat::int4, 128, 28672, {8192, 0, 0}, false},
      {"int4 g128 gate + up", WeightFormat::int4, 128, 8192, {28672, 28672, 0}, false},
      {"int4 g128 head", WeightFormat::int4, 128, 8192, {128256, 0, 0}, false},
      {"int4 g128 qkv", WeightFormat::int4, 128, 8192, {8192, 1024, 1024}, false},
      {"int4 g128 o", WeightFormat::int4, 128, 8192, {8192, 0, 0}, false},
      {"int4 g32 up", WeightFormat::int4, 32, 8192, {28672, 0, 0}, false},
      {"int4 g32 bias up", WeightFormat::int4, 32, 8192, {28672, 0, 0}, true},
      {"int4 g128 8B down", WeightFormat::int4, 128, 14336, {4096, 0, 0}, false},
      {"int8 g128 head", WeightFormat::int8, 128, 8192, {128256, 0, 0}, false},
      {"f16 o", WeightFormat::f16, 0, 8192, {8192, 0, 0}, false},
  };
  Bench bench;
  const double ceiling = bench.read_ceiling();
  std::printf("%s, %d multiprocessors, memory read %.3f TB/s\n", properties.name, properties.multiProcessorCount,
              ceiling / 1e12);
  for (const Case& c : cases) {
    if (argc > 1 && std::strstr(c.name, argv[1]) == nullptr) continue;
    print_case(bench, c, argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : kMostRows, ceiling);
  }
  std::printf("memory read again %.3f TB/s\n", bench.read_ceiling() / 1e12);
  return 0;
}
