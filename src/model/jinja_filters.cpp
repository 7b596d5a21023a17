// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>

#include "model/jinja_builtins.hpp"
#include "model/jinja_text.hpp"

namespace sluice::model::jinja {
namespace {

struct Filter {
  std::string_view name;
  Parameters parameters;
  size_t required;
  Result<Value> (*apply)(Context& context, std::string_view name, const Value& subject, const Bound& args);
};

bool is_set(const Value* argument) { return argument != nullptr && truth(*argument); }

// The value at a path like "function.name" or 0.
Result<Value> at_path(Context& context, Value value, const Value& path) {
  if (path.is_integral()) return item_of(context, value, path);
  if (!path.is(Kind::text)) return context.misfit("an attribute's name", path);
  for (const std::string_view part : split_at(path.text, ".", -1, false)) {
    int64_t index = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), index);
    const bool is_index = !part.empty() && part[0] != '-' && error == std::errc() && end == part.data() + part.size();
    SLUICE_TRY_ASSIGN(next, item_of(context, value, is_index ? Value::of(index) : Value::of(part)));
    value = next;
  }
  return value;
}

Result<Value> default_filter(Context&, std::string_view, const Value& subject, const Bound& args) {
  const bool replaced = subject.is(Kind::undefined) || (is_set(args[1]) && !truth(subject));
  if (!replaced) return subject;
  return args[0] != nullptr ? *args[0] : Value::of(std::string_view());
}

Result<Value> length_filter(Context& context, std::string_view name, const Value& subject, const Bound&) {
  switch (subject.kind) {
    case Kind::undefined: return Value::of(int64_t{0});
    case Kind::text: {
      SLUICE_TRY(context.spend_on(subject.text));
      return Value::of_size(count_characters(subject.text));
    }
    case Kind::dict: return Value::of_size(subject.dict->items.size());
    case Kind::list:
      if (!subject.list->lazy) return Value::of_size(subject.list->items.size());
      [[fallthrough]];
    default: return context.misfit(name, subject);
  }
}

Result<Value> join_filter(Context& context, std::string_view, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  std::string out;
  for (size_t i = 0; i < items->size(); ++i) {
    if (i > 0 && args[0] != nullptr) SLUICE_TRY(context.append(*args[0], out));
    Value item = (*items)[i];
    if (args[1] != nullptr && !args[1]->is(Kind::none)) {
      SLUICE_TRY_ASSIGN(part, at_path(context, item, *args[1]));
      item = part;
    }
    SLUICE_TRY(context.append(item, out));
  }
  return context.text(std::move(out));
}

// first and last.
Result<Value> end_filter(Context& context, std::string_view name, const Value& subject, const Bound&) {
  if (name == "last" && subject.is(Kind::list) && subject.list->lazy) return context.misfit(name, subject);
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  if (items->empty()) return Value::undefined(name);
  return name == "first" ? items->front() : items->back();
}

// A word begins behind white space or an opening bracket; Jinja's own rule, not str.title()'s.
std::string title_words(std::string_view text) {
  std::string out;
  bool starts = true;
  for (const std::string_view c : characters_of(text)) {
    out += starts ? to_upper(c) : to_lower(c);
    starts = c == "-" || c == "(" || c == "{" || c == "[" || c == "<" || strip(c, Side::both).empty();
  }
  return out;
}

// Filters that work on str(subject).
Result<Value> text_filter(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(text, context.to_text(subject));
  if (name == "string") return text;
  if (name == "title") {
    if (text.text.size() > context.arena.left() / sizeof(Value)) return context.lacking("a string of that length");
    return context.text(title_words(text.text));
  }
  Arguments passed;
  for (size_t i = 0; i < args.size() && args[i] != nullptr; ++i) {
    Value argument = *args[i];
    if (name == "replace" && i < 2) {
      SLUICE_TRY_ASSIGN(part, context.to_text(argument));
      argument = part;
    } else if (argument.is(Kind::none)) {
      break;
    }
    passed.positional.push_back(argument);
  }
  return call_method(context, text, name == "trim" ? "strip" : name, passed);
}

Result<Value> list_filter(Context& context, std::string_view, const Value& subject, const Bound&) {
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  return context.list(*items);
}

std::optional<double> parse_real(std::string_view text) {
  text = strip(text, Side::both);
  if (!text.empty() && text[0] == '+') text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

Result<Value> int_filter(Context& context, std::string_view, const Value& subject, const Bound& args) {
  const Value otherwise = args[0] != nullptr ? *args[0] : Value::of(int64_t{0});
  if (args[1] != nullptr) return context.lacking("int with a base");
  if (subject.is_integral()) return Value::of(subject.as_integer());
  std::optional<double> real;
  if (subject.is(Kind::real)) real = subject.real;
  if (subject.is(Kind::text)) {
    std::string_view digits = strip(subject.text, Side::both);
    if (digits.size() > 1 && digits[0] == '+' && digits[1] != '-') digits.remove_prefix(1);
    int64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (!digits.empty() && error == std::errc() && end == digits.data() + digits.size()) return Value::of(value);
    real = parse_real(subject.text);
  }
  if (subject.is(Kind::undefined)) return context.misfit("int", subject);
  if (!real || !std::isfinite(*real)) return otherwise;
  if (std::abs(*real) >= 9.2e18) return context.lacking("an integer beyond 64 bits");
  return Value::of(static_cast<int64_t>(*real));
}

Result<Value> float_filter(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  if (subject.is_number()) return Value::of(subject.as_real());
  if (subject.is(Kind::undefined)) return context.misfit(name, subject);
  if (subject.is(Kind::text)) {
    if (const auto value = parse_real(subject.text)) return Value::of(*value);
  }
  return args[0] != nullptr ? *args[0] : Value::of(0.0);
}

Result<Value> abs_filter(Context& context, std::string_view name, const Value& subject, const Bound&) {
  if (!subject.is_number()) return context.misfit(name, subject);
  if (subject.is(Kind::real)) return Value::of(std::abs(subject.real));
  return subject.as_integer() < 0 ? negate(context, subject) : Value::of(subject.as_integer());
}

Result<Value> items_filter(Context& context, std::string_view name, const Value& subject, const Bound&) {
  if (subject.is(Kind::undefined)) return context.list({}, false, true);
  if (!subject.is(Kind::dict)) return context.misfit(name, subject);
  SLUICE_TRY_ASSIGN(entries, call_method(context, subject, "items", {}));
  return context.list(entries.list->items, false, true);
}

Result<Value> json_filter(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  JsonStyle style;
  style.ascii = is_set(args[0]);
  style.sort_keys = is_set(args[3]);
  if (args[2] != nullptr && !args[2]->is(Kind::none)) return context.lacking("tojson with separators");
  if (args[1] != nullptr && !args[1]->is(Kind::none)) {
    SLUICE_TRY_ASSIGN(indent, integer_argument(context, name, args[1], -1));
    style.indent = std::clamp<int64_t>(indent, 0, 64);
    if (indent > 64) return context.lacking("tojson with an indent of {}", indent);
  }
  std::string out;
  SLUICE_TRY(append_json(context, subject, style, 0, out));
  return context.text(std::move(out));
}

Result<Value> indent_filter(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  std::string pad(4, ' ');
  if (args[0] != nullptr && args[0]->is(Kind::text)) {
    pad = args[0]->text;
  } else {
    SLUICE_TRY_ASSIGN(width, integer_argument(context, name, args[0], 4));
    if (width > 1024) return context.lacking("an indent of {}", width);
    pad.assign(static_cast<size_t>(std::max<int64_t>(width, 0)), ' ');
  }
  SLUICE_TRY_ASSIGN(text, text_argument(context, name, &subject, {}));
  std::string out;
  bool first = true;
  for (const std::string_view line : split_at(text, "\n", -1, false)) {
    if (!first) out += '\n';
    if (first ? is_set(args[1]) : (is_set(args[2]) || !line.empty())) out += pad;
    out += line;
    first = false;
    if (out.size() > context.limits.output_bytes) return context.lacking("a string of that length");
  }
  return context.text(std::move(out));
}

Result<Value> reverse_filter(Context& context, std::string_view, const Value& subject, const Bound&) {
  const Value minus_one = Value::of(int64_t{-1});
  if (subject.is(Kind::text)) return slice_of(context, subject, nullptr, nullptr, &minus_one);
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  return context.list({items->rbegin(), items->rend()}, false, true);
}

// sort, min, max, unique: what an item is compared by.
Result<std::vector<std::pair<Value, Value>>> keyed_items(Context& context, const Value& subject, const Value* attribute,
                                                         bool case_sensitive) {
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  std::vector<std::pair<Value, Value>> keyed;
  keyed.reserve(items->size());
  for (const Value& item : *items) {
    Value key = item;
    if (attribute != nullptr && !attribute->is(Kind::none)) {
      SLUICE_TRY_ASSIGN(part, at_path(context, item, *attribute));
      key = part;
    }
    if (!case_sensitive && key.is(Kind::text)) {
      SLUICE_TRY_ASSIGN(lower, context.text(to_lower(key.text)));
      key = lower;
    }
    keyed.emplace_back(key, item);
  }
  return keyed;
}

Result<Value> sort_filter(Context& context, std::string_view, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(keyed, keyed_items(context, subject, args[2], is_set(args[1])));
  const int sign = is_set(args[0]) ? -1 : 1;
  // Merge sort of our own: an order that fails midway must not reach std::sort.
  std::vector<std::pair<Value, Value>> merged(keyed.size());
  for (size_t width = 1; width < keyed.size(); width *= 2) {
    for (size_t begin = 0; begin < keyed.size(); begin += 2 * width) {
      const size_t middle = std::min(begin + width, keyed.size()), end = std::min(begin + 2 * width, keyed.size());
      size_t left = begin, right = middle;
      for (size_t out = begin; out < end; ++out) {
        bool take_right = left == middle;
        if (!take_right && right < end) {
          SLUICE_TRY_ASSIGN(order, context.order(keyed[right].first, keyed[left].first));
          take_right = sign * order < 0;
        }
        merged[out] = keyed[take_right ? right++ : left++];
      }
    }
    std::swap(keyed, merged);
  }
  std::vector<Value> items;
  for (const auto& [key, item] : keyed) items.push_back(item);
  return context.list(std::move(items));
}

// min and max.
Result<Value> extreme_filter(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(keyed, keyed_items(context, subject, args[1], is_set(args[0])));
  if (keyed.empty()) return Value::undefined(name);
  size_t best = 0;
  for (size_t i = 1; i < keyed.size(); ++i) {
    SLUICE_TRY_ASSIGN(order, context.order(keyed[i].first, keyed[best].first));
    if (name == "min" ? order < 0 : order > 0) best = i;
  }
  return keyed[best].second;
}

Result<Value> unique_filter(Context& context, std::string_view, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(keyed, keyed_items(context, subject, args[1], is_set(args[0])));
  std::vector<Value> keys, items;
  for (const auto& [key, item] : keyed) {
    bool seen = false;
    for (size_t i = 0; i < keys.size() && !seen; ++i) {
      SLUICE_TRY_ASSIGN(same, context.is_equal(keys[i], key));
      seen = same;
    }
    if (seen) continue;
    keys.push_back(key);
    items.push_back(item);
  }
  return context.list(std::move(items), false, true);
}

Result<Value> sum_filter(Context& context, std::string_view, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  Value total = args[1] != nullptr ? *args[1] : Value::of(int64_t{0});
  for (Value item : *items) {
    if (args[0] != nullptr && !args[0]->is(Kind::none)) {
      SLUICE_TRY_ASSIGN(part, at_path(context, item, *args[0]));
      item = part;
    }
    SLUICE_TRY_ASSIGN(more, apply_operator(context, Op::add, total, item));
    total = more;
  }
  return total;
}

Result<Value> same_filter(Context&, std::string_view, const Value& subject, const Bound&) { return subject; }

constexpr Filter kFilters[] = {
    {"default", {"default_value", "boolean"}, 0, default_filter},
    {"d", {"default_value", "boolean"}, 0, default_filter},
    {"length", {}, 0, length_filter},
    {"count", {}, 0, length_filter},
    {"join", {"d", "attribute"}, 0, join_filter},
    {"first", {}, 0, end_filter},
    {"last", {}, 0, end_filter},
    {"trim", {"chars"}, 0, text_filter},
    {"upper", {}, 0, text_filter},
    {"lower", {}, 0, text_filter},
    {"title", {}, 0, text_filter},
    {"capitalize", {}, 0, text_filter},
    {"string", {}, 0, text_filter},
    {"replace", {"old", "new", "count"}, 2, text_filter},
    {"list", {}, 0, list_filter},
    {"int", {"default", "base"}, 0, int_filter},
    {"float", {"default"}, 0, float_filter},
    {"abs", {}, 0, abs_filter},
    {"items", {}, 0, items_filter},
    {"tojson", {"ensure_ascii", "indent", "separators", "sort_keys"}, 0, json_filter},
    {"indent", {"width", "first", "blank"}, 0, indent_filter},
    {"reverse", {}, 0, reverse_filter},
    {"sort", {"reverse", "case_sensitive", "attribute"}, 0, sort_filter},
    {"min", {"case_sensitive", "attribute"}, 0, extreme_filter},
    {"max", {"case_sensitive", "attribute"}, 0, extreme_filter},
    {"unique", {"case_sensitive", "attribute"}, 0, unique_filter},
    {"sum", {"attribute", "start"}, 0, sum_filter},
    {"safe", {}, 0, same_filter},
};

Arguments without_first(const Arguments& args, size_t count) {
  Arguments rest = args;
  rest.positional.erase(rest.positional.begin(), rest.positional.begin() + static_cast<ptrdiff_t>(count));
  return rest;
}

// map(attribute=...), or map('filter', its arguments...).
Result<Value> map_filter(Context& context, const Value& subject, const Arguments& args) {
  if (!truth(subject)) return context.list({}, false, true);  // whatever its kind
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  std::vector<Value> mapped;
  if (args.positional.empty()) {
    // Named only: the positional parameters of bind() stand for "attribute" and "default".
    SLUICE_TRY_ASSIGN(bound, bind(context, "map", args, {"attribute", "default"}, 1));
    for (const Value& item : *items) {
      SLUICE_TRY_ASSIGN(part, at_path(context, item, *bound[0]));
      mapped.push_back(part.is(Kind::undefined) && bound[1] != nullptr ? *bound[1] : part);
    }
  } else {
    SLUICE_TRY_ASSIGN(name, text_argument(context, "map", &args.positional[0], {}));
    const Arguments rest = without_first(args, 1);
    for (const Value& item : *items) {
      SLUICE_TRY(context.spend(1 + rest.positional.size()));
      SLUICE_TRY_ASSIGN(part, apply_filter(context, name, item, rest));
      mapped.push_back(part);
    }
  }
  return context.list(std::move(mapped), false, true);
}

// select, reject, selectattr, rejectattr: the items that a test holds for, or does not.
Result<Value> select_filter(Context& context, std::string_view name, const Value& subject, const Arguments& args) {
  if (!truth(subject)) return context.list({}, false, true);
  const bool by_attribute = name == "selectattr" || name == "rejectattr";
  const bool wanted = name == "select" || name == "selectattr";
  const size_t before_test = by_attribute ? 1 : 0;
  if (args.positional.size() < before_test) return context.refuse("{}: the attribute's name is missing", name);
  const bool tests = args.positional.size() > before_test;
  std::string_view test;
  if (tests) {
    SLUICE_TRY_ASSIGN(test_name, text_argument(context, name, &args.positional[before_test], {}));
    test = test_name;
  }
  const Arguments rest = without_first(args, before_test + (tests ? 1 : 0));
  SLUICE_TRY_ASSIGN(items, context.items_of(subject));
  std::vector<Value> selected;
  for (const Value& item : *items) {
    Value tested = item;
    if (by_attribute) {
      SLUICE_TRY_ASSIGN(part, at_path(context, item, args.positional[0]));
      tested = part;
    }
    bool holds = truth(tested);
    if (tests) {
      SLUICE_TRY_ASSIGN(answer, apply_test(context, test, tested, rest));
      holds = answer;
    }
    SLUICE_TRY(context.spend(1));
    if (holds == wanted) selected.push_back(item);
  }
  return context.list(std::move(selected), false, true);
}

}  // namespace

Result<Value> apply_filter(Context& context, std::string_view name, const Value& subject, const Arguments& args) {
  const Deeper deeper(context);  // map('map', 'map', ...)
  SLUICE_TRY(deeper.check());
  if (name == "map") return map_filter(context, subject, args);
  if (name == "select" || name == "reject" || name == "selectattr" || name == "rejectattr") {
    return select_filter(context, name, subject, args);
  }
  const auto* filter = std::find_if(std::begin(kFilters), std::end(kFilters),
                                    [&](const Filter& candidate) { return candidate.name == name; });
  if (filter == std::end(kFilters)) return context.lacking("the filter '{}'", name);
  SLUICE_TRY_ASSIGN(bound, bind(context, name, args, filter->parameters, filter->required));
  return filter->apply(context, name, subject, bound);
}

}  // namespace sluice::model::jinja
