// SPDX-License-Identifier: Apache-2.0
// Fuzzes tokenizer.json and its neighbours: what is read is consistent, and what a tokenizer is made of it works.
//
// As a test: fuzz_tokenizer_json [RUNS [SEED]]. With libFuzzer: clang++ -DSLUICE_LIBFUZZER -fsanitize=fuzzer,address.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.hpp"
#include "import/tokenizer_json.hpp"
#include "model/tokenizer.hpp"

namespace {

using namespace sluice;

// True if the texts are a tokenizer that can be made.
bool read_texts(const import::TokenizerTexts& texts) {
  const auto spec = import::parse_tokenizer_json(texts, "tokenizer.json");
  if (!spec) {
    SLUICE_CHECK(!spec.error().message.empty());
    SLUICE_CHECK(spec.error().code == ErrorCode::corrupt || spec.error().code == ErrorCode::unsupported);
    return false;
  }
  const size_t tokens = spec->tokens.size();
  SLUICE_CHECK(tokens > 0 && spec->kinds.size() == tokens);
  const auto in_range = [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < tokens; };
  for (const int32_t id : {spec->bos, spec->eos, spec->unknown}) SLUICE_CHECK(id == -1 || in_range(id));
  for (const auto* ids : {&spec->stop_ids, &spec->lstrip_ids, &spec->rstrip_ids}) {
    for (const int32_t id : *ids) SLUICE_CHECK(in_range(id));
  }
  const auto tokenizer = model::Tokenizer::create(*spec);
  if (!tokenizer) {
    SLUICE_CHECK(!tokenizer.error().message.empty());
    return false;
  }
  for (const int32_t id : tokenizer->encode("ab  a\xc3\xa9 <|end|> 12\n", {true, true})) SLUICE_CHECK(in_range(id));
  (void)tokenizer->decode(std::vector<int32_t>{0, 1, 2, 3, 1 << 30, -1});
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  read_texts({text, {}, {}, {}});
  const size_t half = size / 2;  // and as two files, each of which the other has to live with
  read_texts({text.substr(0, half), text.substr(half), text.substr(half), {}});
  return 0;
}

#ifndef SLUICE_LIBFUZZER
#include "fuzz/mutation.hpp"

namespace {

constexpr std::string_view kByteLevel = R"json({"added_tokens":[{"id":4,"content":"<|end|>","special":true,"lstrip":true}],
"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":
"\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)"},"behavior":"Isolated","invert":false},{"type":"Digits","individual_digits":true},
{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]},"post_processor":{"type":"TemplateProcessing","single":
[{"SpecialToken":{"id":"<|end|>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}]},"model":{"type":"BPE",
"ignore_merges":true,"vocab":{"a":0,"b":1,"ab":2,"\u0120":3},"merges":["a b"]}})json";
constexpr std::string_view kSentencePiece = R"({"added_tokens":[{"id":0,"content":"<unk>","special":true}],"normalizer":
{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"\u2581"},{"type":"Replace","pattern":{"String":" "},
"content":"\u2581"}]},"model":{"type":"BPE","unk_token":"<unk>","byte_fallback":true,"vocab":{"<unk>":0,"<0x0A>":1,
"\u2581":2,"a":3,"b":4,"ab":5},"merges":[["a","b"]]}})";
constexpr std::string_view kConfig = R"({"bos_token":{"content":"<|end|>"},"eos_token":"<|end|>","add_bos_token":true,
"chat_template":[{"name":"default","template":"{{ messages }}"}]})";
constexpr std::string_view kGeneration = R"({"eos_token_id":[4,2],"bos_token_id":4})";

std::vector<uint8_t> bytes_of(std::string_view text) { return {text.begin(), text.end()}; }
std::string_view text_of(const std::vector<uint8_t>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 50'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("tokenizer_json fuzz: %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  SLUICE_CHECK(read_texts({kByteLevel, kConfig, kGeneration, {}}));
  SLUICE_CHECK(read_texts({kSentencePiece, {}, {}, {}}));
  test::Mutator mutator(seed);
  uint64_t made = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    std::vector<uint8_t> tokenizer = bytes_of(run % 2 == 0 ? kByteLevel : kSentencePiece);
    std::vector<uint8_t> config = bytes_of(kConfig), generation = bytes_of(kGeneration);
    const uint64_t which = mutator.below(8);
    std::vector<uint8_t>& target = which == 0 ? config : which == 1 ? generation : tokenizer;
    if (mutator.below(2) == 0) {
      mutator.mutate(target, 0);
    } else {  // one character for another of JSON's or of a pattern's: valid more often than not
      constexpr std::string_view kAlphabet = "0123456789\"{}[]:,abtruefalsenul\\+*?()|";
      target[mutator.below(target.size())] = static_cast<uint8_t>(kAlphabet[mutator.below(kAlphabet.size())]);
    }
    const bool with_neighbours = run % 2 == 0;
    if (read_texts({text_of(tokenizer), with_neighbours ? text_of(config) : std::string_view(),
                    with_neighbours ? text_of(generation) : std::string_view(), {}})) {
      ++made;
    }
  }
  std::printf("%llu of %llu mutations made a tokenizer, none broke a promise\n", static_cast<unsigned long long>(made),
              static_cast<unsigned long long>(runs));
  return 0;
}
#endif
