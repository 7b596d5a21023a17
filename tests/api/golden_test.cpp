// SPDX-License-Identifier: Apache-2.0
// Whole models against the answers of Hugging Face transformers (tests/golden).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "golden_model.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;

// F16 weights, FP32 activations: what is left is the FP16 KV cache and rounding. CUDA's activations are FP16 as well: 2^-11
// each, through about ten products.
bool has_f16_activations() { return backend_under_test() == "cuda"; }
double f16_error() { return has_f16_activations() ? 5e-3 : 2e-3; }
double log_probability_error() { return has_f16_activations() ? 2e-3 : 1e-3; }
// INT8 activations in groups of 32: half a step of max|x|/127 each, averaged over a dot product and through two layers.
constexpr double kInt8ActivationError = 4e-2;
// INT4 as published: the weights are exact, what is left is as above.
double published_int4_error() { return on_gpu() ? 6e-3 : 3e-3; }
// Below this margin between the two best logits a differing token is rounding.
constexpr float kTellingMargin = 0.02f;

double log_probability(std::span<const float> logits, int32_t token) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return logits[static_cast<size_t>(token)] - largest - std::log(sum);
}

std::span<const float> row(const std::vector<float>& logits, size_t index, size_t vocab) {
  return std::span(logits).subspan(index * vocab, vocab);
}

}  // namespace

TEST_CASE("F16 imports of the golden models give the reference's logits and log-probabilities") {
  const TempFolder folder;
  for (const std::string& name : kGoldenModels) {
    const std::string path = folder.file(name + ".sluice");
    import_golden(name, path, WeightFormat::f16);
    const Model model = open_or_fail(path, {.context = 512, .cpu_activations = Activations::f32});
    const Expected expected(name);
    const size_t vocab = model.info().vocab;
    for (size_t i = 0; i < expected.prompts.size(); ++i) {
      const std::string suffix = "." + std::to_string(i);
      const std::vector<int32_t> tokens = expected.array<int32_t>("tokens" + suffix);
      const std::vector<float> logits = score_all(model, tokens);
      const double last = relative_error(row(logits, tokens.size() - 1, vocab), expected.array<float>("logits_last" + suffix));
      double sum = 0;
      for (size_t k = 1; k < tokens.size(); ++k) sum += log_probability(row(logits, k - 1, vocab), tokens[k]);
      const double expected_sum = expected.prompts[i]["sum_logprob"];
      std::printf("%s prompt %zu: last logits off by %.2e, sum_logprob %.3f (reference %.3f)\n", name.c_str(), i, last, sum,
                  expected_sum);
      INFO(name << " prompt " << i);
      CHECK(last <= f16_error());
      CHECK(std::abs(sum - expected_sum) <= log_probability_error() * std::abs(expected_sum));
      if (expected.has("logits_all" + suffix)) {
        CHECK(relative_error(logits, expected.array<float>("logits_all" + suffix)) <= f16_error());
      }
    }
  }
}

TEST_CASE("checkpoints published as GPTQ, AWQ and compressed-tensors give the logits of their dequantized weights") {
  const TempFolder folder;
  for (const std::string& name : kGoldenInt4Models) {
    INFO(name);
    const std::string path = folder.file(name + ".sluice");
    import_golden(name, path, WeightFormat::keep);
    const ModelOptions options{.context = 512, .cpu_activations = Activations::f32};
    const Model model = open_or_fail(path, options);
    const Expected expected(name);
    const size_t vocab = model.info().vocab;
    for (size_t i = 0; i < expected.prompts.size(); ++i) {
      const std::string suffix = "." + std::to_string(i);
      const std::vector<int32_t> tokens = expected.array<int32_t>("tokens" + suffix);
      const std::vector<float> logits = score_all(model, tokens);
      const double last = relative_error(row(logits, tokens.size() - 1, vocab), expected.array<float>("logits_last" + suffix));
      std::printf("%s prompt %zu: last logits off by %.2e\n", name.c_str(), i, last);
      CHECK(last <= published_int4_error());
      if (expected.has("logits_all" + suffix)) {
        CHECK(relative_error(logits, expected.array<float>("logits_all" + suffix)) <= published_int4_error());
      }
    }
  }
}

TEST_CASE("matrices in one and the same act-order give the CPU's logits, resident and streamed") {
  const TempFolder folder;
  const std::filesystem::path source = folder.file("checkpoint");
  std::filesystem::copy(golden_folder("llama3-gptq-actorder"), source);
  std::string bytes = read_whole(source / "model.safetensors");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  const nlohmann::json header = nlohmann::json::parse(bytes.substr(8, header_bytes));
  const auto copy_order = [&](const std::string& from, const std::string& to) {
    const auto offset = [&](const std::string& stem, int end) {
      return 8 + header_bytes + header.at(stem + ".g_idx").at("data_offsets").at(end).get<uint64_t>();
    };
    bytes.replace(offset(to, 0), offset(to, 1) - offset(to, 0), bytes, offset(from, 0), offset(from, 1) - offset(from, 0));
  };
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    copy_order(layer + "self_attn.q_proj", layer + "self_attn.k_proj");
    copy_order(layer + "self_attn.q_proj", layer + "self_attn.v_proj");
  }
  copy_order("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj");
  std::ofstream(source / "model.safetensors", std::ios::binary) << bytes;

  const std::string path = folder.file("same.sluice");
  const Result<ImportReport> report = import_model({.source = source, .output = path, .weights = WeightFormat::keep});
  INFO((report ? std::string() : report.error().message));
  REQUIRE(report);
  const std::vector<int32_t> tokens = Expected("llama3-gptq-actorder").array<int32_t>("tokens.0");
  const std::vector<float> expected =
      score_all(open_or_fail(path, {.context = 512, .backend = "cpu", .cpu_activations = Activations::f32}), tokens);
  const ModelOptions options{.context = 512, .cpu_activations = Activations::f32};
  const std::vector<float> resident = score_all(open_or_fail(path, options), tokens);
  CHECK(relative_error(resident, expected) <= published_int4_error());
  ModelOptions streamed = under_test(options);
  streamed.device_memory_bytes = uint64_t{1} << 40;
  const Result<PlanReport> planned = plan_model(path, streamed, {});
  REQUIRE(planned);
  streamed.device_memory_bytes = planned->smallest_device_bytes;
  for (const uint64_t host_bytes : {uint64_t{0}, uint64_t{1} << 30}) {
    streamed.host_memory_bytes = host_bytes;
    CHECK(score_all(open_or_fail(path, streamed), tokens) == resident);
  }
}

TEST_CASE("fed the reference's greedy tokens, every argmax with a telling margin is the reference's") {
  const TempFolder folder;
  size_t steps = 0, wrong = 0;
  for (const std::string& name : kGoldenModels) {
    const std::string path = folder.file(name + ".sluice");
    import_golden(name, path, WeightFormat::f16);
    const Model model = open_or_fail(path, {.context = 512, .cpu_activations = Activations::f32});
    const Expected expected(name);
    const size_t vocab = model.info().vocab;
    for (size_t i = 0; i < expected.prompts.size(); ++i) {
      const std::string suffix = "." + std::to_string(i);
      std::vector<int32_t> tokens = expected.array<int32_t>("tokens" + suffix);
      const size_t prompt = tokens.size();
      const std::vector<int32_t> greedy = expected.array<int32_t>("greedy" + suffix);
      const std::vector<float> margin = expected.array<float>("margin" + suffix);
      REQUIRE(greedy.size() == margin.size());
      tokens.insert(tokens.end(), greedy.begin(), greedy.end() - 1);
      const std::vector<float> logits = score_all(model, tokens);
      for (size_t k = 0; k < greedy.size(); ++k) {
        if (margin[k] <= kTellingMargin) continue;
        const std::span<const float> step = row(logits, prompt - 1 + k, vocab);
        ++steps;
        const auto best = static_cast<int32_t>(std::max_element(step.begin(), step.end()) - step.begin());
        if (best == greedy[k]) continue;
        ++wrong;
        std::printf("%s prompt %zu step %zu: token %d, reference %d (margin %.4f)\n", name.c_str(), i, k, best, greedy[k],
                    static_cast<double>(margin[k]));
      }
    }
  }
  std::printf("%zu greedy steps checked, %zu wrong\n", steps, wrong);
  CHECK(steps > 300);
  CHECK(wrong == 0);
}

TEST_CASE("INT4 and INT8 imports give on a GPU what they give on the CPU with FP32 activations") {
  if (!on_gpu()) return;  // it would compare the CPU with itself
  const TempFolder folder;
  for (const std::string& name : kGoldenModels) {
    for (const WeightFormat format : {WeightFormat::int4, WeightFormat::int8}) {
      for (const uint32_t group : {32u, 64u, 128u}) {
        const std::string path = folder.file(name + ".sluice");
        import_golden(name, path, format, group);
        const Model gpu = open_or_fail(path, {.context = 512});
        const Model cpu = open_or_fail(path, {.context = 512, .backend = "cpu", .cpu_activations = Activations::f32});
        const std::vector<int32_t> tokens = Expected(name).array<int32_t>("tokens.0");
        const double error = relative_error(score_all(gpu, tokens), score_all(cpu, tokens));
        INFO(name << ", format " << static_cast<int>(format) << ", group " << group);
        CHECK(error <= f16_error());
        CHECK(error > 0);
      }
    }
  }
}

TEST_CASE("INT8 activations on INT4 imports stay within 4e-2 of FP32 activations") {
  if (on_gpu()) return;  // they are the CPU's
  const TempFolder folder;
  for (const std::string& name : kGoldenModels) {
    const std::string path = folder.file(name + ".sluice");
    import_golden(name, path, WeightFormat::int4, 32);
    const Model exact = open_or_fail(path, {.context = 512, .cpu_activations = Activations::f32});
    const Model rounded = open_or_fail(path, {.context = 512, .cpu_activations = Activations::int8});
    const Expected expected(name);
    for (size_t i = 0; i < expected.prompts.size(); ++i) {
      const std::vector<int32_t> tokens = expected.array<int32_t>("tokens." + std::to_string(i));
      const double error = relative_error(score_all(rounded, tokens), score_all(exact, tokens));
      std::printf("%s prompt %zu: INT8 activations off by %.2e\n", name.c_str(), i, error);
      INFO(name << " prompt " << i);
      CHECK(error <= kInt8ActivationError);
      CHECK(error > 0);
    }
  }
}
