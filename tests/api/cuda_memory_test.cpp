// SPDX-License-Identifier: Apache-2.0
// What Sluice takes of a GPU: memory, as the driver sees it, against the budget it was given; time, by its own clock,
// against the host's. Exits with 77 where there is no GPU.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>

#include "backend/cuda/device.hpp"
#include "backend/cuda/scratch.hpp"
#include "base/units.hpp"
#include "cuda/elementwise.hpp"
#include "cuda/matmul.hpp"
#include "golden_model.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;

uint64_t free_bytes() {
  size_t free = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
  return free;
}

void generate(const Model& model, uint32_t tokens) {
  Result<Session> session = model.new_session();
  REQUIRE(session);
  const std::vector<int32_t> prompt = {3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62};
  REQUIRE(session->append(prompt));
  REQUIRE(session->generate({.max_tokens = tokens, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
                            [](const Token&) { return true; }));
}

struct Fixture {
  Fixture() : path(folder.file("tiny.sluice")) {
    REQUIRE(on_gpu());  // the suite sets SLUICE_TEST_BACKEND
    TinyOptions options;
    options.hyper.layers = 4;
    options.hyper.hidden = 768;
    options.hyper.heads = 12;
    options.hyper.kv_heads = 4;
    options.hyper.head_dim = 64;
    options.hyper.ffn = 3072;
    options.hyper.vocab = 512;
    options.hyper.max_context = 4096;
    REQUIRE(write_tiny_container(path, options));
  }
  TempFolder folder;
  std::string path;
};

}  // namespace

TEST_CASE("a pass has room for the sums of every product, in every form of INT4 and at every number of rows") {
  // Hidden, heads, KV heads, size of a head, FFN: SmolLM2-135M, Llama 3 8B and 70B, Qwen2 7B.
  const uint32_t shapes[][5] = {
      {576, 9, 3, 64, 1536}, {4096, 32, 8, 128, 14336}, {8192, 64, 8, 128, 28672}, {3584, 28, 4, 128, 18944}};
  static const __half some_bias = {};
  for (const auto& [hidden, heads, kv_heads, head_dim, ffn] : shapes) {
    backend::Shape shape;
    shape.layers = 1;
    shape.hidden = hidden;
    shape.heads = heads;
    shape.kv_heads = kv_heads;
    shape.head_dim = head_dim;
    shape.ffn = ffn;
    shape.vocab = 1024;
    shape.rotary_dims = head_dim;
    shape.context = 1024;
    shape.max_rows = 512;
    shape.max_logit_rows = 64;
    const backend::cuda::ScratchLayout layout(shape);
    const uint32_t q = heads * head_dim, kv = kv_heads * head_dim;
    const std::pair<uint32_t, std::vector<uint32_t>> products[] = {
        {hidden, {q, kv, kv}}, {q, {hidden}}, {hidden, {ffn, ffn}}, {ffn, {hidden}}};
    for (const auto& [cols, outputs] : products) {
      for (const uint32_t group : {32u, 64u, 128u}) {
        for (uint32_t rows = 1; rows <= shape.max_rows; ++rows) {
          cuda::MatmulCall call;
          call.ldx = cuda::x_stride(cols);
          call.rows = rows;
          for (const uint32_t count : outputs) {
            call.part[call.parts].weight = {.format = cuda::WeightFormat::int4,
                                            .rows = count,
                                            .cols = cols,
                                            .group_elems = group,
                                            .bias = &some_bias};
            call.part[call.parts++].ldo = count;
          }
          CAPTURE(hidden, cols, group, rows);
          if (cuda::matmul_workspace_bytes(call) > layout.matmul_workspace_bytes) FAIL("too small");
        }
      }
    }
  }
}

TEST_CASE("everything that is taken of the GPU, context included, stays inside --device-memory") {
  const Fixture fixture;
  const Result<backend::cuda::Device> device = backend::cuda::Device::open(0);
  REQUIRE(device);
  const auto report = plan_model(fixture.path, under_test({.device_memory_bytes = uint64_t{1} << 40}), {});
  REQUIRE(report);
  for (const uint64_t budget : {report->smallest_device_bytes, report->smallest_device_bytes + 64 * kMiB}) {
    const uint64_t before = free_bytes();
    {
      const Model model = open_or_fail(fixture.path, {.device_memory_bytes = budget});
      generate(model, 20);
      const uint64_t after = free_bytes();
      // What the context took before the first backend was counted when that was opened.
      const uint64_t grown = before - std::min(before, after);
      std::printf("budget %s: context %s and room for its growth, %s taken since\n", format_bytes(budget).c_str(),
                  format_bytes(device->overhead_bytes).c_str(), format_bytes(grown).c_str());
      CHECK(device->context_bytes + grown <= budget);
    }
    // Given back with the model but for what the context keeps: kernels that are loaded now.
    CHECK(before - std::min(before, free_bytes()) <= device->overhead_bytes - device->context_bytes);
  }
}

TEST_CASE("memory that the GPU does not have is refused at open, with what to lower and to what") {
  const Fixture fixture;
  // KV caches of twice the memory there is.
  const Result<backend::cuda::Device> device = backend::cuda::Device::open(0);
  REQUIRE(device);
  const uint64_t session_bytes = uint64_t{4096} * 2 * 4 * 4 * 64 * sizeof(uint16_t);
  const auto sessions = static_cast<uint32_t>(2 * device->total_bytes / session_bytes);
  const auto refused = Model::open(fixture.path, under_test({.device_memory_bytes = uint64_t{1} << 42, .context = 4096,
                                                             .sessions = sessions}));
  REQUIRE(!refused);
  CHECK(refused.error().code == ErrorCode::out_of_memory);
  CHECK(refused.error().message.find("--device-memory") != std::string::npos);
  // And the device is as good as before.
  generate(open_or_fail(fixture.path, {.context = 128}), 4);
}

TEST_CASE("two models on one GPU run in turns") {
  const Fixture fixture;
  const Model first = open_or_fail(fixture.path, {.context = 128});
  const Model second = open_or_fail(fixture.path, {.context = 128});
  for (int i = 0; i < 3; ++i) {
    generate(first, 5);
    generate(second, 5);
  }
}

TEST_CASE("the stages of a pass are the GPU's own times and add up to what the host sees") {
  const Fixture fixture;
  constexpr uint64_t kAll = uint64_t{1} << 40;
  const auto report = plan_model(fixture.path, under_test({.device_memory_bytes = kAll, .max_rows = 8}), {});
  REQUIRE(report);
  struct Budget { const char* name; uint64_t device, host; };
  const uint64_t least = report->smallest_device_bytes;
  for (const Budget& budget : {Budget{"resident", kAll, 0}, Budget{"from host", least, report->resident_bytes},
                               Budget{"from disk", least, 0}}) {
    INFO(budget.name);
    const Model model = open_or_fail(fixture.path, {.device_memory_bytes = budget.device,
                                                    .host_memory_bytes = budget.host, .max_rows = 8});
    Result<Session> session = model.new_session();
    REQUIRE(session);
    REQUIRE(session->append(std::vector<int32_t>{3, 141, 59}));
    REQUIRE(session->generate({.max_tokens = 100, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
                              [](const Token&) { return true; }));
    const PassTimes& times = session->timings().decode;
    const double device = times.norm + times.matmul + times.rope + times.attention + times.activation;
    const double us = 1e6 / static_cast<double>(times.passes);
    std::printf("%s: of %.1f us a pass: norm %.1f, matmul %.1f, rope %.1f, attention %.1f, activation %.1f, lm_head "
                "and the end %.1f, waits %.1f, embedding %.1f\n", budget.name, us * times.total, us * times.norm,
                us * times.matmul, us * times.rope, us * times.attention, us * times.activation, us * times.lm_head,
                us * (times.disk_wait + times.copy_wait), us * times.embed);
    for (const double part : {times.norm, times.matmul, times.rope, times.attention, times.activation, times.lm_head}) {
      CHECK(part > 0);
    }
    CHECK(device < times.total);
    // What waits for the drive is a wait, whichever kernel comes behind it.
    if (budget.host == 0 && budget.device == least) CHECK(times.disk_wait > 0.5 * times.total);
    CHECK(std::abs(times.residual()) < 0.02 * times.total);
    CHECK((times.disk_wait + times.copy_wait > 0) == (budget.device == least));
    CHECK((times.disk_wait > 0) == (budget.device == least && budget.host == 0));
  }
}
