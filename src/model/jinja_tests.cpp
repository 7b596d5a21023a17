// SPDX-License-Identifier: Apache-2.0
// Tests (`value is name`), and values as JSON.
#include <algorithm>
#include <optional>

#include "model/jinja_builtins.hpp"
#include "model/jinja_text.hpp"
#include "model/utf8.hpp"

namespace sluice::model::jinja {
namespace {

// Tests that take no argument; nothing for another name.
std::optional<bool> plain_test(std::string_view name, const Value& value) {
  const Kind kind = value.kind;
  const bool has_items = kind == Kind::list || kind == Kind::text || kind == Kind::dict || kind == Kind::undefined;
  if (name == "defined") return kind != Kind::undefined;
  if (name == "undefined") return kind == Kind::undefined;
  if (name == "none") return kind == Kind::none;
  if (name == "string") return kind == Kind::text;
  if (name == "mapping") return kind == Kind::dict;
  if (name == "iterable") return has_items;
  if (name == "sequence") return has_items && !(kind == Kind::list && value.list->lazy);
  if (name == "number") return value.is_number();
  if (name == "integer") return kind == Kind::integer;
  if (name == "float") return kind == Kind::real;
  if (name == "boolean") return kind == Kind::boolean;
  if (name == "true") return kind == Kind::boolean && value.boolean;
  if (name == "false") return kind == Kind::boolean && !value.boolean;
  if (name == "callable") return kind == Kind::macro || kind == Kind::function || kind == Kind::undefined;
  return std::nullopt;
}

std::optional<Op> comparison_test(std::string_view name) {
  constexpr std::pair<std::string_view, Op> kTests[] = {
      {"equalto", Op::equal},        {"eq", Op::equal},           {"==", Op::equal},
      {"ne", Op::not_equal},         {"!=", Op::not_equal},       {"lt", Op::less},
      {"lessthan", Op::less},        {"<", Op::less},             {"le", Op::less_or_equal},
      {"<=", Op::less_or_equal},     {"gt", Op::greater},         {"greaterthan", Op::greater},
      {">", Op::greater},            {"ge", Op::greater_or_equal}, {">=", Op::greater_or_equal},
      {"in", Op::contained},
  };
  for (const auto& [test, op] : kTests) {
    if (test == name) return op;
  }
  return std::nullopt;
}

// str.islower() and str.isupper(): some letter, and all of that case.
bool has_case(std::string_view text, bool upper) {
  return (upper ? to_upper(text) : to_lower(text)) == text && (upper ? to_lower(text) : to_upper(text)) != text;
}

Result<bool> remainder_test(Context& context, const Value& value, const Value& divisor, int64_t wanted) {
  SLUICE_TRY_ASSIGN(remainder, apply_operator(context, Op::modulo, value, divisor));
  return context.is_equal(remainder, Value::of(wanted));
}

void append_json_text(std::string_view text, bool ascii, std::string& out) {
  out += '"';
  while (!text.empty()) {
    const Utf8Char c = next_utf8(text);
    const std::string_view bytes = text.substr(0, c.bytes);
    text.remove_prefix(c.bytes);
    constexpr std::string_view kEscaped = "\"\\\n\r\t\b\f", kNames = "\"\\nrtbf";
    const size_t i = bytes.size() == 1 ? kEscaped.find(bytes[0]) : std::string_view::npos;
    if (i != std::string_view::npos) {
      out += '\\';
      out += kNames[i];
    } else if (c.code_point < 0x20 || (ascii && c.code_point >= 0x80 && c.code_point < 0x10000)) {
      out += fmt::format("\\u{:04x}", c.code_point);
    } else if (ascii && c.code_point >= 0x10000) {
      const uint32_t offset = c.code_point - 0x10000;
      out += fmt::format("\\u{:04x}\\u{:04x}", 0xd800 + (offset >> 10), 0xdc00 + (offset & 0x3ff));
    } else {
      out.append(bytes);
    }
  }
  out += '"';
}

// A mapping's key, which JSON writes as a string.
std::string json_key(const Value& key) {
  if (key.is(Kind::none)) return "null";
  if (key.is(Kind::boolean)) return key.boolean ? "true" : "false";
  std::string text;
  append_text(key, false, SIZE_MAX, text);
  return text;
}

}  // namespace

Result<bool> apply_test(Context& context, std::string_view name, const Value& subject, const Arguments& args) {
  if (const auto answer = plain_test(name, subject)) {
    SLUICE_TRY(bind(context, name, args, {}, 0));
    return *answer;
  }
  if (const auto op = comparison_test(name)) {
    SLUICE_TRY_ASSIGN(bound, bind(context, name, args, {"other"}, 1));
    return compare_with(context, *op, subject, *bound[0]);
  }
  if (name == "odd" || name == "even") {
    SLUICE_TRY(bind(context, name, args, {}, 0));
    return remainder_test(context, subject, Value::of(int64_t{2}), name == "odd" ? 1 : 0);
  }
  if (name == "divisibleby") {
    SLUICE_TRY_ASSIGN(bound, bind(context, name, args, {"num"}, 1));
    return remainder_test(context, subject, *bound[0], 0);
  }
  if (name == "lower" || name == "upper") {
    SLUICE_TRY(bind(context, name, args, {}, 0));
    SLUICE_TRY_ASSIGN(text, context.to_text(subject));
    SLUICE_TRY(context.spend_on(text.text));
    return has_case(text.text, name == "upper");
  }
  if (name == "sameas") {
    SLUICE_TRY_ASSIGN(bound, bind(context, name, args, {"other"}, 1));
    if (subject.kind != bound[0]->kind) return false;
    if (subject.is(Kind::list)) return subject.list == bound[0]->list;
    if (subject.is(Kind::dict)) return subject.dict == bound[0]->dict;
    return context.is_equal(subject, *bound[0]);
  }
  return context.lacking("the test '{}'", name);
}

Status append_json(Context& context, const Value& value, const JsonStyle& style, int level, std::string& out) {
  const Deeper deeper(context);
  SLUICE_TRY(deeper.check());
  SLUICE_TRY(context.spend_on(value.text));
  if (out.size() > context.limits.output_bytes) return context.lacking("JSON of more than {} bytes", out.size());
  const auto break_line = [&](int at_level) {
    if (style.indent < 0) return;
    out += '\n';
    out.append(static_cast<size_t>(style.indent) * static_cast<size_t>(at_level), ' ');
  };
  const std::string_view separator = style.indent < 0 ? ", " : ",";
  switch (value.kind) {
    case Kind::none: out += "null"; return {};
    case Kind::boolean: out += value.boolean ? "true" : "false"; return {};
    case Kind::integer: out += std::to_string(value.integer); return {};
    case Kind::real: {
      const std::string digits = format_float(value.real);
      out += digits == "nan" ? "NaN" : digits == "inf" ? "Infinity" : digits == "-inf" ? "-Infinity" : digits;
      return {};
    }
    case Kind::text: append_json_text(value.text, style.ascii, out); return {};
    case Kind::list: {
      if (value.list->lazy) return context.misfit("tojson", value);
      const auto& items = value.list->items;
      out += '[';
      for (size_t i = 0; i < items.size(); ++i) {
        if (i > 0) out += separator;
        break_line(level + 1);
        SLUICE_TRY(append_json(context, items[i], style, level + 1, out));
      }
      if (!items.empty()) break_line(level);
      out += ']';
      return {};
    }
    case Kind::dict: {
      auto items = value.dict->items;
      if (style.sort_keys) {
        const bool texts =
            std::all_of(items.begin(), items.end(), [](const auto& item) { return item.first.is(Kind::text); });
        if (!texts) return context.lacking("tojson with sorted keys that are not strings");
        std::sort(items.begin(), items.end(), [](const auto& a, const auto& b) { return a.first.text < b.first.text; });
      }
      out += '{';
      for (size_t i = 0; i < items.size(); ++i) {
        if (i > 0) out += separator;
        break_line(level + 1);
        append_json_text(json_key(items[i].first), style.ascii, out);
        out += ": ";
        SLUICE_TRY(append_json(context, items[i].second, style, level + 1, out));
      }
      if (!items.empty()) break_line(level);
      out += '}';
      return {};
    }
    default: return context.misfit("tojson", value);
  }
}

}  // namespace sluice::model::jinja
