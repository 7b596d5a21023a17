// SPDX-License-Identifier: Apache-2.0
#include "model/jinja_text.hpp"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <utility>

#include "model/utf8.hpp"

namespace sluice::model::jinja {
namespace {

// string_view::find, in linear time whatever the texts: they may come from a hostile template.
size_t find_in(std::string_view text, std::string_view part) {
  const void* at = ::memmem(text.data(), text.size(), part.data(), part.size());
  return at == nullptr ? std::string_view::npos : static_cast<size_t>(static_cast<const char*>(at) - text.data());
}

// The last character of a non-empty text.
std::string_view last_character(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xc0) == 0x80) --begin;
  return text.substr(begin);
}

template <class Strips>
std::string_view strip_while(std::string_view text, Side side, const Strips& strips) {
  if ((static_cast<int>(side) & static_cast<int>(Side::left)) != 0) {
    while (!text.empty()) {
      const std::string_view first = text.substr(0, next_utf8(text).bytes);
      if (!strips(first)) break;
      text.remove_prefix(first.size());
    }
  }
  if ((static_cast<int>(side) & static_cast<int>(Side::right)) != 0) {
    while (!text.empty()) {
      const std::string_view last = last_character(text);
      if (!strips(last)) break;
      text.remove_suffix(last.size());
    }
  }
  return text;
}

template <class Map>
std::string map_characters(std::string_view text, const Map& map) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Char c = next_utf8(text);
    append_utf8(out, static_cast<uint32_t>(map(static_cast<utf8proc_int32_t>(c.code_point))));
    text.remove_prefix(c.bytes);
  }
  return out;
}

bool is_cased(utf8proc_int32_t c) {
  const utf8proc_category_t category = utf8proc_category(c);
  return category == UTF8PROC_CATEGORY_LU || category == UTF8PROC_CATEGORY_LL || category == UTF8PROC_CATEGORY_LT;
}

}  // namespace

size_t find(std::string_view text, std::string_view part) { return part.empty() ? 0 : find_in(text, part); }

bool is_python_space(uint32_t c) { return is_white_space(c) || (c >= 0x1c && c <= 0x1f); }

size_t count_characters(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xc0) != 0x80; }));
}

std::string_view character_at(std::string_view text, size_t index) {
  while (index-- > 0) text.remove_prefix(next_utf8(text).bytes);
  return text.substr(0, next_utf8(text).bytes);
}

std::vector<std::string_view> characters_of(std::string_view text) {
  std::vector<std::string_view> characters;
  while (!text.empty()) {
    const size_t bytes = next_utf8(text).bytes;
    characters.push_back(text.substr(0, bytes));
    text.remove_prefix(bytes);
  }
  return characters;
}

std::string_view strip(std::string_view text, Side side) {
  return strip_while(text, side, [](std::string_view c) { return is_python_space(next_utf8(c).code_point); });
}

std::string_view strip(std::string_view text, Side side, std::string_view chars) {
  // A whole character is found only at a character: UTF-8 is self-synchronizing.
  return strip_while(text, side, [&](std::string_view c) { return chars.find(c) != std::string_view::npos; });
}

std::vector<std::string_view> split_at_space(std::string_view text, int64_t max_splits) {
  std::vector<std::string_view> parts;
  text = strip(text, Side::left);
  while (!text.empty()) {
    if (max_splits >= 0 && static_cast<int64_t>(parts.size()) == max_splits) {
      parts.push_back(strip(text, Side::right));
      break;
    }
    size_t end = 0;
    while (end < text.size() && !is_python_space(next_utf8(text.substr(end)).code_point)) {
      end += next_utf8(text.substr(end)).bytes;
    }
    parts.push_back(text.substr(0, end));
    text = strip(text.substr(end), Side::left);
  }
  return parts;
}

std::vector<std::string_view> split_at(std::string_view text, std::string_view separator, int64_t max_splits,
                                       bool from_right) {
  std::vector<std::string_view> parts;
  while (max_splits < 0 || static_cast<int64_t>(parts.size()) < max_splits) {
    const size_t at = from_right ? text.rfind(separator) : find_in(text, separator);
    if (at == std::string_view::npos) break;
    parts.push_back(from_right ? text.substr(at + separator.size()) : text.substr(0, at));
    text = from_right ? text.substr(0, at) : text.substr(at + separator.size());
  }
  parts.push_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

bool replace(std::string_view text, std::string_view from, std::string_view to, int64_t count, size_t max_bytes,
             std::string& out) {
  out.clear();
  while (count != 0) {
    if (out.size() + to.size() > max_bytes) return false;
    if (from.empty()) {  // between all characters, and at both ends
      out += to;
      if (text.empty()) return true;
      const size_t bytes = next_utf8(text).bytes;
      out.append(text.substr(0, bytes));
      text.remove_prefix(bytes);
    } else {
      const size_t at = find_in(text, from);
      if (at == std::string_view::npos) break;
      out.append(text.substr(0, at));
      out += to;
      text.remove_prefix(at + from.size());
    }
    if (count > 0) --count;
  }
  out += text;
  return out.size() <= max_bytes;
}

std::string to_upper(std::string_view text) {
  // The one character in common use whose upper case is two.
  constexpr std::string_view kSharpS = "\xc3\x9f";
  std::string out;
  for (size_t at; (at = find_in(text, kSharpS)) != std::string_view::npos; text.remove_prefix(at + kSharpS.size())) {
    out += map_characters(text.substr(0, at), utf8proc_toupper) + "SS";
  }
  return out + map_characters(text, utf8proc_toupper);
}
std::string to_lower(std::string_view text) { return map_characters(text, utf8proc_tolower); }

std::string to_title(std::string_view text) {
  bool inside = false;
  return map_characters(text, [&](utf8proc_int32_t c) {
    const utf8proc_int32_t mapped = inside ? utf8proc_tolower(c) : utf8proc_totitle(c);
    inside = is_cased(c);
    return mapped;
  });
}

std::string to_capitalized(std::string_view text) {
  bool first = true;
  return map_characters(text, [&](utf8proc_int32_t c) {
    const bool is_first = std::exchange(first, false);
    return is_first ? utf8proc_totitle(c) : utf8proc_tolower(c);
  });
}

std::string format_float(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::array<char, 64> buffer{};
  const double magnitude = std::abs(value);
  const bool fixed = magnitude == 0 || (magnitude >= 1e-4 && magnitude < 1e16);
  const auto [end, error] = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                          fixed ? std::chars_format::fixed : std::chars_format::scientific);
  std::string text(buffer.data(), end);
  if (fixed && text.find('.') == std::string::npos) text += ".0";
  return text;
}

}  // namespace sluice::model::jinja
