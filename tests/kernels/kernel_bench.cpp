// SPDX-License-Identifier: Apache-2.0
// Times the matmul kernels with cold weights, next to what the memory of this machine delivers in the same run.
// Usage: kernel_bench [threads]. Rounds walk through copies of the weights larger than the caches; each figure is that of
// the fastest round (other processes only ever add time), and so is the ceiling, a plain read of the same memory by the
// same threads.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "backend/cpu/kernels.hpp"
#include "backend/cpu/thread_pool.hpp"
#include "base/handles.hpp"
#include "base/units.hpp"

namespace {

using namespace sluice;
using namespace sluice::backend::cpu;
using storage::Scheme;

constexpr uint64_t kColdBytes = 192 * kMiB;  // several times the last-level cache share of a thread
constexpr int kRounds = 9;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double fastest(const std::vector<double>& times) { return *std::min_element(times.begin(), times.end()); }

struct Case {
  const char* name;
  uint32_t n, k;
  Scheme scheme;
  uint32_t group;
  bool bias;
};

struct Bytes {
  uint64_t values, scales;
  uint64_t total(bool bias) const { return values + scales * (bias ? 2 : 1); }
};

Bytes bytes_of(const Case& c) {
  const uint64_t tiles = ceil_div(c.n, 16);
  if (c.group == 0) return {tiles * ceil_div(c.k, 16) * 512, 0};
  return {tiles * ceil_div(c.k, 64) * (c.scheme == Scheme::int4 ? 512 : 1024), tiles * ceil_div(c.k, c.group) * 32};
}

// Reads `bytes` with all threads; GB/s.
double read_rate(ThreadPool& pool, const std::byte* data, uint64_t bytes) {
  std::vector<double> times;
  std::vector<uint64_t> sums(pool.threads() * 16);
  for (int round = 0; round < kRounds; ++round) {
    const double start = now();
    pool.parallel_for(static_cast<uint32_t>(bytes / kMiB), 4, [&](uint32_t first, uint32_t last, uint32_t thread) {
      uint64_t sum[8] = {};
      const auto* words = reinterpret_cast<const uint64_t*>(data + first * kMiB);
      for (uint64_t i = 0; i < (last - first) * kMiB / 8; i += 8) {
        for (int lane = 0; lane < 8; ++lane) sum[lane] += words[i + static_cast<uint64_t>(lane)];
      }
      for (const uint64_t s : sum) sums[thread * 16] += s;
    });
    times.push_back(now() - start);
  }
  uint64_t total = 0;
  for (const uint64_t s : sums) total += s;
  if (total == 42) std::printf(" ");  // keeps the reads
  return static_cast<double>(bytes) / fastest(times) / 1e9;
}

struct Inputs {
  std::vector<float> x, out;
  std::vector<QuantizedBlock> blocks;
  std::vector<float> spread;
  Mapping accumulators;
};

void run_case(ThreadPool& pool, const Case& c, uint32_t rows, Mapping& memory, Inputs& in, double ceiling) {
  const Bytes bytes = bytes_of(c);
  const uint64_t copy_bytes = align_up(bytes.total(c.bias), 4096);
  const uint64_t copies = std::max<uint64_t>(1, memory.size() / copy_bytes);
  const uint32_t tiles = static_cast<uint32_t>(ceil_div(c.n, 16));
  const bool quantized = c.group != 0;
  if (quantized) {
    quantize_rows(in.x.data(), c.k, c.k, rows, 0, rows, in.blocks.data());
  } else {
    spread16_rows(in.x.data(), c.k, c.k, rows, 0, rows, in.spread.data());
  }
  std::vector<double> times;
  uint64_t copy = 0;
  const int rounds = static_cast<int>(std::clamp<uint64_t>(copies, 9, rows == 1 ? 400 : 25));
  for (int round = 0; round < rounds; ++round, copy = (copy + 1) % copies) {
    const auto* at = reinterpret_cast<const uint8_t*>(memory.data()) + copy * copy_bytes;
    Matrix m{.scheme = c.scheme, .rows = c.n, .cols = c.k, .group_elems = c.group, .values = at};
    if (quantized) m.scales = reinterpret_cast<const uint16_t*>(at + bytes.values);
    if (c.bias) m.bias = m.scales + bytes.scales / 2;
    const MatmulOut out{.out = in.out.data(), .stride = c.n, .vector = nullptr, .accumulate = false};
    const double start = now();
    pool.parallel_for(tiles, static_cast<uint32_t>(ceil_div(tiles, pool.threads() * 4)),
                      [&](uint32_t first, uint32_t last, uint32_t thread) {
      float* sums = reinterpret_cast<float*>(in.accumulators.data()) + thread * kAccumulatorFloats;
      if (!quantized) return matmul_f16_f32(m, in.spread.data(), rows, first, last, out);
      (c.scheme == Scheme::int4 ? matmul_int4_int8 : matmul_int8_int8)(m, in.blocks.data(), rows, first, last, out, sums);
    });
    times.push_back(now() - start);
  }
  const double seconds = fastest(times);
  const double rate = static_cast<double>(bytes.total(c.bias)) / seconds / 1e9;
  std::printf("%-26s %6u x %5u  rows %3u  %9.1f us  %6.1f GB/s (%3.0f%%)  %7.1f GOP/s\n", c.name, c.n, c.k, rows,
              seconds * 1e6, rate, 100 * rate / ceiling, 2.0 * c.n * c.k * rows / seconds / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t threads = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : physical_cores();
  auto pool = ThreadPool::create(threads);
  auto memory = Mapping::anonymous(kColdBytes, "weights");
  auto accumulators = Mapping::anonymous(threads * kAccumulatorFloats * sizeof(float), "accumulators");
  if (!pool || !memory || !accumulators) return 1;
  // Small FP16 numbers throughout, whatever a plane makes of them: no NaN slows anything down.
  std::mt19937 random(1);
  auto* words = reinterpret_cast<uint32_t*>(memory->data());
  for (uint64_t i = 0; i < memory->size() / 4; ++i) words[i] = (random() & 0x83ff83ffu) | 0x20002000u;

  const Case cases[] = {
      {"int4 bias g32 smollm2 qo", 576, 576, Scheme::int4, 32, true},
      {"int4 bias g32 smollm2 up", 1536, 576, Scheme::int4, 32, true},
      {"int4 bias g32 smollm2 down", 576, 1536, Scheme::int4, 32, true},
      {"int8 g32 smollm2 head", 49152, 576, Scheme::int8, 32, false},
      {"int4 bias g32 smollm2 head", 49152, 576, Scheme::int4, 32, true},
      {"int4 g32", 8192, 8192, Scheme::int4, 32, false},
      {"int4 g128 70B gate", 28672, 8192, Scheme::int4, 128, false},
      {"int8 g128", 8192, 8192, Scheme::int8, 128, false},
      {"f16 smollm2 up", 1536, 576, Scheme::f16, 0, false},
      {"f16", 4096, 4096, Scheme::f16, 0, false},
  };
  Inputs in;
  in.x.resize(size_t{8192} * kChunkRows);
  for (float& x : in.x) x = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-31f;
  in.blocks.resize(size_t{128} * kChunkRows);
  in.spread.resize(size_t{8192} * 2 * kChunkRows);
  in.out.resize(size_t{49152} * kChunkRows);
  in.accumulators = std::move(*accumulators);

  const double ceiling = read_rate(**pool, memory->data(), memory->size());
  std::printf("%u threads, %s, memory read %.1f GB/s\n", threads, simd_target(), ceiling);
  for (const uint32_t rows : {1u, 8u, 128u}) {
    for (const Case& c : cases) {
      run_case(**pool, c, c.group == 0 ? std::min(rows, kFloatChunkRows) : rows, *memory, in, ceiling);
    }
  }
  std::printf("memory read again %.1f GB/s\n", read_rate(**pool, memory->data(), memory->size()));
  return 0;
}
