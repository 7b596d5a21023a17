// SPDX-License-Identifier: Apache-2.0
// Fuzzes the import of checkpoints that were published as INT4: a damaged folder is refused in a sentence and leaves no
// file, or gives a container that opens, verifies and has finite scales.
//
// As a test: fuzz_packed_import [RUNS [SEED]]. With libFuzzer: clang++ -DSLUICE_LIBFUZZER -fsanitize=fuzzer,address; an
// input is the length of config.json (u32), config.json and model.safetensors.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "base/check.hpp"
#include "base/half.hpp"
#include "checkpoint_makers.hpp"
#include "import/import.hpp"
#include "import/safetensors.hpp"
#include "storage/container.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;

void check_container(const std::string& path) {
  const auto container = storage::Container::open(path);
  SLUICE_CHECK(container);
  SLUICE_CHECK(container->verify({}));
  for (const storage::Tensor& tensor : container->manifest().tensors) {
    const storage::Plane* scales = tensor.plane(storage::PlaneKind::scales);
    if (scales == nullptr) continue;
    std::vector<uint16_t> halves(scales->bytes / 2);
    SLUICE_CHECK(read_exactly(container->fd(), std::as_writable_bytes(std::span(halves)), scales->offset, path));
    for (const uint16_t half : halves) SLUICE_CHECK(std::isfinite(float_from_half(half)));
  }
}

// True if the folder was imported.
bool import_bytes(std::span<const uint8_t> config, std::span<const uint8_t> weights) {
  static const test::TempFolder folder;
  test::save(folder.file("config.json"), config);
  test::save(folder.file("model.safetensors"), weights);
  import::Options options;
  options.source = folder.path();
  options.output = folder.file("out.sluice");
  options.weights = import::Weights::keep;
  const auto report = import::import_model(options);
  if (report) {
    check_container(options.output);
    std::filesystem::remove(options.output);
    return true;
  }
  SLUICE_CHECK(!report.error().message.empty() && report.error().code != ErrorCode::internal);
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    SLUICE_CHECK(entry.path().filename().string().find(".sluice") == std::string::npos);
  }
  return false;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint32_t config = 0;
  if (size < sizeof config) return 0;
  std::memcpy(&config, data, sizeof config);
  const std::span<const uint8_t> rest(data + sizeof config, size - sizeof config);
  if (config > rest.size()) return 0;
  import_bytes(rest.first(config), rest.subspan(config));
  return 0;
}

#ifndef SLUICE_LIBFUZZER
#include "fuzz/mutation.hpp"

namespace {

struct Input {
  test::Bytes config, weights;
  std::vector<size_t> config_digits, header_digits;
  std::vector<std::pair<size_t, size_t>> parts;  // begin, end of scales, zero points and group indices
};

std::vector<size_t> digits_of(const test::Bytes& bytes, size_t begin, size_t end) {
  std::vector<size_t> digits;
  for (size_t at = begin; at < end; ++at) {
    if (bytes[at] >= '0' && bytes[at] <= '9') digits.push_back(at);
  }
  return digits;
}

test::Bytes read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  test::Bytes bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  SLUICE_CHECK(!bytes.empty());
  return bytes;
}

Input read_input(const std::string& folder) {
  Input input;
  input.config = read_file(folder + "/config.json");
  input.weights = read_file(folder + "/model.safetensors");
  uint64_t header = 0;
  std::memcpy(&header, input.weights.data(), sizeof header);
  const std::string_view text(reinterpret_cast<const char*>(input.weights.data()) + 8, header);
  const auto index = import::parse_safetensors_header(text, input.weights.size(), folder);
  SLUICE_CHECK(index);
  for (const auto& [name, tensor] : *index) {
    const bool packed = name.find("qweight") != std::string::npos || name.find("weight_packed") != std::string::npos;
    const bool part = name.find("scale") != std::string::npos || name.find("qzeros") != std::string::npos ||
                      name.find("g_idx") != std::string::npos || name.find("weight_shape") != std::string::npos;
    if (part && !packed) input.parts.emplace_back(tensor.offset, tensor.offset + tensor.bytes);
  }
  SLUICE_CHECK(!input.parts.empty());
  const std::string config_text(input.config.begin(), input.config.end());
  input.config_digits = digits_of(input.config, config_text.find("quantization_config"), input.config.size());
  input.header_digits = digits_of(input.weights, 8, 8 + header);
  return input;
}

void change_digits(test::Bytes& bytes, const std::vector<size_t>& digits, test::Mutator& mutator) {
  for (uint64_t changes = 1 + mutator.below(2); changes > 0; --changes) {
    bytes[digits[mutator.below(digits.size())]] = static_cast<uint8_t>('0' + mutator.below(10));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 2'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("packed import fuzz: %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::vector<Input> inputs;
  for (const char* name : {"llama3-gptq", "llama3-gptq-actorder", "llama3-awq", "llama3-compressed-tensors"}) {
    inputs.push_back(read_input(std::string(std::getenv("SLUICE_GOLDEN")) + "/" + name));
    SLUICE_CHECK(import_bytes(inputs.back().config, inputs.back().weights));
  }
  test::Mutator mutator(seed);
  uint64_t imported = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    const Input& input = inputs[run % inputs.size()];
    test::Bytes config = input.config, weights = input.weights;
    switch (mutator.below(5)) {
      case 0:
        change_digits(config, input.config_digits, mutator);
        break;
      case 1:
        mutator.mutate(config, 0);
        break;
      case 2:
        change_digits(weights, input.header_digits, mutator);
        break;
      case 3: {  // numbers of one part of a matrix
        const auto [begin, end] = input.parts[mutator.below(input.parts.size())];
        test::Bytes part(weights.begin() + static_cast<ptrdiff_t>(begin),
                         weights.begin() + static_cast<ptrdiff_t>(end));
        const size_t size = part.size();
        mutator.mutate(part, 0);
        part.resize(size);
        std::copy(part.begin(), part.end(), weights.begin() + static_cast<ptrdiff_t>(begin));
        break;
      }
      default:
        mutator.mutate(weights, 0);
        break;
    }
    if (import_bytes(config, weights)) ++imported;
  }
  std::printf("%llu of %llu mutations were imported, none broke a promise\n", static_cast<unsigned long long>(imported),
              static_cast<unsigned long long>(runs));
  return 0;
}
#endif
