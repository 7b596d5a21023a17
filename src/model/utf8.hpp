// SPDX-License-Identifier: Apache-2.0
// UTF-8 one character at a time, and the byte alphabet that byte-level vocabularies are written in.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "sluice/result.hpp"

namespace sluice::model {

enum class Utf8State : uint8_t { valid, invalid, incomplete };

// One step through bytes that claim to be UTF-8.
struct Utf8Char {
  Utf8State state = Utf8State::invalid;
  uint32_t code_point = 0xfffd;
  size_t bytes = 1;  // valid: the character; else the longest prefix of one that is here (Unicode 15, 3.9, table 3-8)
};

// Looks at the first character of `text`, which must not be empty. `incomplete`: all of `text` is the beginning of a
// character that more bytes may finish.
Utf8Char next_utf8(std::string_view text);

void append_utf8(std::string& out, uint32_t code_point);

// `text` with every malformed sequence replaced by U+FFFD, as Python's errors="replace" does. Valid text comes back
// as it is, copied into `storage` only where something was replaced.
std::string_view valid_utf8(std::string_view text, std::string& storage);

// Error: corrupt, where `text` has bytes that are not UTF-8, with the offset of the first; `name` begins the message.
Status check_utf8(std::string_view text, const std::string& name);

// The White_Space property (Unicode PropList), which Oniguruma's \s is.
bool is_white_space(uint32_t code_point);

// The alphabet that GPT-2 introduced: each byte is one printable character. Printable Latin-1 stands for itself, the
// 68 other bytes for U+0100 and up, in order.
uint32_t byte_alphabet_char(uint8_t byte);
std::optional<uint8_t> byte_of_alphabet_char(uint32_t code_point);

}  // namespace sluice::model
