// SPDX-License-Identifier: Apache-2.0
// Methods of strings, mappings and lists, and the functions. Only what leaves its object as it is: the renderers of
// chat templates run them in an immutable sandbox.
#include <algorithm>
#include <array>
#include <ctime>

#include "model/jinja_builtins.hpp"
#include "model/jinja_text.hpp"

namespace sluice::model::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;  // as Jinja's sandbox

struct Method {
  std::string_view name;
  Parameters parameters;
  size_t required;
  Result<Value> (*call)(Context& context, std::string_view name, const Value& subject, const Bound& args);
};

// Searching backwards compares anew at every byte.
Status spend_on_search(Context& context, std::string_view text, std::string_view part, bool backwards) {
  const uint64_t passes = backwards ? 1 + part.size() / 8 : 1;
  return context.spend(1 + text.size() / 64 * passes);
}

Result<Value> list_of(Context& context, const std::vector<std::string_view>& parts) {
  std::vector<Value> items;
  items.reserve(parts.size());
  for (const std::string_view part : parts) items.push_back(Value::of(part));
  return context.list(std::move(items));
}

// Room for `count` parts that are about to be made.
Status check_room(const Context& context, size_t count) {
  if (count > context.arena.left() / sizeof(Value)) return context.lacking("a list of {} items", count);
  return {};
}

Result<Value> strip_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  const Side side = name == "strip" ? Side::both : name == "lstrip" ? Side::left : Side::right;
  if (args[0] == nullptr || args[0]->is(Kind::none)) {
    SLUICE_TRY(context.spend_on(subject.text));
    return Value::of(strip(subject.text, side));
  }
  SLUICE_TRY_ASSIGN(chars, text_argument(context, name, args[0], {}));
  SLUICE_TRY(spend_on_search(context, subject.text, chars, true));
  return Value::of(strip(subject.text, side, chars));
}

Result<Value> split_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  const bool from_right = name == "rsplit";
  SLUICE_TRY_ASSIGN(max_splits, integer_argument(context, name, args[1], -1));
  SLUICE_TRY(check_room(context, subject.text.size() + 1));
  if (args[0] == nullptr || args[0]->is(Kind::none)) {
    if (from_right && max_splits >= 0) return context.lacking("rsplit at white space with a limit");
    SLUICE_TRY(context.spend_on(subject.text));
    return list_of(context, split_at_space(subject.text, max_splits));
  }
  SLUICE_TRY_ASSIGN(separator, text_argument(context, name, args[0], {}));
  if (separator.empty()) return context.refuse("{}: an empty separator", name);
  SLUICE_TRY(spend_on_search(context, subject.text, separator, from_right));
  return list_of(context, split_at(subject.text, separator, max_splits, from_right));
}

bool has_end(std::string_view text, std::string_view part, bool at_start) {
  if (part.size() > text.size()) return false;
  return (at_start ? text.substr(0, part.size()) : text.substr(text.size() - part.size())) == part;
}

Result<Value> ends_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  const bool at_start = name == "startswith";
  if (!args[0]->is(Kind::list) || !args[0]->list->tuple) {
    SLUICE_TRY_ASSIGN(part, text_argument(context, name, args[0], {}));
    SLUICE_TRY(context.spend_on(part));
    return Value::of(has_end(subject.text, part, at_start));
  }
  for (const Value& item : args[0]->list->items) {
    SLUICE_TRY_ASSIGN(part, text_argument(context, name, &item, {}));
    SLUICE_TRY(context.spend_on(part));
    if (has_end(subject.text, part, at_start)) return Value::of(true);
  }
  return Value::of(false);
}

Result<Value> remove_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  const bool at_start = name == "removeprefix";
  SLUICE_TRY_ASSIGN(part, text_argument(context, name, args[0], {}));
  if (!has_end(subject.text, part, at_start)) return subject;
  return Value::of(at_start ? subject.text.substr(part.size())
                            : subject.text.substr(0, subject.text.size() - part.size()));
}

Result<Value> replace_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(from, text_argument(context, name, args[0], {}));
  SLUICE_TRY_ASSIGN(to, text_argument(context, name, args[1], {}));
  SLUICE_TRY_ASSIGN(count, integer_argument(context, name, args[2], -1));
  SLUICE_TRY(context.spend_on(subject.text));
  std::string out;
  if (!replace(subject.text, from, to, count, context.arena.left(), out)) {
    return context.lacking("a string of more than {} bytes", context.arena.left());
  }
  return context.text(std::move(out));
}

Result<Value> case_method(Context& context, std::string_view name, const Value& subject, const Bound&) {
  if (subject.text.size() > context.arena.left()) return context.lacking("a string of that length");
  if (name == "upper") return context.text(to_upper(subject.text));
  if (name == "lower") return context.text(to_lower(subject.text));
  return context.text(name == "title" ? to_title(subject.text) : to_capitalized(subject.text));
}

Result<Value> find_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(part, text_argument(context, name, args[0], {}));
  const bool backwards = name == "rfind";
  SLUICE_TRY(spend_on_search(context, subject.text, part, backwards));
  const size_t at = backwards ? subject.text.rfind(part) : find(subject.text, part);
  if (at != std::string_view::npos) return Value::of_size(count_characters(subject.text.substr(0, at)));
  if (name == "index") return context.refuse("index: the substring is not there");
  return Value::of(int64_t{-1});
}

Result<Value> count_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(part, text_argument(context, name, args[0], {}));
  SLUICE_TRY(context.spend_on(subject.text));
  if (part.empty()) return Value::of_size(count_characters(subject.text) + 1);
  size_t count = 0;
  std::string_view rest = subject.text;
  for (size_t at; (at = find(rest, part)) != std::string_view::npos; ++count) rest.remove_prefix(at + part.size());
  return Value::of_size(count);
}

Result<Value> join_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  SLUICE_TRY_ASSIGN(items, context.items_of(*args[0]));
  std::string out;
  for (size_t i = 0; i < items->size(); ++i) {
    const Value& item = (*items)[i];
    if (!item.is(Kind::text)) return context.misfit(name, item);
    if (i > 0) SLUICE_TRY(context.append(subject, out));
    SLUICE_TRY(context.append(item, out));
  }
  return context.text(std::move(out));
}

Result<Value> lines_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  const bool keep_ends = args[0] != nullptr && truth(*args[0]);
  (void)name;
  SLUICE_TRY(check_room(context, subject.text.size()));
  std::vector<std::string_view> lines;
  std::string_view rest = subject.text;
  while (!rest.empty()) {
    const size_t end = rest.find_first_of("\n\r\v\f\x1c\x1d\x1e");
    if (end == std::string_view::npos) {
      lines.push_back(rest);
      break;
    }
    const size_t mark = rest.substr(end, 2) == "\r\n" ? 2 : 1;
    lines.push_back(rest.substr(0, end + (keep_ends ? mark : 0)));
    rest.remove_prefix(end + mark);
  }
  return list_of(context, lines);
}

Result<Value> digit_method(Context& context, std::string_view, const Value& subject, const Bound&) {
  SLUICE_TRY(context.spend_on(subject.text));
  return Value::of(!subject.text.empty() && std::all_of(subject.text.begin(), subject.text.end(),
                                                        [](char c) { return c >= '0' && c <= '9'; }));
}

constexpr Method kTextMethods[] = {
    {"strip", {"chars"}, 0, strip_method},
    {"lstrip", {"chars"}, 0, strip_method},
    {"rstrip", {"chars"}, 0, strip_method},
    {"split", {"sep", "maxsplit"}, 0, split_method},
    {"rsplit", {"sep", "maxsplit"}, 0, split_method},
    {"splitlines", {"keepends"}, 0, lines_method},
    {"startswith", {"prefix"}, 1, ends_method},
    {"endswith", {"suffix"}, 1, ends_method},
    {"removeprefix", {"prefix"}, 1, remove_method},
    {"removesuffix", {"suffix"}, 1, remove_method},
    {"replace", {"old", "new", "count"}, 2, replace_method},
    {"upper", {}, 0, case_method},
    {"lower", {}, 0, case_method},
    {"title", {}, 0, case_method},
    {"capitalize", {}, 0, case_method},
    {"find", {"sub"}, 1, find_method},
    {"rfind", {"sub"}, 1, find_method},
    {"index", {"sub"}, 1, find_method},
    {"count", {"sub"}, 1, count_method},
    {"join", {"iterable"}, 1, join_method},
    {"isdigit", {}, 0, digit_method},
};

// items(), keys(), values() as lists.
Result<Value> entries_method(Context& context, std::string_view name, const Value& subject, const Bound&) {
  std::vector<Value> entries;
  for (const auto& [key, value] : subject.dict->items) {
    if (name == "keys") {
      entries.push_back(key);
    } else if (name == "values") {
      entries.push_back(value);
    } else {
      SLUICE_TRY_ASSIGN(pair, context.list({key, value}, true));
      entries.push_back(pair);
    }
  }
  return context.list(std::move(entries));
}

Result<Value> get_method(Context& context, std::string_view, const Value& subject, const Bound& args) {
  SLUICE_TRY(context.spend(1 + subject.dict->items.size()));
  if (const Value* found = subject.dict->find(*args[0]); found != nullptr) return *found;
  return args[1] != nullptr ? *args[1] : Value::none();
}

Result<Value> copy_method(Context& context, std::string_view, const Value& subject, const Bound&) {
  return context.dict(subject.dict->items);
}

constexpr Method kDictMethods[] = {
    {"items", {}, 0, entries_method},
    {"keys", {}, 0, entries_method},
    {"values", {}, 0, entries_method},
    {"get", {"key", "default"}, 1, get_method},
    {"copy", {}, 0, copy_method},
};

// index() and count().
Result<Value> search_method(Context& context, std::string_view name, const Value& subject, const Bound& args) {
  size_t count = 0;
  const auto& items = subject.list->items;
  for (size_t i = 0; i < items.size(); ++i) {
    SLUICE_TRY_ASSIGN(same, context.is_equal(items[i], *args[0]));
    if (same && name == "index") return Value::of_size(i);
    count += same ? 1 : 0;
  }
  if (name == "index") return context.refuse("index: the value is not in the list");
  return Value::of_size(count);
}

constexpr Method kListMethods[] = {
    {"index", {"value"}, 1, search_method},
    {"count", {"value"}, 1, search_method},
};

const Method* find_method_of(const Value& subject, std::string_view name) {
  const auto in = [&](const auto& table) -> const Method* {
    const auto* found = std::find_if(std::begin(table), std::end(table),
                                     [&](const Method& method) { return method.name == name; });
    return found == std::end(table) ? nullptr : found;
  };
  if (subject.is(Kind::text)) return in(kTextMethods);
  if (subject.is(Kind::dict)) return in(kDictMethods);
  if (subject.is(Kind::list) && !subject.list->lazy) return in(kListMethods);
  return nullptr;
}

Result<Value> make_range(Context& context, const Arguments& args) {
  if (!args.named.empty() || args.positional.empty() || args.positional.size() > 3) {
    return context.refuse("range takes one to three integers");
  }
  std::array<int64_t, 3> parts = {0, 0, 1};
  for (size_t i = 0; i < args.positional.size(); ++i) {
    SLUICE_TRY_ASSIGN(part, integer_argument(context, "range", &args.positional[i], 0));
    parts[args.positional.size() == 1 ? 1 : i] = part;
  }
  const auto [begin, end, step] = parts;
  if (step == 0) return context.refuse("range: a step of 0");
  const bool up = step > 0;
  std::vector<Value> items;
  for (int64_t at = begin; up ? at < end : at > end;) {
    if (static_cast<int64_t>(items.size()) == kMaxRange) return context.refuse("range: more than {} items", kMaxRange);
    items.push_back(Value::of(at));
    if (__builtin_add_overflow(at, step, &at)) break;
  }
  return context.list(std::move(items));
}

// dict(...) and namespace(...).
Result<Value> make_mapping(Context& context, const Arguments& args, bool space) {
  std::vector<std::pair<Value, Value>> items;
  if (args.positional.size() > 1) return context.refuse("a mapping is made of one mapping and named values");
  if (!args.positional.empty()) {
    const Value& first = args.positional[0];
    if (!first.is(Kind::dict)) return context.lacking("a mapping made of {}", describe(first));
    items = first.dict->items;
  }
  for (const auto& [name, value] : args.named) items.emplace_back(Value::of(name), value);
  return context.dict(std::move(items), space);
}

Result<Value> format_time(Context& context, const Arguments& args) {
  SLUICE_TRY_ASSIGN(bound, bind(context, "strftime_now", args, {"format"}, 1));
  SLUICE_TRY_ASSIGN(format, text_argument(context, "strftime_now", bound[0], {}));
  if (format.empty()) return Value::of(std::string_view());
  std::array<char, 512> buffer{};
  const size_t bytes = std::strftime(buffer.data(), buffer.size(), std::string(format).c_str(), &context.now);
  if (bytes == 0) return context.lacking("a time of more than {} bytes", buffer.size() - 1);
  return context.text(std::string(buffer.data(), bytes));
}

}  // namespace

Result<Bound> bind(const Context& context, std::string_view what, const Arguments& args, const Parameters& parameters,
                   size_t required) {
  Bound bound = {};
  const auto count = static_cast<size_t>(std::find(parameters.begin(), parameters.end(), "") - parameters.begin());
  if (args.positional.size() > count) {
    return context.refuse("{} takes at most {} arguments, {} were given", what, count, args.positional.size());
  }
  for (size_t i = 0; i < args.positional.size(); ++i) bound[i] = &args.positional[i];
  for (const auto& [name, value] : args.named) {
    const auto slot = static_cast<size_t>(std::find(parameters.begin(), parameters.end(), name) - parameters.begin());
    if (slot >= count) return context.refuse("{} has no argument '{}'", what, name);
    if (bound[slot] != nullptr) return context.refuse("{}: the argument '{}' is given twice", what, name);
    bound[slot] = &value;
  }
  for (size_t i = 0; i < required; ++i) {
    if (bound[i] == nullptr) return context.refuse("{}: the argument '{}' is missing", what, parameters[i]);
  }
  return bound;
}

Result<int64_t> integer_argument(const Context& context, std::string_view what, const Value* value, int64_t otherwise) {
  if (value == nullptr) return otherwise;
  if (!value->is_integral()) return context.misfit(what, *value);
  return value->as_integer();
}

Result<std::string_view> text_argument(const Context& context, std::string_view what, const Value* value,
                                       std::string_view otherwise) {
  if (value == nullptr) return otherwise;
  if (!value->is(Kind::text)) return context.misfit(what, *value);
  return value->text;
}

bool is_method(const Value& subject, std::string_view name) { return find_method_of(subject, name) != nullptr; }

Result<Value> call_method(Context& context, const Value& subject, std::string_view name, const Arguments& args) {
  const Method* method = find_method_of(subject, name);
  const bool has_methods = subject.is(Kind::text) || subject.is(Kind::list) || subject.is(Kind::dict);
  if (method == nullptr && !has_methods) return context.misfit(fmt::format("method '{}'", name), subject);
  if (method == nullptr) return context.lacking("the method '{}' of {}", name, describe(subject));
  SLUICE_TRY_ASSIGN(bound, bind(context, name, args, method->parameters, method->required));
  return method->call(context, name, subject, bound);
}

Result<Value> call_function(Context& context, Function function, const Arguments& args) {
  switch (function) {
    case Function::range: return make_range(context, args);
    case Function::make_namespace: return make_mapping(context, args, true);
    case Function::make_dict: return make_mapping(context, args, false);
    case Function::strftime_now: return format_time(context, args);
    case Function::raise_exception: {
      SLUICE_TRY_ASSIGN(bound, bind(context, "raise_exception", args, {"message"}, 1));
      SLUICE_TRY_ASSIGN(message, context.to_text(*bound[0]));
      return context.refuse("the template refuses these messages: {}", message.text);
    }
  }
  return Value();
}

}  // namespace sluice::model::jinja
