// SPDX-License-Identifier: Apache-2.0
// RoPE and KV store, decode attention and prefill attention on a GPU against double. Exits with 77 where there is none.
// `[.timing]` (not run by default) prints what the kernels cost per layer of a 70B model.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/half.hpp"
#include "catch.hpp"
#include "cuda/attention.hpp"

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

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint32_t kBlock = kKvBlockPositions;

void check(cudaError_t error) {
  INFO(cudaGetErrorString(error));
  REQUIRE(error == cudaSuccess);
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(1, bytes())));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { put(values); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* get() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }
  void put(const std::vector<T>& values) { check(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice)); }
  void fill(int byte) { check(cudaMemset(data_, byte, bytes())); }
  std::vector<T> take() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

uint32_t printed_seed() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return seed;
}

std::vector<float> random_values(size_t count, float amplitude, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-amplitude, amplitude);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

struct Dims {
  uint32_t heads, kv_heads, head_dim;
};

struct Row {
  uint32_t session, position;
};

// A cache of two layers in shuffled blocks; everything is NaN but the positions given for layer 1.
struct Cache {
  Dims dims;
  uint32_t sessions, blocks_per_session;
  std::vector<uint32_t> table;
  std::vector<uint16_t> halves;
  KvCacheView view;

  Cache(Dims shape, uint32_t session_count, uint32_t context, std::mt19937& random)
      : dims(shape), sessions(session_count), blocks_per_session((context + kBlock - 1) / kBlock) {
    table.resize(size_t{sessions} * blocks_per_session);
    std::iota(table.begin(), table.end(), 0u);
    std::shuffle(table.begin(), table.end(), random);
    view = {
        .blocks_per_session = blocks_per_session, .layers = 2, .kv_heads = dims.kv_heads, .head_dim = dims.head_dim};
    halves.assign(table.size() * view.block_elems(), half_from_float(kNaN));
  }

  size_t at(uint32_t session, uint32_t position, uint32_t head, bool value) const {
    return table[session * blocks_per_session + position / kBlock] * view.block_elems() + view.head_offset(1, head) +
           (value ? view.head_elems() : 0) + size_t{position % kBlock} * dims.head_dim;
  }
  double read(uint32_t session, uint32_t position, uint32_t head, bool value, uint32_t dim) const {
    return float_from_half(halves[at(session, position, head, value) + dim]);
  }

  // Positions 0..count-1 of a session. V is a hundred times larger at both sides of every block border and at the last
  // position: one of those missed, or one too many, is far outside any tolerance.
  void fill(uint32_t session, uint32_t count, std::mt19937& random) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (uint32_t position = 0; position < count; ++position) {
      const bool planted = position % kBlock == 0 || position % kBlock == kBlock - 1 || position + 1 == count;
      for (uint32_t head = 0; head < dims.kv_heads; ++head) {
        uint16_t* k = halves.data() + at(session, position, head, false);
        uint16_t* v = halves.data() + at(session, position, head, true);
        for (uint32_t i = 0; i < dims.head_dim; ++i) {
          k[i] = half_from_float(uniform(random));
          v[i] = half_from_float(uniform(random) * (planted ? 100.0f : 1.0f));
        }
      }
    }
  }
};

// What a kernel may be off by, relative to sum(w |v|), which every error of a weight or of the sum scales with:
//   scores: q as 22 bits, and a sum of head_dim / 16 + 1 `mma` steps that each truncate at 2^-23 of what they hold,
//     S = sum |q k| / sqrt(head_dim) at most: 2 S (head_dim / 16 + 2) 2^-23 for a weight and the normaliser;
//   FP32 weights, sums over warps and splits: 2^-18;
//   prefill: half P, 2^-11 twice; and, relative to |v| alone, 2^-40 per position where P times 2^15 is subnormal.
struct Reference {
  std::vector<double> out, tolerance;
};

Reference reference(const Cache& cache, const std::vector<Row>& rows, const std::vector<float>& q, uint32_t q_stride,
                    bool prefill) {
  const Dims& dims = cache.dims;
  const uint32_t dim = dims.head_dim, group = dims.heads / dims.kv_heads;
  Reference result;
  std::vector<double> k, v, weights, sums(dim), magnitudes(dim), plain(dim);
  for (size_t r = 0; r < rows.size(); ++r) {
    const uint32_t count = rows[r].position + 1;
    for (uint32_t head = 0; head < dims.heads; ++head) {
      const float* query = q.data() + r * q_stride + size_t{head} * dim;
      if (head % group == 0) {
        k.resize(size_t{count} * dim);
        v.resize(size_t{count} * dim);
        for (size_t i = 0; i < k.size(); ++i) {
          const auto position = static_cast<uint32_t>(i / dim), d = static_cast<uint32_t>(i % dim);
          k[i] = cache.read(rows[r].session, position, head / group, false, d);
          v[i] = cache.read(rows[r].session, position, head / group, true, d);
        }
      }
      weights.assign(count, 0.0);
      double largest = -1e300, most = 0, total = 0;
      for (uint32_t p = 0; p < count; ++p) {
        double score = 0, absolute = 0;
        for (uint32_t i = 0; i < dim; ++i) {
          const double x = query[i] * k[size_t{p} * dim + i];
          score += x;
          absolute += std::abs(x);
        }
        weights[p] = score / std::sqrt(double(dim));
        largest = std::max(largest, weights[p]);
        most = std::max(most, absolute / std::sqrt(double(dim)));
      }
      for (double& weight : weights) total += weight = std::exp(weight - largest);
      std::fill(sums.begin(), sums.end(), 0.0);
      std::fill(magnitudes.begin(), magnitudes.end(), 0.0);
      std::fill(plain.begin(), plain.end(), 0.0);
      for (uint32_t p = 0; p < count; ++p) {
        for (uint32_t i = 0; i < dim; ++i) {
          const double x = v[size_t{p} * dim + i];
          sums[i] += weights[p] * x;
          magnitudes[i] += weights[p] * std::abs(x);
          plain[i] += std::abs(x);
        }
      }
      const double relative = 2 * most * (dim / 16 + 2) * 0x1p-23 + 0x1p-18 + (prefill ? 0x1p-10 : 0);
      for (uint32_t i = 0; i < dim; ++i) {
        result.out.push_back(sums[i] / total);
        result.tolerance.push_back(relative * magnitudes[i] / total + 0x1p-40 * plain[i] / total);
      }
    }
  }
  return result;
}

// One pass on the device: rows, queries in a wider buffer (as q in a fused qkv), poisoned outputs.
struct Pass {
  const Cache& cache;
  std::vector<Row> rows;
  uint32_t q_stride, x_stride;
  std::vector<float> q;
  std::vector<float> out;
  std::vector<uint16_t> out_x;

  Pass(const Cache& c, std::vector<Row> r, std::vector<float> queries)
      : cache(c), rows(std::move(r)), q_stride((c.dims.heads + 2 * c.dims.kv_heads) * c.dims.head_dim),
        x_stride((c.dims.heads * c.dims.head_dim + 63) / 64 * 64), q(std::move(queries)) {
    REQUIRE(q.size() == rows.size() * q_stride);
  }
  Pass(const Cache& c, std::vector<Row> r, float amplitude, std::mt19937& random)
      : Pass(c, r, random_values(r.size() * (c.dims.heads + 2 * c.dims.kv_heads) * c.dims.head_dim, amplitude,
                                 random)) {}

  uint32_t bound() const {
    uint32_t bound = 0;
    for (const Row& row : rows) bound = std::max(bound, row.position + 1);
    return bound;
  }
};

// Runs passes against one cache on the device.
class Runner {
 public:
  explicit Runner(const Cache& cache)
      : cache_(cache), halves_(cache.halves), table_(cache.table),
        workspace_(attention_workspace_bytes(cache.dims.heads, cache.dims.kv_heads, cache.dims.head_dim,
                                             cache.blocks_per_session * kBlock)) {
    workspace_.fill(0);
  }

  void run(Pass& pass, bool prefill, uint32_t bound) {
    const Dims& dims = cache_.dims;
    std::vector<uint32_t> sessions, positions;
    for (const Row& row : pass.rows) {
      sessions.push_back(row.session);
      positions.push_back(row.position);
    }
    const DeviceArray<uint32_t> device_sessions(sessions), device_positions(positions);
    const DeviceArray<float> q(pass.q);
    DeviceArray<float> out(pass.rows.size() * dims.heads * dims.head_dim);
    DeviceArray<uint16_t> out_x(pass.rows.size() * pass.x_stride);
    out.fill(0xff);
    out_x.fill(0xff);
    Attention args;
    args.q = q.get();
    args.q_stride = pass.q_stride;
    args.out_x = reinterpret_cast<__half*>(out_x.get());
    args.out = out.get();
    args.sessions = device_sessions.get();
    args.positions = device_positions.get();
    args.row_count = static_cast<uint32_t>(pass.rows.size());
    args.heads = dims.heads;
    args.position_bound = bound;
    args.cache = cache_.view;
    args.cache.memory = reinterpret_cast<__half*>(halves_.get());
    args.cache.table = table_.get();
    args.layer = 1;
    args.workspace = workspace_.get();
    args.workspace_bytes = workspace_.bytes();
    check(prefill ? launch_attention_prefill(args, nullptr) : launch_attention_decode(args, nullptr));
    check(cudaDeviceSynchronize());
    pass.out = out.take();
    pass.out_x = out_x.take();
  }

 private:
  const Cache& cache_;
  DeviceArray<uint16_t> halves_;
  DeviceArray<uint32_t> table_;
  DeviceArray<uint8_t> workspace_;
};

// The worst errors as shares of their tolerances. The X form may lose its own rounding on top.
struct Shares {
  double out = 0, out_x = 0;

  double worst() const { return std::max(out, out_x); }
  void add(const Shares& other) { *this = {std::max(out, other.out), std::max(out_x, other.out_x)}; }
};

Shares error_shares(const Pass& pass, bool prefill) {
  const Reference expected = reference(pass.cache, pass.rows, pass.q, pass.q_stride, prefill);
  const size_t width = size_t{pass.cache.dims.heads} * pass.cache.dims.head_dim;
  const auto share = [](double got, double exact, double tolerance) {
    const double error = std::abs(got - exact) / tolerance;
    return std::isnan(error) ? double(kInfinity) : error;
  };
  Shares shares;
  for (size_t i = 0; i < expected.out.size(); ++i) {
    const double exact = expected.out[i], tolerance = expected.tolerance[i];
    const double x = float_from_half(pass.out_x[i / width * pass.x_stride + i % width]);
    shares.add({share(double(pass.out[i]), exact, tolerance),
                share(x, exact, tolerance + std::abs(exact) * 0x1p-11 + 0x1p-25)});
  }
  for (size_t r = 0; r < pass.rows.size(); ++r) {
    for (size_t i = width; i < pass.x_stride; ++i) {
      if (pass.out_x[r * pass.x_stride + i] != 0) shares.out_x = double(kInfinity);
    }
  }
  return shares;
}

const std::vector<Dims> kShapes = {
    {1, 1, 32},  {9, 3, 64},  {3, 1, 80},   {8, 2, 96},   {4, 4, 128},  {6, 2, 128}, {16, 2, 128},
    {14, 2, 64}, {32, 2, 32}, {64, 8, 128}, {12, 1, 128}, {8, 2, 256}, {16, 1, 256}, {5, 5, 80},
};

std::string text(const Dims& dims) {
  return std::to_string(dims.heads) + " heads, " + std::to_string(dims.kv_heads) + " KV heads, " +
         std::to_string(dims.head_dim) + " dims";
}

const std::vector<Row> kDecodePositions = {{0, 0}, {1, 1}, {2, 63}, {3, 64}, {4, 65}, {5, 511}, {6, 4094}, {6, 4095}};

Cache decode_cache(const Dims& dims, std::mt19937& random) {
  Cache cache(dims, 7, 4160, random);
  uint32_t counts[7] = {};
  for (const Row& row : kDecodePositions) counts[row.session] = std::max(counts[row.session], row.position + 1);
  for (uint32_t session = 0; session < 7; ++session) cache.fill(session, counts[session], random);
  return cache;
}

}  // namespace

TEST_CASE("decode attention agrees with double over shapes and positions") {
  std::mt19937 random(printed_seed());
  for (const Dims& dims : kShapes) {
    DYNAMIC_SECTION(text(dims)) {
      const Cache cache = decode_cache(dims, random);
      Runner runner(cache);
      for (const float amplitude : {1.0f, 8.0f}) {
        Pass pass(cache, kDecodePositions, amplitude, random);
        runner.run(pass, false, pass.bound());
        const Shares shares = error_shares(pass, false);
        std::printf("decode  %-32s amplitude %.0f: %.3f, X %.3f of the tolerance\n", text(dims).c_str(),
                    double(amplitude), shares.out, shares.out_x);
        CHECK(shares.worst() <= 1.0);
      }
    }
  }
}

TEST_CASE("a row of decode attention has the same bits alone, in any company and under any bound") {
  std::mt19937 random(printed_seed());
  for (const Dims& dims : {Dims{64, 8, 128}, Dims{9, 3, 64}, Dims{16, 1, 80}}) {
    INFO(text(dims));
    const Cache cache = decode_cache(dims, random);
    Runner runner(cache);
    Pass all(cache, kDecodePositions, 4.0f, random);
    runner.run(all, false, 4160);
    const size_t width = size_t{dims.heads} * dims.head_dim;
    for (uint32_t first = 0; first < 8; ++first) {
      for (uint32_t count = 1; first + count <= 8; ++count) {
        Pass some(cache, {all.rows.begin() + first, all.rows.begin() + first + count},
                  {all.q.begin() + first * all.q_stride, all.q.begin() + (first + count) * all.q_stride});
        runner.run(some, false, some.bound());
        CHECK(std::memcmp(some.out.data(), all.out.data() + first * width, count * width * sizeof(float)) == 0);
        CHECK(std::memcmp(some.out_x.data(), all.out_x.data() + first * all.x_stride, count * all.x_stride * 2) == 0);
      }
    }
    // More rows than a launch takes: the eight three times over.
    std::vector<Row> rows;
    std::vector<float> q;
    for (int i = 0; i < 3; ++i) {
      rows.insert(rows.end(), all.rows.begin(), all.rows.end());
      q.insert(q.end(), all.q.begin(), all.q.end());
    }
    rows.resize(21);
    q.resize(21 * all.q_stride);
    Pass many(cache, rows, q);
    runner.run(many, false, 4160);
    for (size_t r = 0; r < 21; ++r) {
      CHECK(std::memcmp(many.out.data() + r * width, all.out.data() + r % 8 * width, width * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("attention repeats bit for bit") {
  std::mt19937 random(printed_seed());
  const Dims dims{64, 8, 128};
  const Cache cache = decode_cache(dims, random);
  Runner runner(cache);
  for (const bool prefill : {false, true}) {
    Pass first(cache, kDecodePositions, 4.0f, random);
    runner.run(first, prefill, first.bound());
    for (int i = 0; i < 50; ++i) {
      Pass again(cache, first.rows, first.q);
      runner.run(again, prefill, first.bound());
      REQUIRE(std::memcmp(again.out.data(), first.out.data(), first.out.size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("decode attention takes queries and keys that FP16 does not hold") {
  std::mt19937 random(printed_seed());
  for (const float amplitude : {1e-7f, 3e5f}) {
    Cache cache(Dims{8, 2, 128}, 1, 320, random);
    cache.fill(0, 300, random);
    if (amplitude > 1) {  // keys that bring the scores back to the order of one
      for (uint32_t p = 0; p < 300; ++p) {
        for (uint32_t head = 0; head < 2; ++head) {
          uint16_t* k = cache.halves.data() + cache.at(0, p, head, false);
          for (uint32_t i = 0; i < 128; ++i) k[i] = half_from_float(float_from_half(k[i]) * 1e-4f);
        }
      }
    } else {
      for (uint32_t p = 0; p < 300; ++p) {
        uint16_t* k = cache.halves.data() + cache.at(0, p, 0, false);
        for (uint32_t i = 0; i < 128; ++i) k[i] = half_from_float(float_from_half(k[i]) * 6e4f);
      }
    }
    Runner runner(cache);
    for (const bool prefill : {false, true}) {
      Pass pass(cache, {{0, 298}, {0, 299}}, amplitude, random);
      runner.run(pass, prefill, 300);
      CHECK(error_shares(pass, prefill).worst() <= 1.0);
    }
  }
}

TEST_CASE("prefill attention agrees with double over shapes, chunks and sessions") {
  std::mt19937 random(printed_seed());
  struct Run {
    uint32_t session, first, count;
  };
  const std::vector<std::vector<Run>> chunks = {
      {{0, 0, 9}},
      {{0, 0, 64}},
      {{1, 63, 65}},
      {{1, 100, 200}},
      {{2, 4040, 17}},
      {{0, 5, 30}, {1, 60, 70}, {0, 35, 3}, {2, 511, 1}, {1, 130, 40}},  // a session comes back in the same pass
      {{0, 64, 1}, {1, 63, 1}, {2, 0, 1}, {3, 300, 16}, {4, 10, 2}},
  };
  for (const Dims& dims : kShapes) {
    DYNAMIC_SECTION(text(dims)) {
      Shares shares;
      for (const auto& chunk : chunks) {
        Cache cache(dims, 5, 4160, random);
        uint32_t counts[5] = {};
        std::vector<Row> rows;
        for (const Run& run : chunk) {
          for (uint32_t i = 0; i < run.count; ++i) rows.push_back({run.session, run.first + i});
          counts[run.session] = std::max(counts[run.session], run.first + run.count);
        }
        for (uint32_t session = 0; session < 5; ++session) cache.fill(session, counts[session], random);
        Runner runner(cache);
        Pass pass(cache, rows, 4.0f, random);
        runner.run(pass, true, pass.bound());
        shares.add(error_shares(pass, true));
      }
      std::printf("prefill %-32s            : %.3f, X %.3f of the tolerance\n", text(dims).c_str(), shares.out,
                  shares.out_x);
      CHECK(shares.worst() <= 1.0);
    }
  }
}

TEST_CASE("shapes without a kernel are refused") {
  CHECK_FALSE(attention_supported(8, 8, 48));
  CHECK_FALSE(attention_supported(34, 2, 128));
  CHECK_FALSE(attention_supported(9, 2, 128));
  CHECK(attention_supported(32, 2, 128));
  Attention args;
  args.row_count = 1;
  args.heads = 8;
  args.position_bound = 1;
  args.cache = {.blocks_per_session = 1, .layers = 1, .kv_heads = 8, .head_dim = 48};
  CHECK(launch_attention_decode(args, nullptr) == cudaErrorInvalidValue);
  CHECK(launch_attention_prefill(args, nullptr) == cudaErrorInvalidValue);
  args.cache.head_dim = 128;
  CHECK(launch_attention_decode(args, nullptr) == cudaErrorInvalidValue);  // no workspace
}

TEST_CASE("RoPE with QK norm agrees with double, and the store touches its positions alone") {
  std::mt19937 random(printed_seed());
  struct Case {
    Dims dims;
    uint32_t pairs;
    bool norms;
  };
  for (const Case& c : {Case{{8, 2, 128}, 64, true}, Case{{3, 1, 80}, 40, false}, Case{{9, 3, 64}, 16, false},
                        Case{{4, 4, 32}, 16, true}, Case{{2, 1, 256}, 128, true}, Case{{6, 2, 96}, 0, false}}) {
    INFO(text(c.dims));
    const Dims& dims = c.dims;
    const uint32_t dim = dims.head_dim, stride = (dims.heads + 2 * dims.kv_heads) * dim;
    const std::vector<Row> rows = {{0, 0}, {1, 63}, {1, 64}, {2, 100}, {0, 1}};
    Cache cache(dims, 3, 128, random);
    std::vector<float> qkv = random_values(rows.size() * stride, 3.0f, random);
    float* v0 = qkv.data() + (dims.heads + dims.kv_heads) * dim;
    const float special[] = {70000.0f, -70000.0f, 65519.0f, kInfinity, -kInfinity, kNaN, 3e38f, 65504.0f};
    std::copy(std::begin(special), std::end(special), v0);
    const std::vector<float> norm = random_values(2 * dim, 2.0f, random);
    std::vector<float2> angles;
    std::vector<uint32_t> sessions, positions;
    for (const Row& row : rows) {
      sessions.push_back(row.session);
      positions.push_back(row.position);
      for (uint32_t i = 0; i < c.pairs; ++i) {
        const double angle = row.position * std::pow(1e4, -double(i) / c.pairs);
        angles.push_back({static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
      }
    }
    const DeviceArray<float> device_qkv(qkv), device_norm(norm);
    const DeviceArray<float2> device_angles(angles);
    const DeviceArray<uint32_t> device_sessions(sessions), device_positions(positions), table(cache.table);
    const DeviceArray<uint16_t> halves(cache.halves);
    HeadNormRopeStore args;
    args.q = device_qkv.get();
    args.k = device_qkv.get() + dims.heads * dim;
    args.v = device_qkv.get() + (dims.heads + dims.kv_heads) * dim;
    args.q_stride = args.k_stride = args.v_stride = stride;
    if (c.norms) {
      args.q_norm = device_norm.get();
      args.k_norm = device_norm.get() + dim;
    }
    args.eps = 1e-6f;
    args.angles = device_angles.get();
    args.pairs = c.pairs;
    args.sessions = device_sessions.get();
    args.positions = device_positions.get();
    args.row_count = static_cast<uint32_t>(rows.size());
    args.heads = dims.heads;
    args.cache = cache.view;
    args.cache.memory = reinterpret_cast<__half*>(halves.get());
    args.cache.table = table.get();
    args.layer = 1;
    check(launch_head_norm_rope_store(args, nullptr));
    check(cudaDeviceSynchronize());
    const std::vector<float> q_out = device_qkv.take();
    const std::vector<uint16_t> stored = halves.take();

    // Norm: a sum of 256 squares and a root, 2^-20; the turn: two roundings of two terms. FP16: half a unit more.
    std::vector<bool> written(stored.size(), false);
    for (size_t r = 0; r < rows.size(); ++r) {
      for (uint32_t head = 0; head < dims.heads + dims.kv_heads; ++head) {
        const float* in = qkv.data() + r * stride + head * dim;
        const bool is_q = head < dims.heads;
        std::vector<double> x(in, in + dim);
        if (c.norms) {
          double sum = 0;
          for (const double value : x) sum += value * value;
          for (uint32_t i = 0; i < dim; ++i) x[i] *= norm[(is_q ? 0 : dim) + i] / std::sqrt(sum / dim + double(1e-6f));
        }
        for (uint32_t i = 0; i < dim; ++i) {
          double expected = x[i], magnitude = std::abs(x[i]);
          if (i < 2 * c.pairs) {
            const bool first = i < c.pairs;
            const uint32_t pair = first ? i : i - c.pairs, other = first ? i + c.pairs : i - c.pairs;
            const float2 angle = angles[r * c.pairs + pair];
            expected = x[i] * angle.x + (first ? -1 : 1) * x[other] * angle.y;
            magnitude += std::abs(x[other]);
          }
          double got;
          if (is_q) {
            got = q_out[r * stride + head * dim + i];
          } else {
            const size_t at = cache.at(rows[r].session, rows[r].position, head - dims.heads, false) + i;
            got = float_from_half(stored[at]);
            written[at] = true;
          }
          REQUIRE(std::abs(got - expected) <=
                  magnitude * 0x1p-20 + (is_q ? 0.0 : std::abs(expected) * 0x1p-11 + 0x1p-25));
        }
      }
      for (uint32_t head = 0; head < dims.kv_heads; ++head) {
        const float* v = qkv.data() + r * stride + (dims.heads + dims.kv_heads + head) * dim;
        for (uint32_t i = 0; i < dim; ++i) {
          const size_t at = cache.at(rows[r].session, rows[r].position, head, true) + i;
          written[at] = true;
          const float expected = std::isfinite(v[i]) ? std::clamp(v[i], -65504.0f, 65504.0f) : v[i];
          if (std::isnan(expected)) REQUIRE(std::isnan(float_from_half(stored[at])));
          else REQUIRE(stored[at] == half_from_float(expected));
        }
      }
    }
    for (size_t i = 0; i < stored.size(); ++i) {
      if (!written[i]) REQUIRE(stored[i] == cache.halves[i]);
    }
    for (size_t i = 0; i < qkv.size(); ++i) {  // k and v are only read
      if (i % stride >= dims.heads * dim) REQUIRE(std::memcmp(&qkv[i], &q_out[i], sizeof(float)) == 0);
    }
  }
}

namespace {

// Median time of one replay of a graph of what `enqueue` enqueues.
double graph_us(const std::function<void(cudaStream_t)>& enqueue, int repeats) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(stream);
  check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t run;
  check(cudaGraphInstantiate(&run, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; ++i) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(run, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms * 1000);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(run);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return double(times[times.size() / 2]);
}

struct Timing {
  static constexpr uint32_t kLayers = 80, kContext = 32768, kRows = 2048;
  Dims dims{64, 8, 128};
  KvCacheView view{.blocks_per_session = kContext / kBlock, .layers = kLayers, .kv_heads = 8, .head_dim = 128};
  uint32_t stride = (64 + 16) * 128;
  std::vector<uint32_t> blocks;
  DeviceArray<uint16_t> halves{size_t{kContext / kBlock} * view.block_elems()};
  DeviceArray<uint32_t> table{kContext / kBlock}, sessions{kRows}, positions{kRows};
  DeviceArray<float> qkv{size_t{kRows} * stride};
  DeviceArray<float2> angles{size_t{kRows} * 64};
  DeviceArray<uint16_t> out_x{size_t{kRows} * 8192};
  DeviceArray<uint8_t> workspace{attention_workspace_bytes(64, 8, 128, kContext)};

  Timing() {
    std::mt19937 random(1);
    blocks.resize(kContext / kBlock);
    std::iota(blocks.begin(), blocks.end(), 0u);
    table.put(blocks);
    sessions.fill(0);
    angles.fill(0);
    workspace.fill(0);
    qkv.put(random_values(size_t{kRows} * stride, 2.0f, random));
    std::vector<uint16_t> piece(view.block_elems());
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (uint16_t& x : piece) x = half_from_float(uniform(random));
    for (size_t i = 0; i < blocks.size(); ++i) {
      check(cudaMemcpy(halves.get() + i * piece.size(), i == 0 ? piece.data() : halves.get(), piece.size() * 2,
                       i == 0 ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToDevice));
    }
    view.memory = reinterpret_cast<__half*>(halves.get());
    view.table = table.get();
  }

  void place(uint32_t first, uint32_t count) {
    std::vector<uint32_t> at(kRows, 0);
    std::iota(at.begin(), at.begin() + count, first);
    positions.put(at);
  }
  Attention attention(uint32_t rows, uint32_t bound, uint32_t layer, bool programmatic) const {
    Attention args;
    args.q = qkv.get();
    args.q_stride = stride;
    args.out_x = reinterpret_cast<__half*>(out_x.get());
    args.sessions = sessions.get();
    args.positions = positions.get();
    args.row_count = rows;
    args.heads = dims.heads;
    args.position_bound = bound;
    args.cache = view;
    args.layer = layer;
    args.workspace = workspace.get();
    args.workspace_bytes = workspace.bytes();
    args.programmatic = programmatic;
    return args;
  }
  HeadNormRopeStore store(uint32_t rows, uint32_t layer, bool programmatic) const {
    HeadNormRopeStore args;
    args.q = qkv.get();
    args.k = qkv.get() + 64 * 128;
    args.v = qkv.get() + 72 * 128;
    args.q_stride = args.k_stride = args.v_stride = stride;
    args.angles = angles.get();
    args.pairs = 64;
    args.sessions = sessions.get();
    args.positions = positions.get();
    args.row_count = rows;
    args.heads = dims.heads;
    args.cache = view;
    args.layer = layer;
    args.programmatic = programmatic;
    return args;
  }
};

}  // namespace

TEST_CASE("timing of attention, 64 heads, 8 KV heads of 128", "[.timing]") {
  Timing timing;
  const auto layers = [](const std::function<cudaError_t(cudaStream_t, uint32_t)>& body) {
    return [body](cudaStream_t stream) {
      for (uint32_t layer = 0; layer < Timing::kLayers; ++layer) check(body(stream, layer));
    };
  };
  std::printf("\nus per layer, graph replay of 80 layers; GB/s of K and V; `pdl`: programmatic dependent launch\n");
  std::printf("%8s %5s %10s %8s %16s %16s %12s\n", "context", "rows", "attention", "GB/s", "store+attention",
              "same, pdl", "bound 32768");
  for (const uint32_t context : {128u, 512u, 1024u, 2048u, 4096u, 8192u, 16384u, 32768u}) {
    for (const uint32_t rows : {1u, 8u}) {
      timing.place(context - rows, rows);
      const auto attend = [&](uint32_t bound) {
        return graph_us(layers([&](cudaStream_t stream, uint32_t layer) {
                          return launch_attention_decode(timing.attention(rows, bound, layer, false), stream);
                        }), 20) / Timing::kLayers;
      };
      const auto both = [&](bool programmatic) {
        return graph_us(layers([&](cudaStream_t stream, uint32_t layer) {
                          const cudaError_t error =
                              launch_head_norm_rope_store(timing.store(rows, layer, programmatic), stream);
                          if (error != cudaSuccess) return error;
                          return launch_attention_decode(timing.attention(rows, context, layer, programmatic), stream);
                        }), 20) / Timing::kLayers;
      };
      const double us = attend(context);
      std::printf("%8u %5u %10.2f %8.0f %16.2f %16.2f %12.2f\n", context, rows, us, context * 8 * 128 * 4 * 1e-3 / us,
                  both(false), both(true), attend(Timing::kContext));
    }
  }
  std::printf("\nprefill: us per layer; TFLOP/s of 4 head_dim a row, head and visible position\n");
  for (const auto& [first, rows] : {std::pair{0u, 512u}, {0u, 2048u}, {6144u, 2048u}, {30720u, 2048u}}) {
    timing.place(first, rows);
    const double us = graph_us([&, count = rows, from = first](cudaStream_t stream) {
      for (uint32_t layer = 0; layer < 8; ++layer) {
        check(launch_attention_prefill(timing.attention(count, from + count, layer, false), stream));
      }
    }, 10) / 8;
    const double visible = double(rows) * first + double(rows) * (rows + 1) / 2;
    const double store = graph_us([&, count = rows](cudaStream_t stream) {
      for (uint32_t layer = 0; layer < 8; ++layer) {
        check(launch_head_norm_rope_store(timing.store(count, layer, false), stream));
      }
    }, 10) / 8;
    std::printf("%u rows at %u: %.1f us, %.0f TFLOP/s; store %.1f us\n", rows, first, us,
                visible * 64 * 128 * 4 * 1e-6 / us, store);
  }
}
