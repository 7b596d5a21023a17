// SPDX-License-Identifier: Apache-2.0
#include "model/text_stream.hpp"

#include "catch.hpp"

namespace {

using namespace sluice;

// A byte-level tokenizer whose ids are bytes.
model::Tokenizer byte_tokenizer() {
  storage::TokenizerSpec spec;
  spec.model = storage::TokenizerModel::byte_level_bpe;
  for (int byte = 0; byte < 256; ++byte) {
    // The GPT-2 alphabet: printable Latin-1 stands for itself, the others for U+0100 and up in order.
    static int next = 256;
    if (byte == 0) next = 256;
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const int code = printable ? byte : next++;
    std::string text;
    if (code < 0x80) {
      text += static_cast<char>(code);
    } else {
      text += static_cast<char>(0xc0 | (code >> 6));
      text += static_cast<char>(0x80 | (code & 0x3f));
    }
    spec.tokens.push_back(text);
    spec.kinds.push_back(storage::TokenKind::normal);
  }
  auto tokenizer = model::Tokenizer::create(spec);
  REQUIRE(tokenizer);
  return std::move(*tokenizer);
}

// Pushes bytes; returns what came out per push, joined by '|', and whether a stop text ended it.
std::pair<std::string, bool> stream(const std::string& bytes, const std::vector<std::string>& stops, bool last_flag = true) {
  const model::Tokenizer tokenizer = byte_tokenizer();
  model::TextStream text(&tokenizer, stops);
  std::string out;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const bool last = last_flag && i + 1 == bytes.size();
    const bool stopped = text.push(static_cast<uint8_t>(bytes[i]), last);
    out += text.ready();
    if (stopped) return {out, true};
    if (i + 1 < bytes.size()) out += '|';
  }
  return {out, false};
}

}  // namespace

TEST_CASE("text comes out as it is made") { CHECK(stream("abc", {}) == std::pair<std::string, bool>{"a|b|c", false}); }

TEST_CASE("a character of several bytes comes out whole, and a broken one as U+FFFD at the end") {
  CHECK(stream("\xe2\x88\x9a!", {}) == std::pair<std::string, bool>{"||\xe2\x88\x9a|!", false});
  CHECK(stream("a\xe2\x88", {}) == std::pair<std::string, bool>{"a||\xef\xbf\xbd", false});
}

TEST_CASE("a stop text never comes out, nor anything behind it") {
  CHECK(stream("one END two", {"END"}) == std::pair<std::string, bool>{"o|n|e| |||", true});
  CHECK(stream("xEND", {"never", "END"}) == std::pair<std::string, bool>{"x|||", true});
}

TEST_CASE("what only began like a stop text comes out as soon as that is known") {
  CHECK(stream("ENDING?", {"ENDED"}) == std::pair<std::string, bool>{"|||ENDI|N|G|?", false});
  CHECK(stream("aab", {"ab"}) == std::pair<std::string, bool>{"|a|", true});
}

TEST_CASE("what is held back comes out with the last token or at the end") {
  CHECK(stream("xEN", {"END"}) == std::pair<std::string, bool>{"x||EN", false});
  const model::Tokenizer tokenizer = byte_tokenizer();
  const std::vector<std::string> stops = {"END"};
  model::TextStream text(&tokenizer, stops);
  CHECK(!text.push('E', false));
  CHECK(text.ready().empty());
  CHECK(!text.finish());
  CHECK(text.ready() == "E");
}

TEST_CASE("without a tokenizer there is no text, and empty stop texts are ignored") {
  const std::vector<std::string> stops = {""};
  model::TextStream text(nullptr, stops);
  CHECK(!text.push(5, true));
  CHECK(text.ready().empty());
  CHECK(stream("ab", {""}) == std::pair<std::string, bool>{"a|b", false});
}
