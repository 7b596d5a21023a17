// SPDX-License-Identifier: Apache-2.0
// Values of the template language. They follow Python: truth, equality, order, str() and repr().
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sluice::model::jinja {

struct List;
struct Dict;
struct Macro;
struct Loop;

// What kinds a value has. `space` is a namespace(): a Dict that assignments change.
enum class Kind : uint8_t { undefined, none, boolean, integer, real, text, list, dict, space, macro, function, loop };

// Globals that can be called.
enum class Function : uint8_t { range, make_namespace, make_dict, raise_exception, strftime_now };

// A value. Texts and containers are borrowed: from the template, the context, or the Arena of the rendering.
struct Value {
  Kind kind = Kind::undefined;
  union {
    bool boolean;
    int64_t integer;
    double real;
    const List* list;
    Dict* dict;
    const Macro* macro;
    Function function;
    const Loop* loop;
  };
  std::string_view text;  // of a text; of undefined: what was looked up, for messages

  Value() : integer(0) {}
  static Value undefined(std::string_view name) { return make(Kind::undefined, name); }
  static Value none() { return make(Kind::none); }
  static Value of(bool value) { Value v = make(Kind::boolean); v.boolean = value; return v; }
  static Value of(int64_t value) { Value v = make(Kind::integer); v.integer = value; return v; }
  static Value of(double value) { Value v = make(Kind::real); v.real = value; return v; }
  static Value of(const char* value) { return of(std::string_view(value)); }  // which would rather become a bool
  static Value of(std::string_view value) { return make(Kind::text, value); }
  static Value of(const List* value) { Value v = make(Kind::list); v.list = value; return v; }
  static Value of(Dict* value) { Value v = make(Kind::dict); v.dict = value; return v; }
  static Value of(const Macro* value) { Value v = make(Kind::macro); v.macro = value; return v; }
  static Value of(const Loop* value) { Value v = make(Kind::loop); v.loop = value; return v; }
  static Value of(Function value) { Value v = make(Kind::function); v.function = value; return v; }
  static Value of_size(size_t value) { return of(static_cast<int64_t>(value)); }
  static Value space(Dict* value) { Value v = make(Kind::space); v.dict = value; return v; }

  bool is(Kind wanted) const { return kind == wanted; }
  bool is_number() const { return kind == Kind::integer || kind == Kind::real || kind == Kind::boolean; }
  bool is_integral() const { return kind == Kind::integer || kind == Kind::boolean; }
  int64_t as_integer() const { return kind == Kind::boolean ? int64_t{boolean} : integer; }
  double as_real() const { return kind == Kind::real ? real : static_cast<double>(as_integer()); }

 private:
  static Value make(Kind kind, std::string_view text = {}) {
    Value v;
    v.kind = kind;
    v.text = text;
    return v;
  }
};

struct List {
  std::vector<Value> items;
  bool tuple = false;  // prints in parentheses
  bool lazy = false;   // a generator, from map, select and the like: always true, with neither length nor index
};

// Keys in the order in which they came; looked up by walking, as these are small. Keys are texts, numbers or none.
struct Dict {
  std::vector<std::pair<Value, Value>> items;
  const Value* find(const Value& key) const;
  const Value* find(std::string_view key) const;
  void set(const Value& key, const Value& value);
};

// The `loop` variable of one for statement.
struct Loop {
  const std::vector<Value>* items = nullptr;
  size_t index = 0;
};

// Owns what a rendering makes. Everything dies with it; nothing before. `full` once more than the budget was asked for:
// the renderer then stops with an error.
class Arena {
 public:
  explicit Arena(size_t budget_bytes) : budget_bytes_(budget_bytes) {}
  Value text(std::string text);
  List* list();
  Dict* dict();
  // Counts bytes that containers take; false once the budget is spent.
  bool charge(size_t bytes);
  bool full() const { return full_; }
  size_t left() const { return full_ ? 0 : budget_bytes_ - used_bytes_; }

 private:
  size_t budget_bytes_;
  size_t used_bytes_ = 0;
  bool full_ = false;
  std::deque<std::string> texts_;
  std::deque<List> lists_;
  std::deque<Dict> dicts_;
};

// What comparisons may cost. Containers can share their items, so that few bytes describe a walk without end.
struct Effort {
  uint64_t steps;         // left; 0 once the comparison was given up, whose answer then means nothing
  int depth = 0;          // of the container in containers that is being looked at

  // False, with no steps left, where there are fewer than `cost`.
  bool spend(uint64_t cost) {
    const bool enough = steps > cost;
    steps = enough ? steps - cost : 0;
    return enough;
  }
};

bool truth(const Value& value);
bool equal(const Value& a, const Value& b, Effort& effort);
// < 0, 0 or > 0; nothing where Python would raise TypeError.
std::optional<int> compare(const Value& a, const Value& b, Effort& effort);
// Appends str(value), or repr(value) when `quoted`. Stops adding once `out` passes `max_bytes`.
void append_text(const Value& value, bool quoted, size_t max_bytes, std::string& out, int depth = 0);
// "a string", "a list": for messages.
std::string_view describe(const Value& value);

}  // namespace sluice::model::jinja
