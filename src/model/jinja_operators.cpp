// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "model/jinja_builtins.hpp"
#include "model/jinja_text.hpp"

namespace sluice::model::jinja {
namespace {

std::string_view spelling(Op op) {
  switch (op) {
    case Op::add: return "+";
    case Op::subtract: return "-";
    case Op::multiply: return "*";
    case Op::divide: return "/";
    case Op::floor_divide: return "//";
    case Op::modulo: return "%";
    case Op::power: return "**";
    default: return "~";
  }
}

Result<Value> integer_power(const Context& context, int64_t base, int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) return context.refuse("0 to a negative power");
    return Value::of(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  int64_t result = 1;
  for (bool overflow = false; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0) overflow = __builtin_mul_overflow(result, base, &result);
    if (exponent > 1) overflow = __builtin_mul_overflow(base, base, &base) || overflow;
    if (overflow) return context.lacking("an integer beyond 64 bits");
  }
  return Value::of(result);
}

Result<Value> integer_operator(const Context& context, Op op, int64_t a, int64_t b) {
  int64_t result = 0;
  bool overflow = false;
  switch (op) {
    case Op::add: overflow = __builtin_add_overflow(a, b, &result); break;
    case Op::subtract: overflow = __builtin_sub_overflow(a, b, &result); break;
    case Op::multiply: overflow = __builtin_mul_overflow(a, b, &result); break;
    case Op::power: return integer_power(context, a, b);
    case Op::divide:
      if (b == 0) return context.refuse("division by zero");
      return Value::of(static_cast<double>(a) / static_cast<double>(b));
    default:  // floor_divide and modulo round to minus infinity
      if (b == 0) return context.refuse("division by zero");
      if (b == -1) {
        if (op == Op::modulo) return Value::of(int64_t{0});
        overflow = __builtin_sub_overflow(int64_t{0}, a, &result);
        break;
      }
      const bool down = a % b != 0 && (a < 0) != (b < 0);
      result = op == Op::modulo ? a % b + (down ? b : 0) : a / b - (down ? 1 : 0);
  }
  if (overflow) return context.lacking("an integer beyond 64 bits");
  return Value::of(result);
}

Result<Value> real_operator(const Context& context, Op op, double a, double b) {
  switch (op) {
    case Op::add: return Value::of(a + b);
    case Op::subtract: return Value::of(a - b);
    case Op::multiply: return Value::of(a * b);
    case Op::power: {
      const double result = std::pow(a, b);
      if (std::isfinite(a) && std::isfinite(b) && !std::isfinite(result)) return context.refuse("a power overflows");
      return Value::of(result);
    }
    default: break;
  }
  if (b == 0) return context.refuse("division by zero");
  if (op == Op::divide) return Value::of(a / b);
  double remainder = std::fmod(a, b);
  if (remainder != 0 && (remainder < 0) != (b < 0)) remainder += b;
  if (op == Op::modulo) return Value::of(remainder == 0 ? std::copysign(0.0, b) : remainder);
  const double quotient = (a - remainder) / b;
  const double floored = std::floor(quotient);
  return Value::of(quotient - floored > 0.5 ? floored + 1 : floored);
}

Result<Value> repeat(Context& context, const Value& value, int64_t count) {
  const auto times = static_cast<uint64_t>(std::max<int64_t>(count, 0));
  const uint64_t bytes = value.is(Kind::text) ? value.text.size() : value.list->items.size() * sizeof(Value);
  if (bytes != 0 && times > context.arena.left() / bytes) return context.lacking("a repetition {} times", count);
  if (value.is(Kind::text)) {
    std::string out;
    if (bytes != 0) out.reserve(bytes * times);
    for (uint64_t i = 0; bytes != 0 && i < times; ++i) out += value.text;
    return context.text(std::move(out));
  }
  std::vector<Value> items;
  for (uint64_t i = 0; bytes != 0 && i < times; ++i) {
    items.insert(items.end(), value.list->items.begin(), value.list->items.end());
  }
  return context.list(std::move(items), value.list->tuple);
}

bool is_sequence(const Value& value) { return value.is(Kind::text) || (value.is(Kind::list) && !value.list->lazy); }

Result<bool> contains(Context& context, const Value& container, const Value& item) {
  switch (container.kind) {
    case Kind::text:
      if (!item.is(Kind::text)) return context.misfit("'in' a string", item);
      SLUICE_TRY(context.spend_on(container.text));
      return find(container.text, item.text) != std::string_view::npos;
    case Kind::list:
      for (const Value& candidate : container.list->items) {
        SLUICE_TRY_ASSIGN(same, context.is_equal(candidate, item));
        if (same) return true;
      }
      return false;
    case Kind::dict:
      if (item.is(Kind::list) || item.is(Kind::dict)) return context.misfit("'in' a mapping", item);
      SLUICE_TRY(context.spend(1 + container.dict->items.size()));
      return container.dict->find(item) != nullptr;
    case Kind::undefined: return false;
    default: return context.misfit("'in'", container);
  }
}

// Where Python's slice begins and ends, and how many it takes.
struct SliceRange {
  int64_t begin = 0, step = 1;
  size_t count = 0;
};

Result<SliceRange> slice_range(const Context& context, int64_t size, const Value* begin, const Value* end,
                               const Value* step) {
  const auto part = [&](const Value* value, int64_t otherwise) -> Result<int64_t> {
    if (value == nullptr || value->is(Kind::none)) return otherwise;
    if (!value->is_integral()) return context.misfit("a slice", *value);
    return value->as_integer();
  };
  SliceRange range;
  SLUICE_TRY_ASSIGN(by, part(step, 1));
  if (by == 0) return context.refuse("a slice with step 0");
  range.step = std::max(by, -std::numeric_limits<int64_t>::max());
  // Counted from the end where negative, then brought to what a walk can begin or stop at.
  const auto place = [&](int64_t at) {
    if (at < 0) at += size;
    return range.step > 0 ? std::clamp<int64_t>(at, 0, size) : std::clamp<int64_t>(at, -1, size - 1);
  };
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();  // clamped to what there is
  SLUICE_TRY_ASSIGN(from, part(begin, range.step > 0 ? 0 : kFar));
  SLUICE_TRY_ASSIGN(to, part(end, range.step > 0 ? kFar : -kFar));
  range.begin = place(from);
  const int64_t stop = place(to);
  const int64_t distance = range.step > 0 ? stop - range.begin : range.begin - stop;
  const int64_t stride = std::abs(range.step);
  range.count = distance > 0 ? static_cast<size_t>((distance - 1) / stride + 1) : 0;
  return range;
}

Value loop_attribute(const Loop& loop, std::string_view name) {
  const size_t count = loop.items->size();
  if (name == "index") return Value::of_size(loop.index + 1);
  if (name == "index0") return Value::of_size(loop.index);
  if (name == "revindex") return Value::of_size(count - loop.index);
  if (name == "revindex0") return Value::of_size(count - loop.index - 1);
  if (name == "first") return Value::of(loop.index == 0);
  if (name == "last") return Value::of(loop.index + 1 == count);
  if (name == "length") return Value::of_size(count);
  if (name == "depth") return Value::of(int64_t{1});  // only recursive loops go deeper
  if (name == "depth0") return Value::of(int64_t{0});
  if (name == "previtem" && loop.index > 0) return (*loop.items)[loop.index - 1];
  if (name == "nextitem" && loop.index + 1 < count) return (*loop.items)[loop.index + 1];
  return Value::undefined(name);
}

}  // namespace

Result<Value> apply_operator(Context& context, Op op, const Value& left, const Value& right) {
  if (op == Op::concatenate) {
    std::string out;
    SLUICE_TRY(context.append(left, out));
    SLUICE_TRY(context.append(right, out));
    return context.text(std::move(out));
  }
  if (left.is_number() && right.is_number()) {
    return left.is_integral() && right.is_integral()
               ? integer_operator(context, op, left.as_integer(), right.as_integer())
               : real_operator(context, op, left.as_real(), right.as_real());
  }
  if (op == Op::add && left.is(Kind::text) && right.is(Kind::text)) {
    if (left.text.size() > context.arena.left() || right.text.size() > context.arena.left()) {
      return context.lacking("a string of that length");
    }
    std::string out;
    out.reserve(left.text.size() + right.text.size());
    out.append(left.text).append(right.text);
    return context.text(std::move(out));
  }
  if (op == Op::add && left.is(Kind::list) && right.is(Kind::list) && is_sequence(left) && is_sequence(right) &&
      left.list->tuple == right.list->tuple) {
    std::vector<Value> items = left.list->items;
    items.insert(items.end(), right.list->items.begin(), right.list->items.end());
    return context.list(std::move(items), left.list->tuple);
  }
  if (op == Op::multiply && is_sequence(left) && right.is_integral()) return repeat(context, left, right.as_integer());
  if (op == Op::multiply && is_sequence(right) && left.is_integral()) return repeat(context, right, left.as_integer());
  if (op == Op::modulo && left.is(Kind::text)) return context.lacking("formatting with %");
  if (left.is(Kind::undefined)) return context.misfit(spelling(op), left);
  if (right.is(Kind::undefined)) return context.misfit(spelling(op), right);
  return context.refuse("{} between {} and {}", spelling(op), describe(left), describe(right));
}

Result<bool> compare_with(Context& context, Op op, const Value& left, const Value& right) {
  if (op == Op::equal || op == Op::not_equal) {
    SLUICE_TRY_ASSIGN(same, context.is_equal(left, right));
    return same == (op == Op::equal);
  }
  if (op == Op::contained || op == Op::not_contained) {
    SLUICE_TRY_ASSIGN(inside, contains(context, right, left));
    return inside == (op == Op::contained);
  }
  SLUICE_TRY_ASSIGN(order, context.order(left, right));
  const auto is_nan = [](const Value& value) { return value.is(Kind::real) && std::isnan(value.real); };
  if (is_nan(left) || is_nan(right)) return false;
  switch (op) {
    case Op::less: return order < 0;
    case Op::less_or_equal: return order <= 0;
    case Op::greater: return order > 0;
    default: return order >= 0;
  }
}

Result<Value> negate(const Context& context, const Value& value) {
  if (value.is(Kind::real)) return Value::of(-value.real);
  if (!value.is_integral()) return context.misfit("-", value);
  return integer_operator(context, Op::subtract, 0, value.as_integer());
}

Result<Value> attribute_of(Context& context, const Value& value, std::string_view name) {
  switch (value.kind) {
    case Kind::undefined: return context.misfit(fmt::format("attribute '{}'", name), value);
    case Kind::loop: return loop_attribute(*value.loop, name);
    case Kind::dict:
    case Kind::space:
      SLUICE_TRY(context.spend(1 + value.dict->items.size()));
      if (value.is(Kind::dict) && is_method(value, name)) break;
      if (const Value* found = value.dict->find(name); found != nullptr) return *found;
      return Value::undefined(name);
    case Kind::macro:
    case Kind::function: return context.lacking("an attribute of {}", describe(value));
    default: break;
  }
  if (is_method(value, name)) return context.lacking("the method '{}' without a call", name);
  return Value::undefined(name);
}

Result<Value> item_of(Context& context, const Value& value, const Value& key) {
  const std::string_view name = key.is(Kind::text) ? key.text : std::string_view("item");
  if (value.is(Kind::undefined)) return context.misfit("subscript", value);
  if (value.is(Kind::dict)) {
    SLUICE_TRY(context.spend(1 + value.dict->items.size()));
    if (const Value* found = value.dict->find(key); found != nullptr) return *found;
  }
  if (key.is(Kind::text)) return attribute_of(context, value, key.text);
  if (!is_sequence(value) || !key.is_integral()) return Value::undefined(name);
  if (value.is(Kind::text)) SLUICE_TRY(context.spend_on(value.text));
  const size_t size = value.is(Kind::text) ? count_characters(value.text) : value.list->items.size();
  int64_t at = key.as_integer();
  if (at < 0) at += static_cast<int64_t>(size);
  if (at < 0 || at >= static_cast<int64_t>(size)) return Value::undefined(name);
  if (value.is(Kind::list)) return value.list->items[static_cast<size_t>(at)];
  return Value::of(character_at(value.text, static_cast<size_t>(at)));
}

Result<Value> slice_of(Context& context, const Value& value, const Value* begin, const Value* end, const Value* step) {
  if (!is_sequence(value)) return context.misfit("slice", value);
  if (value.is(Kind::text)) {
    SLUICE_TRY_ASSIGN(characters, context.items_of(value));
    SLUICE_TRY_ASSIGN(range, slice_range(context, static_cast<int64_t>(characters->size()), begin, end, step));
    std::string out;
    for (size_t i = 0; i < range.count; ++i) {
      out += (*characters)[static_cast<size_t>(range.begin + static_cast<int64_t>(i) * range.step)].text;
    }
    return context.text(std::move(out));
  }
  const std::vector<Value>& all = value.list->items;
  SLUICE_TRY_ASSIGN(range, slice_range(context, static_cast<int64_t>(all.size()), begin, end, step));
  std::vector<Value> items;
  items.reserve(range.count);
  for (size_t i = 0; i < range.count; ++i) {
    items.push_back(all[static_cast<size_t>(range.begin + static_cast<int64_t>(i) * range.step)]);
  }
  return context.list(std::move(items), value.list->tuple);
}

}  // namespace sluice::model::jinja
