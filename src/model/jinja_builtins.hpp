// SPDX-License-Identifier: Apache-2.0
// Operators, filters, tests, methods and functions of the template language, as Jinja 3.1 on Python has them. All
// return `usage` where Python would raise, and `unsupported` for what this subset lacks.
#pragma once

#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "model/jinja_context.hpp"
#include "model/jinja_program.hpp"
#include "model/jinja_value.hpp"

namespace sluice::model::jinja {

// What stands in the parentheses of a call.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string_view, Value>> named;
};

// Arguments by parameter; null where none was given.
using Bound = std::array<const Value*, 4>;
using Parameters = std::array<std::string_view, 4>;  // names, empty behind the last

// Puts `args` into the slots of `parameters`, of which the first `required` must be there. `what` is for messages.
Result<Bound> bind(const Context& context, std::string_view what, const Arguments& args, const Parameters& parameters,
                   size_t required);
Result<int64_t> integer_argument(const Context& context, std::string_view what, const Value* value, int64_t otherwise);
Result<std::string_view> text_argument(const Context& context, std::string_view what, const Value* value,
                                       std::string_view otherwise);

Result<Value> apply_operator(Context& context, Op op, const Value& left, const Value& right);
Result<bool> compare_with(Context& context, Op op, const Value& left, const Value& right);
Result<Value> negate(const Context& context, const Value& value);

// value.name and value[key]; undefined where there is none.
Result<Value> attribute_of(Context& context, const Value& value, std::string_view name);
Result<Value> item_of(Context& context, const Value& value, const Value& key);
// value[begin:end:step], null or none where left out.
Result<Value> slice_of(Context& context, const Value& value, const Value* begin, const Value* end, const Value* step);

Result<Value> apply_filter(Context& context, std::string_view name, const Value& subject, const Arguments& args);
Result<bool> apply_test(Context& context, std::string_view name, const Value& subject, const Arguments& args);
bool is_method(const Value& subject, std::string_view name);
Result<Value> call_method(Context& context, const Value& subject, std::string_view name, const Arguments& args);
Result<Value> call_function(Context& context, Function function, const Arguments& args);

// json.dumps(value, ensure_ascii=False, ...); `indent` < 0: on one line.
struct JsonStyle {
  int64_t indent = -1;
  bool ascii = false;
  bool sort_keys = false;
};
Status append_json(Context& context, const Value& value, const JsonStyle& style, int level, std::string& out);

}  // namespace sluice::model::jinja
