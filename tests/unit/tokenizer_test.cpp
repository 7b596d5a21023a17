// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

#include "catch.hpp"
#include "import/tokenizer_json.hpp"
#include "model/pre_tokenizer.hpp"
#include "model/tokenizer.hpp"
#include "model/utf8.hpp"

namespace {

using sluice::ErrorCode;
using sluice::import::parse_tokenizer_json;
using sluice::model::StreamDecoder;
using sluice::model::Tokenizer;
using sluice::storage::TokenizerSpec;
using sluice::storage::TokenKind;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// zlib is not a dependency; the tool is on every system that has these files.
std::string read_gzip(const std::filesystem::path& path) {
  std::string text;
  FILE* pipe = popen(("gzip -dc '" + path.string() + "'").c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[65536];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) text.append(buffer, n);
  pclose(pipe);
  return text;
}

Tokenizer must_create(const TokenizerSpec& spec) {
  auto tokenizer = Tokenizer::create(spec);
  INFO((tokenizer ? "" : tokenizer.error().message));
  REQUIRE(tokenizer.has_value());
  return std::move(*tokenizer);
}

TokenizerSpec must_parse(std::string_view text) {
  auto spec = parse_tokenizer_json(text);
  INFO((spec ? "" : spec.error().message));
  REQUIRE(spec.has_value());
  return std::move(*spec);
}

// Every case of a cases.jsonl: ids of the text, text of the ids, and the same token by token. Returns how many.
int check_cases(const Tokenizer& tokenizer, const std::filesystem::path& cases) {
  std::ifstream file(cases);
  int count = 0;
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line);
    const auto text = json["text"].get<std::string>();
    const auto ids = json["ids"].get<std::vector<int32_t>>();
    const auto decoded = json["decoded"].get<std::string>();
    CAPTURE(cases.string(), count, text);
    REQUIRE(tokenizer.encode(text) == ids);
    REQUIRE(tokenizer.decode(ids) == decoded);
    StreamDecoder decoder(tokenizer, false);
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string part = decoder.push(id);
      std::string unused;
      REQUIRE(sluice::model::valid_utf8(part, unused) == part);
      REQUIRE(unused.empty());
      streamed += part;
    }
    REQUIRE(streamed + decoder.finish() == decoded);
    ++count;
  }
  return count;
}

// The 256 bytes and a few merges: "Hello" in byte-level spelling, ids 0..255 by byte.
TokenizerSpec byte_level_spec() {
  TokenizerSpec spec;
  spec.model = sluice::storage::TokenizerModel::byte_level_bpe;
  for (int byte = 0; byte < 256; ++byte) {
    std::string text;
    sluice::model::append_utf8(text, sluice::model::byte_alphabet_char(static_cast<uint8_t>(byte)));
    spec.tokens.push_back(text);
  }
  const auto add = [&](const std::string& left, const std::string& right) {
    spec.tokens.push_back(left + right);
    spec.merges.push_back(left + " " + right);
  };
  add("l", "l");      // 256
  add("H", "e");      // 257
  add("ll", "o");     // 258
  add("He", "llo");   // 259
  add("a", "a");      // 260
  add("aa", "aa");    // 261
  spec.kinds.assign(spec.tokens.size(), TokenKind::normal);
  return spec;
}

int32_t add_token(TokenizerSpec& spec, const std::string& text, TokenKind kind) {
  spec.tokens.push_back(text);
  spec.kinds.push_back(kind);
  if (!spec.scores.empty()) spec.scores.push_back(0);
  return static_cast<int32_t>(spec.tokens.size() - 1);
}

// A SentencePiece vocabulary with scores, as a GGUF brings it: <unk>, <s>, </s>, the byte tokens from 3, then pieces.
TokenizerSpec sentencepiece_spec() {
  TokenizerSpec spec;
  spec.model = sluice::storage::TokenizerModel::sentencepiece_bpe;
  spec.tokens = {"<unk>", "<s>", "</s>"};
  spec.kinds = {TokenKind::unknown, TokenKind::special, TokenKind::special};
  char name[8];
  for (int byte = 0; byte < 256; ++byte) {
    std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
    spec.tokens.push_back(name);
    spec.kinds.push_back(TokenKind::byte);
  }
  spec.scores.assign(spec.tokens.size(), 0.0f);
  float score = -1;
  for (const char* piece : {"▁t", "he", "▁the", "in", "er", "▁", "e", "t", "h", "i", "n", "r", "a"}) {  // 259...
    spec.tokens.push_back(piece);
    spec.kinds.push_back(TokenKind::normal);
    spec.scores.push_back(score--);
  }
  spec.byte_fallback = true;
  spec.add_prefix_space = true;
  spec.unknown = 0;
  spec.bos = 1;
  spec.eos = 2;
  spec.add_bos = true;
  return spec;
}

std::vector<int32_t> ids_of(const TokenizerSpec& spec, const std::vector<std::string>& tokens) {
  std::vector<int32_t> ids;
  for (const std::string& token : tokens) {
    const auto it = std::find(spec.tokens.begin(), spec.tokens.end(), token);
    REQUIRE(it != spec.tokens.end());
    ids.push_back(static_cast<int32_t>(it - spec.tokens.begin()));
  }
  return ids;
}

}  // namespace

TEST_CASE("the small reference tokenizers encode and decode every case exactly") {
  const std::filesystem::path golden = environment("SLUICE_GOLDEN");
  for (const char* name : {"tok-llama3", "tok-qwen2", "tok-deepseek", "tok-smollm"}) {
    const Tokenizer tokenizer = must_create(must_parse(read_file(golden / name / "tokenizer.json")));
    const int cases = check_cases(tokenizer, golden / name / "cases.jsonl");
    std::printf("%s: %d cases exact\n", name, cases);
    CHECK(cases == 241);
  }
}

TEST_CASE("the full-size tokenizers encode and decode every case exactly") {
  const std::filesystem::path folder = std::filesystem::path(environment("SLUICE_SHARED")) / "tokenizers";
  if (!std::filesystem::exists(folder)) {
    std::printf("full-size tokenizers: %s is absent, nothing checked\n", folder.c_str());
    return;
  }
  for (const char* name : {"llama3_1", "qwen3", "deepseek_v3"}) {
    const std::string json = read_gzip(folder / name / "tokenizer.json.gz");
    const std::string config = read_file(folder / name / "tokenizer_config.json");
    const auto start = std::chrono::steady_clock::now();
    auto spec = parse_tokenizer_json({json, config, {}, {}}, name);
    INFO((spec ? "" : spec.error().message));
    REQUIRE(spec.has_value());
    const auto parsed = std::chrono::steady_clock::now();
    const Tokenizer tokenizer = must_create(*spec);
    const auto created = std::chrono::steady_clock::now();
    const int cases = check_cases(tokenizer, folder / name / "cases.jsonl");
    using Milliseconds = std::chrono::duration<double, std::milli>;
    std::printf("%s: %d cases exact; parsed in %.0f ms, created in %.0f ms\n", name, cases,
                Milliseconds(parsed - start).count(), Milliseconds(created - parsed).count());
    CHECK(cases == 301);
    CHECK_FALSE(spec->chat_template.empty());
    CHECK(spec->eos >= 0);
    CHECK(std::find(spec->stop_ids.begin(), spec->stop_ids.end(), spec->eos) != spec->stop_ids.end());
    CHECK(spec->add_bos == (std::string_view(name) != "qwen3"));
  }
}

TEST_CASE("merging takes the lowest rank first and the leftmost of equals, by walk and by heap alike") {
  const TokenizerSpec spec = byte_level_spec();
  const Tokenizer tokenizer = must_create(spec);
  CHECK(tokenizer.encode("Hello") == std::vector<int32_t>{259});
  CHECK(tokenizer.encode("lll") == std::vector<int32_t>{256, 'l'});
  CHECK(tokenizer.encode("aaaaaaa") == std::vector<int32_t>{261, 260, 'a'});
  // 24 symbols are walked, more use the heap.
  for (size_t n : {23u, 24u, 25u, 26u, 27u, 1000u, 1003u}) {
    std::vector<int32_t> expected(n / 4, 261);
    if (n % 4 >= 2) expected.push_back(260);
    if (n % 2 == 1) expected.push_back('a');
    CHECK(tokenizer.encode(std::string(n, 'a')) == expected);
  }
}

TEST_CASE("special tokens are found longest first, and only where asked for") {
  TokenizerSpec spec = byte_level_spec();
  const int32_t shorter = add_token(spec, "<|x|>", TokenKind::special);
  const int32_t longer = add_token(spec, "<|x|>>", TokenKind::special);
  const int32_t added = add_token(spec, "<a>", TokenKind::added);
  const Tokenizer tokenizer = must_create(spec);
  CHECK(tokenizer.encode("<|x|>><|x|>a") == std::vector<int32_t>{longer, shorter, 'a'});
  CHECK(tokenizer.encode("<a><|x|>", {.special = false}) ==
        std::vector<int32_t>{added, '<', '|', 'x', '|', '>'});
  CHECK(tokenizer.is_special(shorter));
  CHECK_FALSE(tokenizer.is_special(added));
  CHECK(tokenizer.decode(std::vector<int32_t>{'a', shorter, added}) == "a<|x|><a>");
  CHECK(tokenizer.decode(std::vector<int32_t>{'a', shorter, added}, true) == "a<a>");
}

TEST_CASE("added tokens swallow white space on the sides they ask for") {
  TokenizerSpec spec = byte_level_spec();
  const int32_t mask = add_token(spec, "<mask>", TokenKind::special);
  spec.lstrip_ids = {mask};
  spec.rstrip_ids = {mask};
  const Tokenizer tokenizer = must_create(spec);
  CHECK(tokenizer.encode("a \xe3\x80\x80<mask> \n b") == std::vector<int32_t>{'a', mask, 'b'});
  CHECK(tokenizer.encode("<mask>  <mask>") == std::vector<int32_t>{mask, mask});
}

TEST_CASE("bos and eos are added when asked for") {
  TokenizerSpec spec = byte_level_spec();
  spec.bos = 1;
  spec.eos = 2;
  spec.add_bos = spec.add_eos = true;
  const Tokenizer tokenizer = must_create(spec);
  CHECK(tokenizer.encode("x") == std::vector<int32_t>{'x'});
  CHECK(tokenizer.encode("x", {.bos_eos = true}) == std::vector<int32_t>{1, 'x', 2});
}

TEST_CASE("malformed UTF-8 counts as the replacement character") {
  const Tokenizer tokenizer = must_create(byte_level_spec());
  const std::vector<int32_t> mark = {0xef, 0xbf, 0xbd};
  CHECK(tokenizer.encode("\xff") == mark);
  CHECK(tokenizer.encode("\xe4\xbd") == mark);
  CHECK(tokenizer.encode("\xed\xa0\x80").size() == 9);  // a surrogate: three marks, as Python counts
  CHECK(tokenizer.encode("a\xf0\x9f\x98z") == std::vector<int32_t>{'a', 0xef, 0xbf, 0xbd, 'z'});
  CHECK(tokenizer.encode(std::string("\0", 1)) == std::vector<int32_t>{0});
}

TEST_CASE("a character split over tokens is handed out once it is whole") {
  const Tokenizer tokenizer = must_create(byte_level_spec());
  StreamDecoder decoder(tokenizer);
  CHECK(decoder.push('a') == "a");
  CHECK(decoder.push(0xf0) == "");
  CHECK(decoder.push(0x9f) == "");
  CHECK(decoder.push(0x98) == "");
  CHECK(decoder.push(0x80) == "\xf0\x9f\x98\x80");
  CHECK(decoder.push(0xe4) == "");
  CHECK(decoder.push('b') == "\xef\xbf\xbd" "b");  // the unfinished one can no longer finish
  CHECK(decoder.push(0xe4) == "");
  CHECK(decoder.push(0xbd) == "");
  CHECK(decoder.finish() == "\xef\xbf\xbd");
  CHECK(decoder.finish() == "");
  CHECK(decoder.push(-1) == "");
  CHECK(decoder.push(1 << 30) == "");
}

TEST_CASE("a SentencePiece vocabulary with scores merges by score and falls back to bytes") {
  const TokenizerSpec spec = sentencepiece_spec();
  const Tokenizer tokenizer = must_create(spec);
  CHECK(tokenizer.encode("the in", {.bos_eos = true}) == ids_of(spec, {"<s>", "▁the", "▁", "in"}));
  CHECK(tokenizer.encode("é") == ids_of(spec, {"▁", "<0xC3>", "<0xA9>"}));
  CHECK(tokenizer.encode("a\n") == ids_of(spec, {"▁", "a", "<0x0A>"}));
  CHECK(tokenizer.decode(ids_of(spec, {"▁the", "▁", "in"})) == "the in");
  CHECK(tokenizer.decode(ids_of(spec, {"<s>", "▁the", "<0xC3>", "<0xA9>"}), true) == "theé");
  CHECK(tokenizer.decode(ids_of(spec, {"<0xE4>", "<0xBD>"})) == "\xef\xbf\xbd\xef\xbf\xbd");
  CHECK(tokenizer.encode("<s>", {.special = false}).front() != 1);
}

TEST_CASE("a SentencePiece tokenizer.json puts its space where its scheme says") {
  const auto json = [](const std::string& normalizer, const std::string& pre_tokenizer) {
    return R"({"model":{"type":"BPE","byte_fallback":true,"unk_token":"<unk>","fuse_unk":true,
      "vocab":{"<unk>":0,"▁":1,"a":2,"b":3,"▁a":4,"<x>":5,"▁▁":6},"merges":["▁ ▁","▁ a"]},
      "added_tokens":[{"id":5,"content":"<x>","special":true}],)"
      R"("normalizer":)" + normalizer + R"(,"pre_tokenizer":)" + pre_tokenizer + "}";
  };
  const std::string prepend = R"({"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},
      {"type":"Replace","pattern":{"String":" "},"content":"▁"}]})";
  const auto metaspace = [](const std::string& scheme) {
    return R"({"type":"Metaspace","replacement":"▁","prepend_scheme":")" + scheme + R"(","split":false})";
  };
  const Tokenizer llama2 = must_create(must_parse(json(prepend, "null")));
  CHECK(llama2.encode("a<x>a") == std::vector<int32_t>{4, 5, 4});
  CHECK(llama2.encode(" a") == std::vector<int32_t>{6, 2});
  const Tokenizer first = must_create(must_parse(json("null", metaspace("first"))));
  CHECK(first.encode("a<x>a") == std::vector<int32_t>{4, 5, 2});
  CHECK(first.encode(" a") == std::vector<int32_t>{4});
  const Tokenizer always = must_create(must_parse(json("null", metaspace("always"))));
  CHECK(always.encode("a<x>a<x> a") == std::vector<int32_t>{4, 5, 4, 5, 4});
  const Tokenizer never = must_create(must_parse(json("null", metaspace("never"))));
  CHECK(never.encode("a<x>a") == std::vector<int32_t>{2, 5, 2});
  CHECK(never.decode(std::vector<int32_t>{4}) == " a");
  CHECK(first.decode(std::vector<int32_t>{4, 4}) == "a a");
  CHECK(first.encode("zz") == std::vector<int32_t>{1, 0});  // no byte tokens here: unknown, fused
}

TEST_CASE("white space in patterns is the Unicode property, not PCRE2's") {
  using sluice::model::with_explicit_white_space;
  CHECK(with_explicit_white_space("a\\\\s[\\]]").find("x{3000}") == std::string::npos);
  CHECK(with_explicit_white_space("[^\\s\\p{L}]").rfind("[^\\x{9}-\\x{d}", 0) == 0);
  auto splitter = sluice::model::PreTokenizer::create({{"\\s+", {}, false}, {"[^\\S]x|[]\\s]y", {}, false}});
  REQUIRE(splitter.has_value());
  std::vector<std::string_view> pieces;
  splitter->split("a\xe1\xa0\x8e" "b\xc2\x85" "c", pieces);  // U+180E is none, U+0085 is one
  CHECK(pieces == std::vector<std::string_view>{"a\xe1\xa0\x8e" "b", "\xc2\x85", "c"});
}

TEST_CASE("removed and inverted splits keep what they must") {
  using sluice::storage::SplitBehavior;
  const auto split = [](bool invert) {
    auto splitter = sluice::model::PreTokenizer::create({{"[a-z]+|(?=1)", SplitBehavior::removed, invert}});
    REQUIRE(splitter.has_value());
    std::vector<std::string_view> pieces;
    splitter->split("1ab2cd", pieces);
    return pieces;
  };
  CHECK(split(false) == std::vector<std::string_view>{"1", "2"});
  CHECK(split(true) == std::vector<std::string_view>{"ab", "cd"});
}

TEST_CASE("pre-tokenizers are known by their GGUF names") {
  for (const char* name : {"llama-bpe", "llama3", "qwen2", "deepseek-llm", "deepseek-coder", "deepseek-v3",
                           "deepseek-r1-qwen", "smollm", "gpt-2", "default"}) {
    bool ignore_merges = false;
    bool nfc = false;
    CAPTURE(name);
    const auto steps = sluice::model::pre_tokenizer_by_name(name, &ignore_merges, &nfc);
    REQUIRE(steps.has_value());
    CHECK(sluice::model::PreTokenizer::create(*steps).has_value());
    CHECK(ignore_merges == std::string_view(name).starts_with("llama"));
    CHECK(nfc == (std::string_view(name).find("qwen") != std::string_view::npos));
  }
  const auto unknown = sluice::model::pre_tokenizer_by_name("tekken", nullptr, nullptr);
  REQUIRE_FALSE(unknown.has_value());
  CHECK(unknown.error().code == ErrorCode::unsupported);
  CHECK(unknown.error().message.find("tekken") != std::string::npos);
}

TEST_CASE("the named pre-tokenizers split as the reference files do") {
  const std::filesystem::path golden = environment("SLUICE_GOLDEN");
  const struct { const char* folder; const char* name; } pairs[] = {
      {"tok-llama3", "llama-bpe"}, {"tok-qwen2", "qwen2"}, {"tok-deepseek", "deepseek-v3"}, {"tok-smollm", "smollm"}};
  for (const auto& [folder, name] : pairs) {
    TokenizerSpec spec = must_parse(read_file(golden / folder / "tokenizer.json"));
    bool ignore_merges = false;
    bool nfc = false;
    auto steps = sluice::model::pre_tokenizer_by_name(name, &ignore_merges, &nfc);
    REQUIRE(steps.has_value());
    CHECK(nfc == spec.nfc);
    CHECK(ignore_merges == spec.ignore_merges);
    spec.splits = *steps;
    CHECK(check_cases(must_create(spec), golden / folder / "cases.jsonl") == 241);
  }
}

TEST_CASE("a tokenizer.json that is not one gets a typed error") {
  const struct { const char* text; ErrorCode code; } bad[] = {
      {"", ErrorCode::corrupt},
      {"{", ErrorCode::corrupt},
      {"[]", ErrorCode::corrupt},
      {"{}", ErrorCode::corrupt},
      {R"({"model":{"type":"Unigram","vocab":[]}})", ErrorCode::unsupported},
      {R"({"model":{"type":"BPE","vocab":[],"merges":[]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":"b"},"merges":[]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":4000000000},"merges":[]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":18446744073709551615},"merges":[]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":0,"b":0},"merges":[]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[1]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[["a"]]}})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"added_tokens":[{"id":1}]})", ErrorCode::corrupt},
      {R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[]}})", ErrorCode::unsupported},
      {R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"pre_tokenizer":{"type":"Whitespace"}})",
       ErrorCode::unsupported},
      {R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"normalizer":{"type":"Lowercase"}})",
       ErrorCode::unsupported},
  };
  for (const auto& [text, code] : bad) {
    CAPTURE(text);
    const auto spec = parse_tokenizer_json(text);
    REQUIRE_FALSE(spec.has_value());
    CHECK(spec.error().code == code);
    CHECK(spec.error().message.find("tokenizer.json") != std::string::npos);
  }
  std::string nested = R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[]},"pre_tokenizer":)";
  for (int i = 0; i < 10000; ++i) nested += R"({"type":"Sequence","pretokenizers":[)";
  nested += "1";
  for (int i = 0; i < 10000; ++i) nested += "]}";
  CHECK_FALSE(parse_tokenizer_json(nested + "}").has_value());
}

TEST_CASE("a specification that contradicts itself gets a typed error") {
  const auto refused = [](auto change, ErrorCode code) {
    TokenizerSpec spec = byte_level_spec();
    change(spec);
    const auto tokenizer = Tokenizer::create(spec);
    REQUIRE_FALSE(tokenizer.has_value());
    CHECK(tokenizer.error().code == code);
  };
  refused([](TokenizerSpec& spec) { spec.model = sluice::storage::TokenizerModel::none; }, ErrorCode::unsupported);
  refused([](TokenizerSpec& spec) { spec.kinds.pop_back(); }, ErrorCode::corrupt);
  refused([](TokenizerSpec& spec) { spec.bos = 100000; }, ErrorCode::corrupt);
  refused([](TokenizerSpec& spec) { spec.stop_ids = {-1}; }, ErrorCode::corrupt);
  refused([](TokenizerSpec& spec) { spec.merges.push_back("no such"); }, ErrorCode::corrupt);
  refused([](TokenizerSpec& spec) { spec.merges.push_back("nospace"); }, ErrorCode::corrupt);
  refused([](TokenizerSpec& spec) { spec.splits = {{"(", {}, false}}; }, ErrorCode::unsupported);
  refused([](TokenizerSpec& spec) { spec.tokens.clear(); }, ErrorCode::corrupt);
}

TEST_CASE("random bytes go through every tokenizer and come back as their valid text") {
  const auto seed = static_cast<uint32_t>(
      environment("SLUICE_SEED").empty() ? std::random_device{}() : std::stoul(environment("SLUICE_SEED")));
  std::printf("random bytes: SLUICE_SEED=%u\n", seed);
  CAPTURE(seed);
  std::mt19937 random(seed);
  const std::filesystem::path golden = environment("SLUICE_GOLDEN");
  std::vector<Tokenizer> tokenizers;
  for (const char* name : {"tok-llama3", "tok-deepseek", "tok-smollm"}) {  // Qwen's NFC changes text
    tokenizers.push_back(must_create(must_parse(read_file(golden / name / "tokenizer.json"))));
  }
  tokenizers.push_back(must_create(sentencepiece_spec()));
  for (int round = 0; round < 300; ++round) {
    std::string text(random() % 200, '\0');
    const bool ascii = random() % 3 == 0;
    for (char& c : text) c = static_cast<char>(ascii ? 32 + random() % 96 : random());
    std::string storage;
    const std::string valid(sluice::model::valid_utf8(text, storage));
    for (const Tokenizer& tokenizer : tokenizers) {
      // What follows a special token gets SentencePiece's leading space, and chance writes "<s>" now and then.
      const bool sentencepiece = &tokenizer == &tokenizers.back();
      const auto ids = tokenizer.encode(text, {.special = !sentencepiece});
      for (const int32_t id : ids) REQUIRE((id >= 0 && static_cast<uint32_t>(id) < tokenizer.size()));
      REQUIRE(tokenizer.decode(ids) == valid);
      std::vector<int32_t> noise(50);
      for (int32_t& id : noise) id = static_cast<int32_t>(random() % (tokenizer.size() + 10)) - 5;
      const std::string decoded = tokenizer.decode(noise);
      REQUIRE(sluice::model::valid_utf8(decoded, storage) == decoded);
    }
  }
}

TEST_CASE("long text encodes in well under a second") {
  const std::filesystem::path golden = environment("SLUICE_GOLDEN");
  const Tokenizer tokenizer = must_create(must_parse(read_file(golden / "tok-llama3" / "tokenizer.json")));
  const auto timed = [&](const char* what, const std::string& text) {
    const auto start = std::chrono::steady_clock::now();
    const auto ids = tokenizer.encode(text);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s: %zu bytes, %zu tokens, %.0f ms\n", what, text.size(), ids.size(), 1e3 * seconds);
    CHECK(seconds < 5);  // 0.1 s as a rule; the bound is for instrumented builds on busy machines
  };
  std::string words;
  while (words.size() < 400'000) words += " The quick brown fox, 1234 jumps over don't\n";
  timed("words", words);
  timed("one letter", std::string(400'000, 'a'));
  timed("spaces", std::string(400'000, ' ') + "x");
}
