// SPDX-License-Identifier: Apache-2.0
#include "model/tokenizer.hpp"
#include "model/tokenizer_parts.hpp"
#include "model/utf8.hpp"

namespace sluice::model {
namespace {

constexpr std::string_view kSpaceSymbol = "\xe2\x96\x81";

// A token that a byte-level vocabulary spells in its alphabet. One with any other character stands for itself.
bool append_alphabet_bytes(std::string_view text, std::string& out) {
  const size_t before = out.size();
  for (size_t i = 0; i < text.size();) {
    const Utf8Char c = next_utf8(text.substr(i));
    const auto byte = c.state == Utf8State::valid ? byte_of_alphabet_char(c.code_point) : std::nullopt;
    if (!byte) {
      out.resize(before);
      return false;
    }
    out += static_cast<char>(*byte);
    i += c.bytes;
  }
  return true;
}

}  // namespace

std::string Tokenizer::token_bytes(int32_t id) const {
  std::string out;
  append_token_bytes(id, out);
  return out;
}

void Tokenizer::append_token_bytes(int32_t id, std::string& out) const {
  using storage::TokenKind;
  const std::string_view text = parts_->vocabulary.text(id);
  if (text.empty()) return;
  const TokenKind kind = parts_->kinds.empty() ? TokenKind::normal : parts_->kinds[static_cast<size_t>(id)];
  if (!parts_->sentencepiece) {
    const bool plain = kind == TokenKind::special || kind == TokenKind::added;
    if (plain || !append_alphabet_bytes(text, out)) out += text;
    return;
  }
  if (kind == TokenKind::byte) {
    if (const int byte = Bpe::byte_of_token(text); byte >= 0) {
      out += static_cast<char>(static_cast<uint8_t>(byte));
      return;
    }
  }
  for (size_t i = 0; i < text.size();) {
    if (text.substr(i, kSpaceSymbol.size()) == kSpaceSymbol) {
      out += ' ';
      i += kSpaceSymbol.size();
    } else {
      out += text[i++];
    }
  }
}

bool Tokenizer::is_sentencepiece() const { return parts_->sentencepiece; }
bool Tokenizer::strips_first_space() const { return parts_->sentencepiece && parts_->add_prefix_space; }

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  StreamDecoder decoder(*this, skip_special);
  std::string text;
  for (const int32_t id : ids) decoder.push(id, text);
  return text += decoder.finish();
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(&tokenizer), skip_special_(skip_special) {
  pending_.reserve(256);
}

std::string StreamDecoder::push(int32_t id) {
  std::string out;
  push(id, out);
  return out;
}

void StreamDecoder::push(int32_t id, std::string& out) {
  if (skip_special_ && tokenizer_->is_special(id)) return;
  tokenizer_->append_token_bytes(id, pending_);
  take(false, out);
}

std::string StreamDecoder::finish() {
  std::string out;
  take(true, out);
  at_start_ = true;
  return out;
}

// Moves the characters that are complete from `pending_` to `out`. Malformed bytes become one U+FFFD for each sequence,
// as Python and the reference's byte-level decoder do it, or one for each byte, as its SentencePiece decoder does.
void StreamDecoder::take(bool at_end, std::string& out) {
  size_t i = 0;
  while (i < pending_.size()) {
    const Utf8Char c = next_utf8(std::string_view(pending_).substr(i));
    if (c.state == Utf8State::incomplete && !at_end) break;
    if (c.state == Utf8State::valid) {
      const bool dropped = at_start_ && c.code_point == ' ' && tokenizer_->strips_first_space();
      if (!dropped) out.append(pending_, i, c.bytes);
    } else {
      const size_t marks = tokenizer_->is_sentencepiece() ? c.bytes : 1;
      for (size_t n = 0; n < marks; ++n) append_utf8(out, 0xfffd);
    }
    at_start_ = false;
    i += c.bytes;
  }
  pending_.erase(0, i);
}

}  // namespace sluice::model
