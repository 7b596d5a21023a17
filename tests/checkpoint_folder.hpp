// SPDX-License-Identifier: Apache-2.0
// A Hugging Face folder in memory, made of a golden model, that tests bend before they write and import it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/half.hpp"
#include "checkpoint_makers.hpp"
#include "container_fixture.hpp"
#include "import/import.hpp"
#include "import/safetensors.hpp"
#include "storage/container.hpp"

namespace sluice::test {

inline std::string golden(const std::string& name) { return std::string(std::getenv("SLUICE_GOLDEN")) + "/" + name; }

// A checkpoint in memory that tests bend before they write it.
struct Folder {
  nlohmann::json config;
  SafetensorsMaker weights;
  TempFolder place;
  std::vector<std::string> warnings;

  explicit Folder(const std::string& name = "llama3") {
    const auto text = read_all(golden(name) + "/config.json");
    const auto* begin = reinterpret_cast<const char*>(text.data());
    config = nlohmann::json::parse(begin, begin + text.size());
    const std::string path = golden(name) + "/model.safetensors";
    auto fd = open_file(path, O_RDONLY);
    REQUIRE(fd);
    const auto index = import::read_safetensors_header(*fd, path);
    REQUIRE(index);
    for (const auto& [tensor_name, tensor] : *index) {
      Bytes data(tensor.bytes);
      REQUIRE(read_exactly(fd->get(), std::as_writable_bytes(std::span(data)), tensor.offset, path));
      weights.tensors[tensor_name] = {tensor.dtype, tensor.shape, std::move(data)};
    }
  }

  void write(const std::string& name, const std::string& text) const {
    save(place.file(name), std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
  }

  // Writes config.json and one model.safetensors, unless the test wrote weights of its own.
  Result<import::Report> run(import::Weights how = import::Weights::keep, bool single_file = true) {
    write("config.json", config.dump());
    if (single_file) save(place.file("model.safetensors"), weights.bytes());
    return run_as_it_is(how);
  }

  Result<import::Report> run_as_it_is(import::Weights how = import::Weights::keep) {
    import::Options options;
    options.source = place.path();
    options.output = place.file("out.sluice");
    options.weights = how;
    options.log = [this](LogLevel level, std::string_view line) {
      if (level == LogLevel::warning) warnings.emplace_back(line);
    };
    return import::import_model(options);
  }

  storage::Container container() const {
    auto opened = storage::Container::open(place.file("out.sluice"));
    REQUIRE(opened);
    return std::move(*opened);
  }

  // BF16, F16 and F32 as float.
  std::vector<float> values(const std::string& name) const {
    const auto& tensor = weights.tensors.at(name);
    std::vector<float> out;
    const size_t each = tensor.dtype == "F32" ? 4 : 2;
    for (size_t at = 0; at < tensor.data.size(); at += each) {
      uint32_t bits = 0;
      std::memcpy(&bits, tensor.data.data() + at, each);
      out.push_back(tensor.dtype == "F32"    ? std::bit_cast<float>(bits)
                    : tensor.dtype == "BF16" ? float_from_bf16(static_cast<uint16_t>(bits))
                                             : float_from_half(static_cast<uint16_t>(bits)));
    }
    return out;
  }

  size_t warnings_with(std::string_view text) const {
    return static_cast<size_t>(std::count_if(warnings.begin(), warnings.end(), [&](const std::string& line) {
      return line.find(text) != std::string::npos;
    }));
  }
};

// Refused with this code and these words, and no output, whole or partial, is left.
inline void refuses(Folder& folder, const Result<import::Report>& report, ErrorCode code,
                    std::initializer_list<std::string> words) {
  REQUIRE_FALSE(report);
  INFO(report.error().message);
  CHECK(report.error().code == code);
  for (const std::string& word : words) CHECK(mentions(report.error(), word));
  for (const auto& entry : std::filesystem::directory_iterator(folder.place.path())) {
    CHECK(entry.path().filename().string().find(".sluice") == std::string::npos);
  }
}

}  // namespace sluice::test
