// SPDX-License-Identifier: Apache-2.0
#include "model/jinja_context.hpp"

#include "model/jinja_text.hpp"

namespace sluice::model::jinja {

Unexpected Context::exhausted() const {
  return at_line(ErrorCode::unsupported,
                 fmt::format("the template takes more than {} steps or {} bytes to render, which is not supported",
                             limits.steps, limits.arena_bytes));
}

Unexpected Context::misfit(std::string_view operation, const Value& value) const {
  if (value.is(Kind::undefined)) {
    return refuse("{}: '{}' is undefined", operation, value.text.empty() ? "a value" : value.text);
  }
  return refuse("{}: not for {}", operation, describe(value));
}

Result<Value> Context::text(std::string value) {
  SLUICE_TRY(spend_on(value));
  const Value made = arena.text(std::move(value));
  if (arena.full()) return exhausted();
  return made;
}

Result<Value> Context::list(std::vector<Value> items, bool tuple, bool lazy) {
  SLUICE_TRY(spend(1 + items.size()));
  List* made = arena.list();
  if (!arena.charge(items.size() * sizeof(Value))) return exhausted();
  made->items = std::move(items);
  made->tuple = tuple;
  made->lazy = lazy;
  return Value::of(made);
}

Result<Value> Context::dict(std::vector<std::pair<Value, Value>> items, bool space) {
  Dict* made = arena.dict();
  for (const auto& [key, value] : items) SLUICE_TRY(set(*made, key, value));
  if (arena.full()) return exhausted();
  return space ? Value::space(made) : Value::of(made);
}

Status Context::set(Dict& dict, const Value& key, const Value& value) {
  if (!key.is_number() && !key.is(Kind::text) && !key.is(Kind::none)) {
    return lacking("{} as a key", describe(key));
  }
  SLUICE_TRY(spend(1 + dict.items.size()));
  const size_t before = dict.items.size();
  dict.set(key, value);
  if (dict.items.size() != before && !arena.charge(2 * sizeof(Value))) return exhausted();
  return {};
}

Result<bool> Context::is_equal(const Value& a, const Value& b) {
  const bool answer = equal(a, b, effort_);
  if (effort_.steps == 0) return exhausted();
  return answer;
}

Result<int> Context::order(const Value& a, const Value& b) {
  const std::optional<int> answer = compare(a, b, effort_);
  if (effort_.steps == 0) return exhausted();
  if (answer) return *answer;
  if (a.is(Kind::undefined)) return misfit("comparison", a);
  if (b.is(Kind::undefined)) return misfit("comparison", b);
  return refuse("{} and {} have no order", describe(a), describe(b));
}

Result<Value> Context::to_text(const Value& value) {
  if (value.is(Kind::text)) return value;
  std::string out;
  SLUICE_TRY(append(value, out));
  return text(std::move(out));
}

Status Context::append(const Value& value, std::string& out) {
  const size_t before = out.size();
  if (value.text.size() > limits.output_bytes) return exhausted();
  append_text(value, false, limits.output_bytes, out);
  if (out.size() > limits.output_bytes) {
    return lacking("an output of more than {} bytes", limits.output_bytes);
  }
  return spend(1 + (out.size() - before) / 64);
}

Result<const std::vector<Value>*> Context::items_of(const Value& value) {
  std::vector<Value> items;
  switch (value.kind) {
    case Kind::list: return &value.list->items;
    case Kind::undefined: break;
    case Kind::dict:
      for (const auto& [key, item] : value.dict->items) items.push_back(key);
      break;
    case Kind::text:
      // Asked before the list is built: it takes forty times the text.
      if (value.text.size() > arena.left() / sizeof(Value)) return exhausted();
      for (const std::string_view c : characters_of(value.text)) items.push_back(Value::of(c));
      break;
    default: return misfit("iteration", value);
  }
  SLUICE_TRY_ASSIGN(made, list(std::move(items)));
  return &made.list->items;
}

}  // namespace sluice::model::jinja
