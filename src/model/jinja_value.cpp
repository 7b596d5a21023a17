// SPDX-License-Identifier: Apache-2.0
#include "model/jinja_value.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "model/jinja_text.hpp"
#include "model/utf8.hpp"

namespace sluice::model::jinja {
namespace {

constexpr int kMaxDepth = 200;  // of containers in containers, when comparing and printing

void append_quoted(std::string_view text, std::string& out) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const bool has_double = text.find('"') != std::string_view::npos;
  const char quote = has_single && !has_double ? '"' : '\'';
  out += quote;
  while (!text.empty()) {
    const Utf8Char c = next_utf8(text);
    if (c.code_point == static_cast<uint32_t>(quote) || c.code_point == '\\') {
      out += '\\';
      out += static_cast<char>(c.code_point);
    } else if (c.code_point == '\n') {
      out += "\\n";
    } else if (c.code_point == '\r') {
      out += "\\r";
    } else if (c.code_point == '\t') {
      out += "\\t";
    } else if (c.code_point < 0x20 || (c.code_point >= 0x7f && c.code_point <= 0xa0)) {
      out += fmt::format("\\x{:02x}", c.code_point);
    } else {
      out.append(text.substr(0, c.bytes));
    }
    text.remove_prefix(c.bytes);
  }
  out += quote;
}

bool equal_numbers(const Value& a, const Value& b) {
  return a.is_integral() && b.is_integral() ? a.as_integer() == b.as_integer() : a.as_real() == b.as_real();
}

// `walk` one container deeper; gives up beyond kMaxDepth.
template <class Walk>
auto nested(Effort& effort, const Walk& walk) -> decltype(walk()) {
  if (effort.depth >= kMaxDepth) {
    effort.steps = 0;
    return {};
  }
  ++effort.depth;
  const auto answer = walk();
  --effort.depth;
  return answer;
}

bool same_key(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return equal_numbers(a, b);
  return a.kind == b.kind && a.text == b.text;  // texts or none
}

}  // namespace

const Value* Dict::find(const Value& key) const {
  for (const auto& [name, value] : items) {
    if (same_key(name, key)) return &value;
  }
  return nullptr;
}

const Value* Dict::find(std::string_view key) const {
  for (const auto& [name, value] : items) {
    if (name.is(Kind::text) && name.text == key) return &value;
  }
  return nullptr;
}

void Dict::set(const Value& key, const Value& value) {
  for (auto& [name, old] : items) {
    if (same_key(name, key)) {
      old = value;
      return;
    }
  }
  items.emplace_back(key, value);
}

bool Arena::charge(size_t bytes) {
  if (full_ || bytes > budget_bytes_ - used_bytes_) {
    full_ = true;
    return false;
  }
  used_bytes_ += bytes;
  return true;
}

Value Arena::text(std::string text) {
  if (!charge(text.size() + sizeof(std::string))) return Value::of(std::string_view());
  return Value::of(std::string_view(texts_.emplace_back(std::move(text))));
}

List* Arena::list() {
  charge(sizeof(List));
  return &lists_.emplace_back();
}

Dict* Arena::dict() {
  charge(sizeof(Dict));
  return &dicts_.emplace_back();
}

bool truth(const Value& value) {
  switch (value.kind) {
    case Kind::undefined:
    case Kind::none: return false;
    case Kind::boolean: return value.boolean;
    case Kind::integer: return value.integer != 0;
    case Kind::real: return value.real != 0;
    case Kind::text: return !value.text.empty();
    case Kind::list: return value.list->lazy || !value.list->items.empty();
    case Kind::dict: return !value.dict->items.empty();
    default: return true;
  }
}

bool equal(const Value& a, const Value& b, Effort& effort) {
  if (!effort.spend(1 + std::min(a.text.size(), b.text.size()) / 64)) return false;
  if (a.is_number() && b.is_number()) return equal_numbers(a, b);
  if (a.kind != b.kind) return false;
  switch (a.kind) {
    case Kind::undefined:
    case Kind::none: return true;
    case Kind::text: return a.text == b.text;
    case Kind::list: {
      if (a.list == b.list) return true;
      if (a.list->tuple != b.list->tuple || a.list->lazy || b.list->lazy) return false;
      const auto& x = a.list->items;
      const auto& y = b.list->items;
      return x.size() == y.size() && nested(effort, [&] {
               return std::equal(x.begin(), x.end(), y.begin(),
                                 [&](const Value& p, const Value& q) { return equal(p, q, effort); });
             });
    }
    case Kind::dict: {
      if (a.dict == b.dict) return true;
      const auto& x = a.dict->items;
      return x.size() == b.dict->items.size() && nested(effort, [&] {
               return std::all_of(x.begin(), x.end(), [&](const auto& item) {
                 if (!effort.spend(x.size())) return false;
                 const Value* other = b.dict->find(item.first);
                 return other != nullptr && equal(item.second, *other, effort);
               });
             });
    }
    case Kind::space: return a.dict == b.dict;
    case Kind::macro: return a.macro == b.macro;
    case Kind::function: return a.function == b.function;
    case Kind::loop: return a.loop == b.loop;
    default: return false;
  }
}

std::optional<int> compare(const Value& a, const Value& b, Effort& effort) {
  const auto order = [](auto x, auto y) { return x < y ? -1 : (y < x ? 1 : 0); };
  if (!effort.spend(1 + std::min(a.text.size(), b.text.size()) / 64)) return std::nullopt;
  if (a.is_number() && b.is_number()) {
    return a.is_integral() && b.is_integral() ? order(a.as_integer(), b.as_integer()) : order(a.as_real(), b.as_real());
  }
  if (a.is(Kind::text) && b.is(Kind::text)) return order(a.text, b.text);  // bytewise is by code point in UTF-8
  if (a.is(Kind::list) && b.is(Kind::list) && a.list->tuple == b.list->tuple && !a.list->lazy && !b.list->lazy) {
    const auto& x = a.list->items;
    const auto& y = b.list->items;
    return nested(effort, [&]() -> std::optional<int> {
      for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
        if (!equal(x[i], y[i], effort)) return compare(x[i], y[i], effort);
      }
      return order(x.size(), y.size());
    });
  }
  return std::nullopt;
}

void append_text(const Value& value, bool quoted, size_t max_bytes, std::string& out, int depth) {
  if (out.size() > max_bytes) return;
  if (depth > kMaxDepth) {
    out += "...";
    return;
  }
  const auto item_text = [&](const Value& item) { append_text(item, true, max_bytes, out, depth + 1); };
  switch (value.kind) {
    case Kind::undefined: out += quoted ? "Undefined" : ""; break;
    case Kind::none: out += "None"; break;
    case Kind::boolean: out += value.boolean ? "True" : "False"; break;
    case Kind::integer: out += std::to_string(value.integer); break;
    case Kind::real: out += format_float(value.real); break;
    case Kind::text:
      if (quoted) append_quoted(value.text, out);
      else out += value.text;
      break;
    case Kind::list: {
      if (value.list->lazy) {
        out += "<generator object>";
        break;
      }
      out += value.list->tuple ? '(' : '[';
      bool first = true;
      for (const Value& item : value.list->items) {
        if (out.size() > max_bytes) return;
        if (!std::exchange(first, false)) out += ", ";
        item_text(item);
      }
      if (value.list->tuple && value.list->items.size() == 1) out += ',';
      out += value.list->tuple ? ')' : ']';
      break;
    }
    case Kind::dict:
    case Kind::space: {
      out += value.is(Kind::space) ? "<Namespace {" : "{";
      bool first = true;
      for (const auto& [key, item] : value.dict->items) {
        if (out.size() > max_bytes) return;
        if (!std::exchange(first, false)) out += ", ";
        item_text(key);
        out += ": ";
        item_text(item);
      }
      out += value.is(Kind::space) ? "}>" : "}";
      break;
    }
    case Kind::macro: out += "<Macro>"; break;
    case Kind::function: out += "<function>"; break;
    case Kind::loop: out += "<LoopContext>"; break;
  }
}

std::string_view describe(const Value& value) {
  switch (value.kind) {
    case Kind::undefined: return "undefined";
    case Kind::none: return "none";
    case Kind::boolean: return "a boolean";
    case Kind::integer: return "an integer";
    case Kind::real: return "a float";
    case Kind::text: return "a string";
    case Kind::list: return value.list->lazy ? "a generator" : value.list->tuple ? "a tuple" : "a list";
    case Kind::dict: return "a mapping";
    case Kind::space: return "a namespace";
    case Kind::macro: return "a macro";
    case Kind::function: return "a function";
    case Kind::loop: return "the loop variable";
  }
  return "a value";
}

}  // namespace sluice::model::jinja
