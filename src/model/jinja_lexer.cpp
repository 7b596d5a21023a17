// SPDX-License-Identifier: Apache-2.0
#include "model/jinja_lexer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "model/jinja_text.hpp"
#include "model/utf8.hpp"

namespace sluice::model::jinja {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || static_cast<uint8_t>(c) >= 0x80;
}
bool is_name_char(char c) { return is_name_start(c) || is_digit(c); }

std::optional<uint32_t> parse_hex(std::string_view digits) {
  uint32_t value = 0;
  for (const char c : digits) {
    const char lower = static_cast<char>(c | 0x20);
    if (is_digit(c)) value = value * 16 + static_cast<uint32_t>(c - '0');
    else if (lower >= 'a' && lower <= 'f') value = value * 16 + static_cast<uint32_t>(lower - 'a' + 10);
    else return std::nullopt;
  }
  return value;
}

class Lexer {
 public:
  Lexer(std::string_view source, std::deque<std::string>& texts) : source_(source), texts_(texts) {}

  Result<std::vector<Token>> run() {
    while (at_ < source_.size()) SLUICE_TRY(data());
    add(TokenKind::end, {});
    return std::move(tokens_);
  }

 private:
  std::string_view rest() const { return source_.substr(at_); }
  bool starts(std::string_view prefix) const { return rest().substr(0, prefix.size()) == prefix; }
  void add(TokenKind kind, std::string_view text) { tokens_.push_back({kind, line_, text}); }
  Unexpected broken(std::string_view what) const {
    return fail(ErrorCode::corrupt, fmt::format("chat template, line {}: {}", line_, what));
  }

  // Moves on; the white space rules ask whether what was read last ended a line.
  void advance(size_t bytes) {
    const std::string_view passed = rest().substr(0, bytes);
    line_ += static_cast<uint32_t>(std::count(passed.begin(), passed.end(), '\n'));
    if (!passed.empty()) line_starting_ = passed.back() == '\n';
    at_ += passed.size();
  }

  void skip_space() { advance(rest().size() - strip(rest(), Side::left).size()); }

  // Text up to the next tag, then that tag.
  Status data() {
    size_t tag = at_;
    for (;; ++tag) {
      tag = source_.find('{', tag);
      if (tag == std::string_view::npos || tag + 1 >= source_.size()) {
        add_data(rest());
        advance(rest().size());
        return {};
      }
      const char second = source_[tag + 1];
      if (second == '{' || second == '%' || second == '#') break;
    }
    const char kind = source_[tag + 1];
    const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
    add_data(before_tag(source_.substr(at_, tag - at_), sign, kind != '{'));
    advance(tag - at_ + (sign == '-' || sign == '+' ? 3 : 2));
    if (kind == '#') return comment();
    if (kind == '%' && at_raw()) return raw();
    add(kind == '{' ? TokenKind::print_begin : TokenKind::block_begin, {});
    return tag_tokens(kind == '%');
  }

  void add_data(std::string_view text) {
    if (!text.empty()) add(TokenKind::data, text);
  }

  // `text` less what its following tag strips: all white space with a minus; a block's or comment's indentation
  // (lstrip_blocks) without a plus.
  std::string_view before_tag(std::string_view text, char sign, bool strips_indent) const {
    if (sign == '-') return strip(text, Side::right);
    if (sign == '+' || !strips_indent) return text;
    const size_t newline = text.rfind('\n');
    const size_t begin = newline == std::string_view::npos ? 0 : newline + 1;
    if (newline == std::string_view::npos && !line_starting_) return text;
    return strip(text.substr(begin), Side::left).empty() ? text.substr(0, begin) : text;
  }

  // Passes the end of a tag if here: `-%}` takes all white space with it, `%}` the end of its line (trim_blocks).
  bool pass_end(std::string_view end, bool trims_line) {
    if (starts("-") && rest().substr(1, end.size()) == end) {
      advance(1 + end.size());
      skip_space();
      return true;
    }
    if (trims_line && starts("+") && rest().substr(1, end.size()) == end) {
      advance(1 + end.size());
      return true;
    }
    if (!starts(end)) return false;
    advance(end.size());
    if (trims_line && starts("\n")) advance(1);
    return true;
  }

  Status comment() {
    while (at_ < source_.size()) {
      if (pass_end("#}", true)) return {};
      advance(1);
    }
    return broken("a comment without an end");
  }

  // True at `raw %}`; the caller is behind `{%`.
  bool at_raw() const { return raw_tag_bytes(rest(), "raw") != 0; }

  // Bytes of `WORD %}` and the white space before it; 0 where that is not here. Up to the end sign, not through it.
  static size_t raw_tag_bytes(std::string_view text, std::string_view word) {
    std::string_view left = strip(text, Side::left);
    if (left.substr(0, word.size()) != word) return 0;
    left = strip(left.substr(word.size()), Side::left);
    const bool ends = left.substr(0, 2) == "%}" || left.substr(0, 3) == "-%}" || left.substr(0, 3) == "+%}";
    return ends ? text.size() - left.size() : 0;
  }

  Status raw() {
    advance(raw_tag_bytes(rest(), "raw"));
    if (starts("+")) return broken("raw cannot end in +%}");
    const bool minus = starts("-");
    advance(minus ? 3 : 2);
    if (minus) skip_space();
    for (size_t tag = at_; (tag = source_.find("{%", tag)) != std::string_view::npos; ++tag) {
      const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
      const size_t open = sign == '-' || sign == '+' ? 3 : 2;
      const size_t word = raw_tag_bytes(source_.substr(std::min(tag + open, source_.size())), "endraw");
      if (word == 0) continue;
      add_data(before_tag(source_.substr(at_, tag - at_), sign, true));
      advance(tag - at_ + open + word);
      pass_end("%}", true);
      return {};
    }
    return broken("raw without endraw");
  }

  // Tokens inside {{ }} or {% %}.
  Status tag_tokens(bool block) {
    std::string open;  // brackets; an end inside them is none
    while (true) {
      skip_space();
      if (at_ >= source_.size()) return broken(block ? "a block tag without %}" : "an expression without }}");
      if (open.empty() && at_end(block)) {
        const TokenKind kind = block ? TokenKind::block_end : TokenKind::print_end;
        add(kind, {});
        pass_end(block ? "%}" : "}}", block);
        return {};
      }
      const char c = source_[at_];
      if (is_digit(c)) SLUICE_TRY(number());
      else if (is_name_start(c)) name();
      else if (c == '\'' || c == '"') SLUICE_TRY(text_literal(c));
      else SLUICE_TRY(op(open));
    }
  }

  bool at_end(bool block) const {
    const std::string_view end = block ? "%}" : "}}";
    const size_t sign = starts("-") || (block && starts("+")) ? 1 : 0;
    return rest().substr(sign, 2) == end;
  }

  void name() {
    size_t bytes = 0;
    while (bytes < rest().size() && is_name_char(rest()[bytes])) ++bytes;
    add(TokenKind::name, rest().substr(0, bytes));
    advance(bytes);
  }

  size_t digits_from(size_t from) const {
    size_t end = from;
    while (end < rest().size() && (is_digit(rest()[end]) || (rest()[end] == '_' && end > from))) ++end;
    return end;
  }

  // 12, 1_000, 1.5, 1e9, 0x1f. After a dot only digits, so that a.0.1 is two steps.
  Status number() {
    size_t end = digits_from(0);
    bool real = false;
    const bool after_dot = at_ > 0 && source_[at_ - 1] == '.';
    if (starts("0x") || starts("0X") || starts("0b") || starts("0B") || starts("0o") || starts("0O")) {
      return fail(ErrorCode::unsupported, fmt::format("chat template, line {}: a number that is not decimal", line_));
    }
    if (!after_dot && end + 1 < rest().size() && rest()[end] == '.' && is_digit(rest()[end + 1])) {
      end = digits_from(end + 1);
      real = true;
    }
    if (!after_dot && end < rest().size() && (rest()[end] | 0x20) == 'e') {
      const size_t sign = end + 1 < rest().size() && (rest()[end + 1] == '+' || rest()[end + 1] == '-') ? 1 : 0;
      const size_t exponent = digits_from(end + 1 + sign);
      if (exponent > end + 1 + sign) {
        end = exponent;
        real = true;
      }
    }
    const std::string_view digits = rest().substr(0, end);
    if (!real && digits.size() > 1 && digits[0] == '0' && digits.find_first_not_of("0_") != std::string_view::npos) {
      return broken("a number that begins with 0");
    }
    add(real ? TokenKind::real : TokenKind::integer, without_underscores(digits));
    advance(end);
    return {};
  }

  std::string_view without_underscores(std::string_view digits) {
    if (digits.find('_') == std::string_view::npos) return digits;
    std::string& plain = texts_.emplace_back(digits);
    plain.erase(std::remove(plain.begin(), plain.end(), '_'), plain.end());
    return plain;
  }

  Status text_literal(char quote) {
    size_t end = 1;
    bool escapes = false;
    while (end < rest().size() && rest()[end] != quote) {
      escapes = escapes || rest()[end] == '\\';
      end += rest()[end] == '\\' ? 2 : 1;
    }
    if (end >= rest().size()) return broken("a string without its closing quote");
    std::string_view value = rest().substr(1, end - 1);
    if (escapes) {
      std::string& decoded = texts_.emplace_back();
      SLUICE_TRY(unescape(value, decoded));
      value = decoded;
    }
    add(TokenKind::text, value);
    advance(end + 1);
    return {};
  }

  Status unescape(std::string_view text, std::string& out) {
    constexpr std::string_view kNames = "ntrabfv\\'\"", kValues = "\n\t\r\a\b\f\v\\'\"";
    while (!text.empty()) {
      const size_t slash = text.find('\\');
      out.append(text.substr(0, slash));
      if (slash == std::string_view::npos) break;
      const char c = text[slash + 1];  // there is one: the literal's end was found behind it
      text.remove_prefix(slash + 2);
      if (const size_t i = kNames.find(c); i != std::string_view::npos) {
        out += kValues[i];
      } else if (c == '\n') {
        // the line goes on
      } else if (c >= '0' && c <= '7') {
        uint32_t value = static_cast<uint32_t>(c - '0');
        for (int more = 2; more > 0 && !text.empty() && text[0] >= '0' && text[0] <= '7'; --more) {
          value = value * 8 + static_cast<uint32_t>(text[0] - '0');
          text.remove_prefix(1);
        }
        append_utf8(out, value);
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        const auto value = parse_hex(text.substr(0, digits));
        if (text.size() < digits || !value || *value > 0x10ffff || (*value >= 0xd800 && *value < 0xe000)) {
          return broken(fmt::format("\\{} must be followed by {} hexadecimal digits of a character", c, digits));
        }
        append_utf8(out, *value);
        text.remove_prefix(digits);
      } else if (c == 'N') {
        return fail(ErrorCode::unsupported, fmt::format("chat template, line {}: \\N in a string", line_));
      } else {
        out += '\\';
        out += c;
      }
    }
    return {};
  }

  Status op(std::string& open) {
    constexpr std::array<std::string_view, 6> kTwo = {"//", "**", "==", "!=", ">=", "<="};
    constexpr std::string_view kOne = "+-/*%~[](){}><=.:|,;", kOpen = "([{", kClose = ")]}";
    for (const std::string_view two : kTwo) {
      if (!starts(two)) continue;
      add(TokenKind::op, rest().substr(0, 2));
      advance(2);
      return {};
    }
    const char c = source_[at_];
    if (kOne.find(c) == std::string_view::npos) return broken(fmt::format("unexpected character '{}'", c));
    if (kOpen.find(c) != std::string_view::npos) open += c;
    if (const size_t i = kClose.find(c); i != std::string_view::npos) {
      if (open.empty() || open.back() != kOpen[i]) return broken(fmt::format("unexpected '{}'", c));
      open.pop_back();
    }
    add(TokenKind::op, rest().substr(0, 1));
    advance(1);
    return {};
  }

  std::string_view source_;
  std::deque<std::string>& texts_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  uint32_t line_ = 1;
  bool line_starting_ = true;
};

}  // namespace

Result<std::vector<Token>> tokenize(std::string_view source, std::deque<std::string>& texts) {
  return Lexer(source, texts).run();
}

std::string normalize_source(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
    } else {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

}  // namespace sluice::model::jinja
