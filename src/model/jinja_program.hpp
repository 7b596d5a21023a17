// SPDX-License-Identifier: Apache-2.0
// A parsed template: statements over expressions. Everything in it is immutable once parse() has returned.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/jinja_value.hpp"
#include "sluice/result.hpp"

namespace sluice::model::jinja {

enum class ExprKind : uint8_t {
  constant,     // value
  name,         // name
  attribute,    // args[0].name
  index,        // args[0][args[1]]
  slice,        // args[0][args[1]:args[2]:args[3]], null where left out
  call,         // args[0](args[1]..., named...)
  filter,       // args[0] | name(args[1]..., named...)
  test,         // args[0] is name(args[1]..., named...)
  binary,       // args[0] ops[0] args[1]
  compare,      // args[0] ops[0] args[1] ops[1] args[2] ...
  negative,     // -args[0]
  positive,     // +args[0]
  logical_not,  // not args[0]
  logical_and,  // args[0] and args[1]
  logical_or,   // args[0] or args[1]
  conditional,  // args[1] if args[0] else args[2], which is null where left out
  list,         // [args...]
  tuple,        // (args...)
  dict,         // {args[0]: args[1], args[2]: args[3], ...}
};

enum class Op : uint8_t {
  add, subtract, multiply, divide, floor_divide, modulo, power, concatenate,                    // binary
  equal, not_equal, less, less_or_equal, greater, greater_or_equal, contained, not_contained,  // compare
};

struct Expr {
  ExprKind kind = ExprKind::constant;
  uint32_t line = 0;
  Value value;
  std::string_view name;
  std::vector<Op> ops;
  std::vector<const Expr*> args;
  std::vector<std::pair<std::string_view, const Expr*>> named;
};

enum class StmtKind : uint8_t {
  text,       // text
  print,      // {{ value }}
  condition,  // branches, whose last may have no condition
  loop,       // for target in value if filter: body, else otherwise
  assign,     // set target = value
  capture,    // set target: body
  macro,      // macro names[0](names[1] = defaults[1], ...): body; null where there is no default
  scope,      // generation: body in a scope of its own
  stop,       // break
  next,       // continue
};

struct Stmt;
using Body = std::vector<const Stmt*>;

struct Branch {
  const Expr* condition = nullptr;
  Body body;
};

struct Stmt {
  StmtKind kind = StmtKind::text;
  uint32_t line = 0;
  std::string_view text;
  std::vector<std::string_view> names;  // of a target, several unpack; of a macro
  std::string_view attribute;           // the target is names[0].attribute
  bool unpacks = false;                 // a target with a comma
  const Expr* value = nullptr;
  const Expr* filter = nullptr;
  std::vector<const Expr*> defaults;
  std::vector<Branch> branches;
  Body body;
  Body otherwise;
};

// Owns the tree and the texts that it points to; stays where it is.
struct Program {
  std::string source;
  std::deque<std::string> texts;
  std::deque<Expr> exprs;
  std::deque<Stmt> stmts;
  Body body;

  Program() = default;
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
};

// Parses `source` into `program`, which must be new, as Jinja 3.1 with trim_blocks and lstrip_blocks reads it. What
// is no template is `corrupt`; what this subset lacks, or what is larger or nested deeper than it allows, is
// `unsupported`, with construct and line.
Status parse(std::string source, Program& program);

}  // namespace sluice::model::jinja
