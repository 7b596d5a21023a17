// SPDX-License-Identifier: Apache-2.0
// Fuzzes the safetensors header: tensors that come out lie in the file, apart, and have the size of their shape.
//
// As a test: fuzz_safetensors [RUNS [SEED]]. With libFuzzer: clang++ -DSLUICE_LIBFUZZER -fsanitize=fuzzer,address.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "base/check.hpp"
#include "checkpoint_makers.hpp"
#include "import/safetensors.hpp"

namespace {

using namespace sluice;
using namespace sluice::import;

// True if the bytes are a safetensors file.
bool parse_bytes(std::span<const uint8_t> file) {
  const auto bytes = std::as_bytes(file);
  const auto header = safetensors_header_bytes(bytes.first(std::min<size_t>(8, bytes.size())), bytes.size(), "fuzz.safetensors");
  if (!header) {
    SLUICE_CHECK(header.error().code == ErrorCode::corrupt);
    return false;
  }
  SLUICE_CHECK(*header <= file.size() - 8);
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, *header);
  const auto index = parse_safetensors_header(text, file.size(), "fuzz.safetensors");
  if (!index) {
    SLUICE_CHECK(index.error().code == ErrorCode::corrupt && !index.error().message.empty());
    return false;
  }
  std::vector<std::pair<uint64_t, uint64_t>> runs;
  for (const auto& [name, tensor] : *index) {
    SLUICE_CHECK(!name.empty());
    SLUICE_CHECK(tensor.offset >= 8 + *header && tensor.offset <= file.size());
    SLUICE_CHECK(tensor.bytes <= file.size() - tensor.offset);
    const uint64_t each = tensor.dtype == "F32" ? 4 : tensor.dtype == "F16" || tensor.dtype == "BF16" ? 2 : 0;
    uint64_t expected = each;
    for (const uint64_t size : tensor.shape) SLUICE_CHECK(each == 0 || !__builtin_mul_overflow(expected, size, &expected));
    SLUICE_CHECK(each == 0 || expected == tensor.bytes);
    if (tensor.bytes != 0) runs.emplace_back(tensor.offset, tensor.offset + tensor.bytes);
  }
  std::sort(runs.begin(), runs.end());
  for (size_t i = 1; i < runs.size(); ++i) SLUICE_CHECK(runs[i - 1].second <= runs[i].first);
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  parse_bytes({data, size});
  return 0;
}

#ifndef SLUICE_LIBFUZZER
#include "fuzz/mutation.hpp"

int main(int argc, char** argv) {
  const uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("safetensors fuzz: %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  test::SafetensorsMaker maker;
  maker.tensors["lm_head.weight"] = {"BF16", {4, 8}, test::Bytes(64)};
  maker.tensors["model.norm.weight"] = {"F32", {8}, test::Bytes(32)};
  maker.tensors["model.bias"] = {"F16", {8}, test::Bytes(16)};
  const test::Bytes input = maker.bytes();
  SLUICE_CHECK(parse_bytes(input));
  std::vector<size_t> digits;
  for (size_t at = 8; at < input.size(); ++at) {
    if (input[at] >= '0' && input[at] <= '9') digits.push_back(at);
  }
  test::Mutator mutator(seed);
  uint64_t parsed = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    std::vector<uint8_t> file = input;
    if (mutator.below(2) == 0) {
      mutator.mutate(file, 0);
    } else {
      // Digits for digits: JSON stays valid, and what it says does not.
      for (uint64_t changes = 1 + mutator.below(4); changes > 0; --changes) {
        file[digits[mutator.below(digits.size())]] = static_cast<uint8_t>('0' + mutator.below(10));
      }
    }
    if (parse_bytes(file)) ++parsed;
  }
  std::printf("%llu of %llu mutations parsed, none broke a promise\n", static_cast<unsigned long long>(parsed),
              static_cast<unsigned long long>(runs));
  return 0;
}
#endif
