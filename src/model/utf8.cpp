// SPDX-License-Identifier: Apache-2.0
#include "model/utf8.hpp"

#include <fmt/format.h>

#include <array>

namespace sluice::model {
namespace {

struct LeadByte {
  uint8_t length;       // 0: cannot begin a character
  uint8_t second_from;  // range of the second byte; the later ones are 80..BF
  uint8_t second_to;
};

LeadByte lead_byte(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xc2) return {0, 0, 0};
  if (byte < 0xe0) return {2, 0x80, 0xbf};
  if (byte == 0xe0) return {3, 0xa0, 0xbf};  // below: overlong
  if (byte == 0xed) return {3, 0x80, 0x9f};  // above: surrogates
  if (byte < 0xf0) return {3, 0x80, 0xbf};
  if (byte == 0xf0) return {4, 0x90, 0xbf};
  if (byte < 0xf4) return {4, 0x80, 0xbf};
  if (byte == 0xf4) return {4, 0x80, 0x8f};  // above: beyond U+10FFFF
  return {0, 0, 0};
}

struct ByteAlphabet {
  std::array<uint16_t, 256> char_of{};
  std::array<int16_t, 324> byte_of{};  // 256 + the 68 bytes that do not stand for themselves

  constexpr ByteAlphabet() {
    byte_of.fill(-1);
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool itself = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
      const uint32_t code_point = itself ? byte : next++;
      char_of[byte] = static_cast<uint16_t>(code_point);
      byte_of[code_point] = static_cast<int16_t>(byte);
    }
  }
};

constexpr ByteAlphabet kByteAlphabet;

}  // namespace

Utf8Char next_utf8(std::string_view text) {
  const auto at = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const LeadByte lead = lead_byte(at(0));
  if (lead.length == 1) return {Utf8State::valid, at(0), 1};
  if (lead.length == 0) return {Utf8State::invalid, 0xfffd, 1};
  uint32_t code_point = at(0) & (0xffu >> (lead.length + 1));
  for (size_t i = 1; i < lead.length; ++i) {
    if (i == text.size()) return {Utf8State::incomplete, 0xfffd, i};
    const uint8_t from = i == 1 ? lead.second_from : uint8_t{0x80};
    const uint8_t to = i == 1 ? lead.second_to : uint8_t{0xbf};
    if (at(i) < from || at(i) > to) return {Utf8State::invalid, 0xfffd, i};
    code_point = (code_point << 6) | (at(i) & 0x3fu);
  }
  return {Utf8State::valid, code_point, lead.length};
}

void append_utf8(std::string& out, uint32_t code_point) {
  const auto put = [&](uint32_t byte) { out.push_back(static_cast<char>(static_cast<uint8_t>(byte))); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xc0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3f));
  } else if (code_point < 0x10000) {
    put(0xe0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3f));
    put(0x80 | (code_point & 0x3f));
  } else {
    put(0xf0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3f));
    put(0x80 | ((code_point >> 6) & 0x3f));
    put(0x80 | (code_point & 0x3f));
  }
}

namespace {

// Where the first bytes from `at` on lie that are no character; the end of `text` if all are.
size_t find_invalid(std::string_view text, size_t at) {
  while (at < text.size()) {
    if (static_cast<uint8_t>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    const Utf8Char c = next_utf8(text.substr(at));
    if (c.state != Utf8State::valid) return at;
    at += c.bytes;
  }
  return text.size();
}

}  // namespace

std::string_view valid_utf8(std::string_view text, std::string& storage) {
  size_t copied = 0, bad = find_invalid(text, 0);
  if (bad == text.size()) return text;
  storage.clear();
  for (; bad < text.size(); bad = find_invalid(text, copied)) {
    storage.append(text.substr(copied, bad - copied));
    append_utf8(storage, 0xfffd);
    copied = bad + next_utf8(text.substr(bad)).bytes;
  }
  storage.append(text.substr(copied));
  return storage;
}

Status check_utf8(std::string_view text, const std::string& name) {
  const size_t bad = find_invalid(text, 0);
  if (bad == text.size()) return {};
  return fail(ErrorCode::corrupt,
              fmt::format("{}: the bytes at offset {} are not UTF-8; give text in that encoding", name, bad));
}

bool is_white_space(uint32_t c) {
  return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
         c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

uint32_t byte_alphabet_char(uint8_t byte) { return kByteAlphabet.char_of[byte]; }

std::optional<uint8_t> byte_of_alphabet_char(uint32_t code_point) {
  if (code_point >= kByteAlphabet.byte_of.size() || kByteAlphabet.byte_of[code_point] < 0) return std::nullopt;
  return static_cast<uint8_t>(kByteAlphabet.byte_of[code_point]);
}

}  // namespace sluice::model
