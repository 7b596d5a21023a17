// SPDX-License-Identifier: Apache-2.0
// What one rendering may use up, and what operators, filters, tests and methods need of it.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <ctime>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/jinja_value.hpp"
#include "sluice/result.hpp"

namespace sluice::model::jinja {

// A template may come from anywhere: it ends within these, whatever it says. The longest real template takes some 100
// steps a message and copies each message about five times.
struct Limits {
  uint64_t steps = 20'000'000;             // expressions, statements and 64 bytes of text looked at; about a second
  size_t arena_bytes = size_t{256} << 20;  // texts and containers made on the way
  size_t output_bytes = size_t{64} << 20;
  int depth = 200;  // of expressions in expressions and macros in macros
};

// The state of one rendering; one thread.
class Context {
 public:
  Context(const Limits& allowed, const std::tm& date)
      : limits(allowed), now(date), arena(allowed.arena_bytes), effort_{allowed.steps} {}

  // Takes `cost` steps; `unsupported` once there are no more.
  Status spend(uint64_t cost) {
    if (!effort_.spend(cost)) return exhausted();
    return {};
  }
  Status spend_on(std::string_view text) { return spend(1 + text.size() / 64); }
  Result<Value> text(std::string value);
  Result<Value> list(std::vector<Value> items, bool tuple = false, bool lazy = false);
  Result<Value> dict(std::vector<std::pair<Value, Value>> items, bool space = false);
  Status set(Dict& dict, const Value& key, const Value& value);
  Result<bool> is_equal(const Value& a, const Value& b);
  // < 0, 0 or > 0; an error where the two have no order.
  Result<int> order(const Value& a, const Value& b);
  // str(value); borrowed where it is a text.
  Result<Value> to_text(const Value& value);
  // Appends str(value) to `out`, which then holds at most the largest output.
  Status append(const Value& value, std::string& out);
  // What a for statement goes through: items, keys, characters.
  Result<const std::vector<Value>*> items_of(const Value& value);

  // The template and these messages do not go together: `usage`.
  template <class... Args>
  Unexpected refuse(fmt::format_string<Args...> format, Args&&... args) const {
    return at_line(ErrorCode::usage, fmt::format(format, std::forward<Args>(args)...));
  }
  template <class... Args>
  Unexpected lacking(fmt::format_string<Args...> format, Args&&... args) const {
    return at_line(ErrorCode::unsupported, fmt::format(format, std::forward<Args>(args)...) + " is not supported");
  }
  // For an operation that needs another kind of value: names the variable if `value` is undefined.
  Unexpected misfit(std::string_view operation, const Value& value) const;

  const Limits limits;
  const std::tm now;
  Arena arena;
  uint32_t line = 0;  // of the statement or call at work
  int depth = 0;

 private:
  Unexpected exhausted() const;
  Unexpected at_line(ErrorCode code, std::string_view message) const {
    return fail(code, fmt::format("chat template, line {}: {}", line, message));
  }

  Effort effort_;
};

// Counts one level of `context.depth` for as long as it lives.
class Deeper {
 public:
  explicit Deeper(Context& context) : context_(context) { ++context_.depth; }
  ~Deeper() { --context_.depth; }
  Deeper(const Deeper&) = delete;
  Deeper& operator=(const Deeper&) = delete;
  Status check() const {
    const int allowed = context_.limits.depth;
    if (context_.depth > allowed) return context_.lacking("nesting deeper than {}", allowed);
    return {};
  }

 private:
  Context& context_;
};

}  // namespace sluice::model::jinja
