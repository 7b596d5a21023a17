// SPDX-License-Identifier: Apache-2.0
// The golden models of tests/golden: checkpoints and the answers that a reference implementation gave for them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "backend/backend.hpp"
#include "catch.hpp"
#include "sluice/sluice.hpp"
#include "temp_folder.hpp"

namespace sluice::test {

inline const std::vector<std::string> kGoldenModels = {"llama3", "llama-tied", "mistral", "qwen2", "qwen3",
                                                       "qwen2-large-activations"};

// Published as INT4 by others; the expected values are those of their dequantized weights.
inline const std::vector<std::string> kGoldenInt4Models = {"llama3-gptq", "llama3-gptq-actorder", "llama3-awq",
                                                           "llama3-compressed-tensors"};

inline std::string golden_folder(const std::string& model) {
  const char* root = std::getenv("SLUICE_GOLDEN");
  REQUIRE(root != nullptr);
  return std::string(root) + "/" + model;
}

inline std::string read_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file.good());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// expected.safetensors: F32 and I32 arrays by name.
class Expected {
 public:
  explicit Expected(const std::string& model) : bytes_(read_whole(golden_folder(model) + "/expected.safetensors")) {
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes_.data(), 8);
    header_ = nlohmann::json::parse(bytes_.substr(8, header_bytes));
    data_ = 8 + header_bytes;
    prompts = nlohmann::json::parse(read_whole(golden_folder(model) + "/expected.json"));
  }
  bool has(const std::string& name) const { return header_.contains(name); }
  template <class T>
  std::vector<T> array(const std::string& name) const {
    const uint64_t begin = header_.at(name).at("data_offsets").at(0);
    const uint64_t end = header_.at(name).at("data_offsets").at(1);
    std::vector<T> values((end - begin) / sizeof(T));
    std::memcpy(values.data(), bytes_.data() + data_ + begin, end - begin);
    return values;
  }

  nlohmann::json prompts;   // per prompt: prompt_len, sum_logprob

 private:
  std::string bytes_;
  nlohmann::json header_;
  uint64_t data_ = 0;
};

inline void import_golden(const std::string& model, const std::string& output, WeightFormat weights, uint32_t group = 128) {
  ImportOptions options;
  options.source = golden_folder(model);
  options.output = output;
  options.weights = weights;
  options.group = group;
  const Result<ImportReport> report = import_model(options);
  INFO((report ? std::string() : report.error().message));
  REQUIRE(report);
}

// The backend that a test runs on: SLUICE_TEST_BACKEND, or the CPU. Where its device is not there, the test ends with
// Meson's "skipped".
inline const std::string& backend_under_test() {
  static const std::string name = [] {
    const char* chosen = std::getenv("SLUICE_TEST_BACKEND");
    const std::string backend = chosen == nullptr ? "cpu" : chosen;
    REQUIRE((backend == "cpu" || backend == "cuda" || backend == "vulkan"));
    if (backend == "cpu") return backend;
    const auto made = backend == "cuda" ? backend::make_cuda_backend({}) : backend::make_vulkan_backend({});
    if (!made && made.error().code == ErrorCode::not_found) {
      std::printf("skipped: %s\n", made.error().message.c_str());
      std::fflush(stdout);
      TempFolder::remove_all();
      std::_Exit(77);
    }
    return backend;
  }();
  return name;
}
inline ModelOptions under_test(ModelOptions options) {
  if (options.backend == "auto") options.backend = backend_under_test();
  return options;
}
inline bool on_gpu() { return backend_under_test() != "cpu"; }

inline Model open_or_fail(const std::string& path, ModelOptions options) {
  Result<Model> model = Model::open(path, under_test(std::move(options)));
  INFO((model ? std::string() : model.error().message));
  REQUIRE(model);
  return std::move(*model);
}

// Logits of every position, [tokens][vocab].
inline std::vector<float> score_all(const Model& model, std::span<const int32_t> tokens) {
  Result<Session> session = model.new_session();
  REQUIRE(session);
  REQUIRE(session->append(tokens));
  std::vector<float> logits;
  const Status status = session->score([&](uint32_t, std::span<const float> row) {
    logits.insert(logits.end(), row.begin(), row.end());
  });
  INFO((status ? std::string() : status.error().message));
  REQUIRE(status);
  REQUIRE(logits.size() == tokens.size() * model.info().vocab);
  return logits;
}

// ||a - b|| / ||b||
inline double relative_error(std::span<const float> a, std::span<const float> b) {
  REQUIRE(a.size() == b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / norm);
}

}  // namespace sluice::test
