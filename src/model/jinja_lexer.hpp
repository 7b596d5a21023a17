// SPDX-License-Identifier: Apache-2.0
// Tokens of a template, with white space control already applied.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/result.hpp"

namespace sluice::model::jinja {

enum class TokenKind : uint8_t {
  data, print_begin, print_end, block_begin, block_end, name, text, integer, real, op, end
};

struct Token {
  TokenKind kind = TokenKind::end;
  uint32_t line = 0;
  std::string_view text;  // of a text literal: its value
};

// Splits `source`, which the tokens borrow from, as they do from `texts`, where values of literals with escapes go.
// `corrupt` for what is no template.
Result<std::vector<Token>> tokenize(std::string_view source, std::deque<std::string>& texts);

// `source` as Jinja prepares it: line ends are \n, and one at the very end is dropped.
std::string normalize_source(std::string_view source);

}  // namespace sluice::model::jinja
