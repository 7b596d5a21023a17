// SPDX-License-Identifier: Apache-2.0
// Fuzzes the GGUF parser: whatever parses must keep the promises that import builds on.
//
// As a test: fuzz_gguf [RUNS [SEED]]. With libFuzzer: clang++ -DSLUICE_LIBFUZZER -fsanitize=fuzzer,address.
#include <cstdio>
#include <cstdlib>

#include "base/check.hpp"
#include "checkpoint_makers.hpp"
#include "import/gguf.hpp"
#include "import/gguf_tokenizer.hpp"

namespace {

using namespace sluice;
using namespace sluice::import;

// True if the bytes parse as GGUF.
bool parse_bytes(std::span<const uint8_t> file) {
  const auto gguf = Gguf::parse(std::as_bytes(file), "fuzz.gguf");
  if (!gguf) {
    SLUICE_CHECK(!gguf.error().message.empty());
    SLUICE_CHECK(gguf.error().code == ErrorCode::corrupt || gguf.error().code == ErrorCode::unsupported);
    return false;
  }
  for (const GgufTensor& tensor : gguf->tensors()) {
    SLUICE_CHECK(gguf->find(tensor.name) == &tensor);
    SLUICE_CHECK(!tensor.shape.empty());
    const auto type = source_type_of_ggml(tensor.ggml_type);
    if (!type) continue;
    uint64_t elems = 1;
    for (const uint64_t size : tensor.shape) SLUICE_CHECK(!__builtin_mul_overflow(elems, size, &elems));
    const uint64_t bytes = elems / block_elems(*type) * block_bytes(*type);
    SLUICE_CHECK(elems % block_elems(*type) == 0 && bytes > 0);
    SLUICE_CHECK(tensor.offset <= file.size() && bytes <= file.size() - tensor.offset);
  }
  // Every getter on every kind of key: a value or a typed error.
  for (const char* key : {"general.architecture", "llama.block_count", "llama.rope.freq_base", "tokenizer.ggml.tokens",
                          "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "llama.attention.head_count"}) {
    (void)gguf->unsigned_integer(key);
    (void)gguf->number(key);
    (void)gguf->boolean(key);
    (void)gguf->string(key);
    (void)gguf->strings(key);
    (void)gguf->floats(key);
    (void)gguf->integers(key);
  }
  const auto tokenizer = read_gguf_tokenizer(*gguf, 64, {});
  if (tokenizer) {
    SLUICE_CHECK(tokenizer->tokens.size() <= 64 && tokenizer->kinds.size() == tokenizer->tokens.size());
    SLUICE_CHECK(tokenizer->scores.empty() || tokenizer->scores.size() == tokenizer->tokens.size());
    for (const int32_t id : tokenizer->stop_ids) {
      SLUICE_CHECK(id >= 0 && static_cast<size_t>(id) < tokenizer->tokens.size());
    }
  }
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
  const uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 50'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("gguf fuzz: %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::vector<test::Bytes> inputs;
  for (const char* model : {"gpt2", "llama"}) {
    test::GgufMaker file = test::TinyGguf().file;
    file.key_text("tokenizer.ggml.model", model);
    file.key_texts("tokenizer.ggml.tokens", {"a", "b", "ab", "<s>"});
    file.key_texts("tokenizer.ggml.merges", {"a b"});
    file.key_u32("tokenizer.ggml.bos_token_id", 3);
    file.key_u32("tokenizer.ggml.eos_token_id", 3);
    inputs.push_back(file.bytes());
    SLUICE_CHECK(parse_bytes(inputs.back()));
  }
  test::Mutator mutator(seed);
  uint64_t parsed = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    // The header is what there is to break; of the weights any bytes are good.
    constexpr size_t kHeaderBytes = 2048;
    const test::Bytes& input = inputs[run % inputs.size()];
    std::vector<uint8_t> header(input.begin(), input.begin() + kHeaderBytes);
    mutator.mutate(header, 0);
    std::vector<uint8_t> file = header;
    if (mutator.below(8) != 0) file.insert(file.end(), input.begin() + kHeaderBytes, input.end());
    if (parse_bytes(file)) ++parsed;
  }
  std::printf("%llu of %llu mutations parsed, none broke a promise\n", static_cast<unsigned long long>(parsed),
              static_cast<unsigned long long>(runs));
  return 0;
}
#endif
