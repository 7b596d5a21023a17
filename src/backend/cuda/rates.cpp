// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/rates.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "backend/cuda/cuda_error.hpp"
#include "backend/cuda/device.hpp"
#include "base/handles.hpp"
#include "base/units.hpp"
#include "cuda/memory_read.hpp"

namespace sluice::backend::cuda {

namespace {

constexpr uint64_t kReadBytes = kGiB;           // many times any L2
constexpr uint64_t kHostBytes = 256 * kMiB;
constexpr uint64_t kSinkBytes = 4096;           // read_memory()'s
constexpr int kRounds = 5;                      // the best one counts: a ceiling is what is possible
constexpr uint64_t kChunks[] = {64 * kKiB, 256 * kKiB, kMiB, 4 * kMiB, 16 * kMiB};

// Everything that a measurement takes, given back with it.
class Bench {
 public:
  explicit Bench(const Device& device) : device_(device) {}
  ~Bench() {
    for (cudaEvent_t event : events_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    for (cudaStream_t stream : {copy_, compute_}) {
      if (stream != nullptr) cudaStreamDestroy(stream);
    }
    if (registered_) cudaHostUnregister(host_.data());
    if (memory_ != nullptr) cudaFree(memory_);
    cudaGetLastError();
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  Status open() {
    const uint64_t free = device_.free_bytes();
    read_bytes_ = std::min(kReadBytes, align_down(free / 4, kMiB));
    host_bytes_ = std::min(kHostBytes, align_down(free / 8, kMiB));
    if (read_bytes_ < 64 * kMiB || host_bytes_ < 32 * kMiB) {
      return fail(ErrorCode::out_of_memory, fmt::format("{}: {} of memory are free, too little to measure with",
                                                        device_.name, format_bytes(free)));
    }
    void* memory = nullptr;
    SLUICE_TRY(check(cudaMalloc(&memory, read_bytes_ + host_bytes_ + kSinkBytes), "allocating memory to measure with"));
    memory_ = static_cast<std::byte*>(memory);
    SLUICE_TRY(check(cudaMemset(memory_, 1, read_bytes_ + host_bytes_ + kSinkBytes), "filling memory"));
    SLUICE_TRY_ASSIGN(host, Mapping::anonymous(host_bytes_, "measuring the bus"));
    host_ = std::move(host);
    std::memset(host_.data(), 1, host_bytes_);
    SLUICE_TRY(check(cudaHostRegister(host_.data(), host_bytes_, cudaHostRegisterDefault), "pinning host memory"));
    registered_ = true;
    for (cudaStream_t* stream : {&copy_, &compute_}) {
      SLUICE_TRY(check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "creating a stream"));
    }
    for (cudaEvent_t& event : events_) SLUICE_TRY(check(cudaEventCreate(&event), "creating an event"));
    return {};
  }

  Status read(uint32_t repeats) {
    auto* sink = reinterpret_cast<uint32_t*>(memory_ + read_bytes_ + host_bytes_);
    for (uint32_t i = 0; i < repeats; ++i) {
      SLUICE_TRY(check(sluice::cuda::read_memory(memory_, read_bytes_, sink, compute_), "reading device memory"));
    }
    return {};
  }
  Status copy(uint64_t chunk_bytes) {
    for (uint64_t at = 0; at + chunk_bytes <= host_bytes_; at += chunk_bytes) {
      SLUICE_TRY(check(cudaMemcpyAsync(memory_ + read_bytes_ + at, host_.data() + at, chunk_bytes, cudaMemcpyHostToDevice,
                                       copy_), "copying"));
    }
    return {};
  }
  enum Mark { kCopyBegin, kCopyEnd, kReadBegin, kReadEnd, kMarks };
  Status mark(Mark mark) {
    return check(cudaEventRecord(events_[mark], mark <= kCopyEnd ? copy_ : compute_), "recording an event");
  }
  Result<double> seconds(Mark begin, Mark end) {
    SLUICE_TRY(check(cudaEventSynchronize(events_[end]), "waiting"));
    float ms = 0;
    SLUICE_TRY(check(cudaEventElapsedTime(&ms, events_[begin], events_[end]), "taking the time"));
    return static_cast<double>(ms) * 1e-3;
  }
  Result<double> read_rate() {
    double best = 0;
    for (int round = 0; round < kRounds; ++round) {
      SLUICE_TRY(mark(kReadBegin));
      SLUICE_TRY(read(1));
      SLUICE_TRY(mark(kReadEnd));
      SLUICE_TRY_ASSIGN(time, seconds(kReadBegin, kReadEnd));
      best = std::max(best, static_cast<double>(read_bytes_) / time);
    }
    return best;
  }
  Result<double> copy_rate(uint64_t chunk_bytes) {
    double best = 0;
    for (int round = 0; round < kRounds; ++round) {
      SLUICE_TRY(mark(kCopyBegin));
      SLUICE_TRY(copy(chunk_bytes));
      SLUICE_TRY(mark(kCopyEnd));
      SLUICE_TRY_ASSIGN(time, seconds(kCopyBegin, kCopyEnd));
      best = std::max(best, static_cast<double>(align_down(host_bytes_, chunk_bytes)) / time);
    }
    return best;
  }
  // Both at once, each kept busy for as long as the other: four rounds of copies, and the reads that fill their time.
  Status overlap(uint64_t chunk_bytes, Rates& rates) {
    const double copy_seconds = 4 * static_cast<double>(host_bytes_) / rates.bus();
    const auto repeats = static_cast<uint32_t>(copy_seconds * rates.read / static_cast<double>(read_bytes_)) + 1;
    SLUICE_TRY(mark(kReadBegin));
    SLUICE_TRY(read(repeats));
    SLUICE_TRY(mark(kReadEnd));
    SLUICE_TRY(mark(kCopyBegin));
    for (int round = 0; round < 4; ++round) SLUICE_TRY(copy(chunk_bytes));
    SLUICE_TRY(mark(kCopyEnd));
    SLUICE_TRY_ASSIGN(copying, seconds(kCopyBegin, kCopyEnd));
    SLUICE_TRY_ASSIGN(reading, seconds(kReadBegin, kReadEnd));
    rates.copy_beside_read = 4 * static_cast<double>(align_down(host_bytes_, chunk_bytes)) / copying;
    rates.read_beside_copy = static_cast<double>(read_bytes_) * repeats / reading;
    return {};
  }

 private:
  Status check(cudaError_t code, const char* what) const {
    if (code == cudaSuccess) return {};
    cudaGetLastError();
    return fail(error_of(code, fmt::format("{}: {}", device_.name, what)));
  }

  const Device& device_;
  uint64_t read_bytes_ = 0, host_bytes_ = 0;
  std::byte* memory_ = nullptr;       // what is read, what is copied to, the sink
  Mapping host_;
  bool registered_ = false;
  cudaStream_t copy_ = nullptr, compute_ = nullptr;
  cudaEvent_t events_[kMarks] = {};
};

}  // namespace

Result<Rates> measure_rates(int index, RateDetail detail) {
  SLUICE_TRY_ASSIGN(device, Device::open(index));
  Rates rates{.device = device.name, .major = device.major, .minor = device.minor, .driver = device.driver,
              .total_bytes = device.total_bytes, .free_bytes = device.free_bytes(), .copies = {}};
  Bench bench(device);
  SLUICE_TRY(bench.open());
  SLUICE_TRY_ASSIGN(read, bench.read_rate());
  rates.read = read;
  for (const uint64_t chunk : kChunks) {
    if (detail == RateDetail::bandwidths && chunk != std::end(kChunks)[-1]) continue;
    SLUICE_TRY_ASSIGN(rate, bench.copy_rate(chunk));
    rates.copies.push_back({.chunk_bytes = chunk, .rate = rate});
  }
  if (detail == RateDetail::all) SLUICE_TRY(bench.overlap(std::end(kChunks)[-1], rates));
  return rates;
}

}  // namespace sluice::backend::cuda
