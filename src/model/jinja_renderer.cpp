// SPDX-License-Identifier: Apache-2.0
#include "model/jinja_renderer.hpp"

#include <algorithm>
#include <array>
#include <deque>

#include "model/jinja_builtins.hpp"

namespace sluice::model::jinja {

// Variables of one block; what is not here is in `outer`. Like everything that a value may point to, it lives as long
// as the rendering: a macro outlives the loop that it was defined in.
struct Scope {
  const Scope* outer = nullptr;
  std::vector<std::pair<std::string_view, Value>> variables;

  void set(std::string_view name, const Value& value) {
    for (auto& [known, old] : variables) {
      if (known == name) {
        old = value;
        return;
      }
    }
    variables.emplace_back(name, value);
  }
};

struct Macro {
  const Stmt* definition = nullptr;
  const Scope* scope = nullptr;  // around the definition
};

namespace {

enum class Flow : uint8_t { on, stop, next };

class Renderer {
 public:
  Renderer(const Program& program, Context& context) : program_(program), context_(context) {}

  Result<std::string> run(const std::vector<std::pair<std::string_view, Value>>& variables) {
    Scope& globals = scopes_.emplace_back();
    globals.variables = {{"range", Value::of(Function::range)},
                         {"namespace", Value::of(Function::make_namespace)},
                         {"dict", Value::of(Function::make_dict)},
                         {"raise_exception", Value::of(Function::raise_exception)},
                         {"strftime_now", Value::of(Function::strftime_now)}};
    for (const auto& [name, value] : variables) globals.set(name, value);
    SLUICE_TRY_ASSIGN(top, scope_in(globals));
    std::string out;
    SLUICE_TRY(execute(program_.body, *top, out));
    return out;
  }

 private:
  Result<Scope*> scope_in(const Scope& outer) {
    SLUICE_TRY(context_.spend(1));
    if (!context_.arena.charge(sizeof(Scope))) return context_.lacking("a template that needs this much memory");
    Scope& scope = scopes_.emplace_back();
    scope.outer = &outer;
    return &scope;
  }

  Result<Value> variable(std::string_view name, const Scope& scope) {
    uint64_t seen = 1;
    for (const Scope* at = &scope; at != nullptr; at = at->outer) {
      for (const auto& [known, value] : at->variables) {
        ++seen;
        if (known != name) continue;
        SLUICE_TRY(context_.spend(1 + seen / 16));
        return value;
      }
    }
    SLUICE_TRY(context_.spend(1 + seen / 16));
    if (name == "cycler" || name == "joiner" || name == "lipsum") return context_.lacking("the function '{}'", name);
    return Value::undefined(name);
  }

  Status define(Scope& scope, std::string_view name, const Value& value) {
    const size_t before = scope.variables.size();
    SLUICE_TRY(context_.spend(1 + before / 16));
    scope.set(name, value);
    if (scope.variables.size() != before && !context_.arena.charge(2 * sizeof(Value))) {
      return context_.lacking("a template that needs this much memory");
    }
    return {};
  }

  // ---- statements ----

  Result<Flow> execute(const Body& body, Scope& scope, std::string& out) {
    const Deeper deeper(context_);
    SLUICE_TRY(deeper.check());
    for (const Stmt* stmt : body) {
      context_.line = stmt->line;
      SLUICE_TRY(context_.spend(1));
      SLUICE_TRY_ASSIGN(flow, execute(*stmt, scope, out));
      if (flow != Flow::on) return flow;
    }
    return Flow::on;
  }

  Result<Flow> execute(const Stmt& stmt, Scope& scope, std::string& out) {
    switch (stmt.kind) {
      case StmtKind::text: SLUICE_TRY(context_.append(Value::of(stmt.text), out)); break;
      case StmtKind::print: {
        SLUICE_TRY_ASSIGN(value, evaluate(*stmt.value, scope));
        SLUICE_TRY(context_.append(value, out));
        break;
      }
      case StmtKind::condition:
        for (const Branch& branch : stmt.branches) {
          if (branch.condition != nullptr) {
            SLUICE_TRY_ASSIGN(condition, evaluate(*branch.condition, scope));
            if (!truth(condition)) continue;
          }
          return execute(branch.body, scope, out);
        }
        break;
      case StmtKind::loop: return loop(stmt, scope, out);
      case StmtKind::assign: {
        SLUICE_TRY_ASSIGN(value, evaluate(*stmt.value, scope));
        SLUICE_TRY(assign(stmt, value, scope));
        break;
      }
      case StmtKind::capture: {
        SLUICE_TRY_ASSIGN(inner, scope_in(scope));
        std::string captured;
        SLUICE_TRY(execute(stmt.body, *inner, captured));
        SLUICE_TRY_ASSIGN(value, context_.text(std::move(captured)));
        SLUICE_TRY(assign(stmt, value, scope));
        break;
      }
      case StmtKind::macro: {
        if (!context_.arena.charge(sizeof(Macro))) return context_.lacking("a template that needs this much memory");
        SLUICE_TRY(define(scope, stmt.names[0], Value::of(&macros_.emplace_back(Macro{&stmt, &scope}))));
        break;
      }
      case StmtKind::scope: {
        SLUICE_TRY_ASSIGN(inner, scope_in(scope));
        return execute(stmt.body, *inner, out);
      }
      case StmtKind::stop: return Flow::stop;
      case StmtKind::next: return Flow::next;
    }
    return Flow::on;
  }

  Status assign(const Stmt& stmt, const Value& value, Scope& scope) {
    if (!stmt.attribute.empty()) {
      SLUICE_TRY_ASSIGN(space, variable(stmt.names[0], scope));
      if (!space.is(Kind::space)) return context_.misfit("assignment to an attribute", space);
      return context_.set(*space.dict, Value::of(stmt.attribute), value);
    }
    if (!stmt.unpacks) return define(scope, stmt.names[0], value);
    SLUICE_TRY_ASSIGN(parts, context_.items_of(value));
    if (parts->size() != stmt.names.size()) {
      return context_.refuse("{} values for {} names", parts->size(), stmt.names.size());
    }
    for (size_t i = 0; i < parts->size(); ++i) SLUICE_TRY(define(scope, stmt.names[i], (*parts)[i]));
    return {};
  }

  // The items that a loop's filter keeps. As the filter runs before the loop does, it sees no `loop` of its own.
  Result<const std::vector<Value>*> filtered(const Stmt& stmt, const std::vector<Value>& items, const Scope& scope) {
    SLUICE_TRY_ASSIGN(inner, scope_in(scope));
    std::vector<Value> kept;
    for (const Value& item : items) {
      inner->variables.clear();
      SLUICE_TRY(assign(stmt, item, *inner));
      SLUICE_TRY_ASSIGN(keep, evaluate(*stmt.filter, *inner));
      if (truth(keep)) kept.push_back(item);
    }
    SLUICE_TRY_ASSIGN(list, context_.list(std::move(kept)));
    return &list.list->items;
  }

  Result<Flow> loop(const Stmt& stmt, Scope& scope, std::string& out) {
    SLUICE_TRY_ASSIGN(iterated, evaluate(*stmt.value, scope));
    SLUICE_TRY_ASSIGN(items, context_.items_of(iterated));
    if (stmt.filter != nullptr) {
      SLUICE_TRY_ASSIGN(kept, filtered(stmt, *items, scope));
      items = kept;
    }
    SLUICE_TRY_ASSIGN(inner, scope_in(scope));
    if (items->empty()) return execute(stmt.otherwise, *inner, out);
    if (!context_.arena.charge(sizeof(Loop))) return context_.lacking("a template that needs this much memory");
    Loop& state = loops_.emplace_back(Loop{items, 0});
    bool completed = false;  // some round came to its end; Jinja takes the else branch where none did
    for (; state.index < items->size(); ++state.index) {
      SLUICE_TRY(context_.spend(1));
      inner->variables.clear();  // each round begins anew
      SLUICE_TRY(define(*inner, "loop", Value::of(&state)));
      SLUICE_TRY(assign(stmt, (*items)[state.index], *inner));
      SLUICE_TRY_ASSIGN(flow, execute(stmt.body, *inner, out));
      if (flow == Flow::stop) break;
      completed = completed || flow == Flow::on;
    }
    // A `loop` that was kept stays at an item that is there.
    state.index = std::min(state.index, items->size() - 1);
    if (completed || stmt.otherwise.empty()) return Flow::on;
    SLUICE_TRY_ASSIGN(otherwise, scope_in(scope));
    return execute(stmt.otherwise, *otherwise, out);
  }

  // ---- expressions ----

  Result<Value> evaluate(const Expr& expr, const Scope& scope) {
    const Deeper deeper(context_);
    SLUICE_TRY(deeper.check());
    SLUICE_TRY(context_.spend(1));
    switch (expr.kind) {
      case ExprKind::constant: return expr.value;
      case ExprKind::name: return variable(expr.name, scope);
      case ExprKind::call: return call(expr, scope);
      case ExprKind::filter:
      case ExprKind::test: return filter_or_test(expr, scope);
      case ExprKind::compare: return comparison(expr, scope);
      case ExprKind::slice: return slice(expr, scope);
      case ExprKind::list:
      case ExprKind::tuple:
      case ExprKind::dict: return container(expr, scope);
      default: break;
    }
    SLUICE_TRY_ASSIGN(first, evaluate(*expr.args[0], scope));
    switch (expr.kind) {
      case ExprKind::attribute: return attribute_of(context_, first, expr.name);
      case ExprKind::index: {
        SLUICE_TRY_ASSIGN(key, evaluate(*expr.args[1], scope));
        return item_of(context_, first, key);
      }
      case ExprKind::binary: {
        SLUICE_TRY_ASSIGN(second, evaluate(*expr.args[1], scope));
        context_.line = expr.line;
        return apply_operator(context_, expr.ops[0], first, second);
      }
      case ExprKind::negative: return negate(context_, first);
      case ExprKind::positive:
        if (!first.is_number()) return context_.misfit("+", first);
        return first.is_integral() ? Value::of(first.as_integer()) : first;
      case ExprKind::logical_not: return Value::of(!truth(first));
      case ExprKind::logical_and: return truth(first) ? evaluate(*expr.args[1], scope) : Result<Value>(first);
      case ExprKind::logical_or: return truth(first) ? Result<Value>(first) : evaluate(*expr.args[1], scope);
      default:  // conditional
        if (truth(first)) return evaluate(*expr.args[1], scope);
        return expr.args[2] != nullptr ? evaluate(*expr.args[2], scope) : Value::undefined("a condition without else");
    }
  }

  Result<Value> slice(const Expr& expr, const Scope& scope) {
    std::array<Value, 4> parts;
    std::array<const Value*, 4> given = {};
    for (size_t i = 0; i < parts.size(); ++i) {
      if (expr.args[i] == nullptr) continue;
      SLUICE_TRY_ASSIGN(part, evaluate(*expr.args[i], scope));
      parts[i] = part;
      given[i] = &parts[i];
    }
    return slice_of(context_, parts[0], given[1], given[2], given[3]);
  }

  Result<Value> comparison(const Expr& expr, const Scope& scope) {
    SLUICE_TRY_ASSIGN(left, evaluate(*expr.args[0], scope));
    for (size_t i = 0; i < expr.ops.size(); ++i) {
      SLUICE_TRY_ASSIGN(right, evaluate(*expr.args[i + 1], scope));
      context_.line = expr.line;
      SLUICE_TRY_ASSIGN(holds, compare_with(context_, expr.ops[i], left, right));
      if (!holds) return Value::of(false);
      left = right;
    }
    return Value::of(true);
  }

  Result<Value> container(const Expr& expr, const Scope& scope) {
    std::vector<Value> items;
    items.reserve(expr.args.size());
    for (const Expr* arg : expr.args) {
      SLUICE_TRY_ASSIGN(item, evaluate(*arg, scope));
      items.push_back(item);
    }
    if (expr.kind != ExprKind::dict) return context_.list(std::move(items), expr.kind == ExprKind::tuple);
    std::vector<std::pair<Value, Value>> pairs;
    for (size_t i = 0; i + 1 < items.size(); i += 2) pairs.emplace_back(items[i], items[i + 1]);
    return context_.dict(std::move(pairs));
  }

  Result<Arguments> arguments(const Expr& expr, const Scope& scope) {
    Arguments args;
    for (size_t i = 1; i < expr.args.size(); ++i) {
      SLUICE_TRY_ASSIGN(value, evaluate(*expr.args[i], scope));
      args.positional.push_back(value);
    }
    for (const auto& [name, arg] : expr.named) {
      SLUICE_TRY_ASSIGN(value, evaluate(*arg, scope));
      args.named.emplace_back(name, value);
    }
    return args;
  }

  Result<Value> filter_or_test(const Expr& expr, const Scope& scope) {
    SLUICE_TRY_ASSIGN(subject, evaluate(*expr.args[0], scope));
    SLUICE_TRY_ASSIGN(args, arguments(expr, scope));
    context_.line = expr.line;
    if (expr.kind == ExprKind::filter) return apply_filter(context_, expr.name, subject, args);
    SLUICE_TRY_ASSIGN(holds, apply_test(context_, expr.name, subject, args));
    return Value::of(holds);
  }

  Result<Value> call(const Expr& expr, const Scope& scope) {
    const Expr& callee = *expr.args[0];
    if (callee.kind == ExprKind::attribute) return method_call(expr, callee, scope);
    SLUICE_TRY_ASSIGN(called, evaluate(callee, scope));
    return call_value(expr, called, scope);
  }

  Result<Value> call_value(const Expr& expr, const Value& called, const Scope& scope) {
    SLUICE_TRY_ASSIGN(args, arguments(expr, scope));
    context_.line = expr.line;
    if (called.is(Kind::function)) return call_function(context_, called.function, args);
    if (called.is(Kind::macro)) return call_macro(*called.macro, args);
    if (called.is(Kind::loop)) return context_.lacking("a recursive loop");
    return context_.misfit("call", called);
  }

  // object.name(...): a method, or what a mapping or namespace holds by that name.
  Result<Value> method_call(const Expr& expr, const Expr& callee, const Scope& scope) {
    SLUICE_TRY_ASSIGN(object, evaluate(*callee.args[0], scope));
    context_.line = expr.line;
    if (object.is(Kind::undefined)) return context_.misfit(fmt::format("method '{}'", callee.name), object);
    if (object.is(Kind::loop) && callee.name == "cycle") {
      SLUICE_TRY_ASSIGN(args, arguments(expr, scope));
      if (args.positional.empty()) return context_.refuse("cycle takes at least one argument");
      return args.positional[object.loop->index % args.positional.size()];
    }
    const bool holds_values = object.is(Kind::dict) || object.is(Kind::space);
    if (holds_values && !is_method(object, callee.name)) {
      SLUICE_TRY_ASSIGN(called, attribute_of(context_, object, callee.name));
      if (!called.is(Kind::undefined)) return call_value(expr, called, scope);
    }
    SLUICE_TRY_ASSIGN(args, arguments(expr, scope));
    return call_method(context_, object, callee.name, args);
  }

  Result<Value> call_macro(const Macro& macro, const Arguments& args) {
    const Stmt& definition = *macro.definition;
    const std::string_view name = definition.names[0];
    const size_t count = definition.defaults.size();
    if (args.positional.size() > count) {
      return context_.refuse("the macro '{}' takes {} arguments, {} were given", name, count, args.positional.size());
    }
    SLUICE_TRY_ASSIGN(scope, scope_in(*macro.scope));
    for (const auto& [given, value] : args.named) {
      const auto parameters = definition.names.begin() + 1;
      const auto slot = static_cast<size_t>(std::find(parameters, definition.names.end(), given) - parameters);
      if (slot >= count) return context_.refuse("the macro '{}' has no argument '{}'", name, given);
      if (slot < args.positional.size()) {
        return context_.refuse("the macro '{}': the argument '{}' is given twice", name, given);
      }
    }
    for (size_t i = 0; i < count; ++i) {
      const std::string_view parameter = definition.names[i + 1];
      const auto named = std::find_if(args.named.begin(), args.named.end(),
                                      [&](const auto& argument) { return argument.first == parameter; });
      Value value = Value::undefined(parameter);
      if (i < args.positional.size()) {
        value = args.positional[i];
      } else if (named != args.named.end()) {
        value = named->second;
      } else if (definition.defaults[i] != nullptr) {
        SLUICE_TRY_ASSIGN(fallback, evaluate(*definition.defaults[i], *scope));
        value = fallback;
      }
      SLUICE_TRY(define(*scope, parameter, value));
    }
    std::string out;
    SLUICE_TRY(execute(definition.body, *scope, out));
    return context_.text(std::move(out));
  }

  const Program& program_;
  Context& context_;
  std::deque<Scope> scopes_;
  std::deque<Loop> loops_;
  std::deque<Macro> macros_;
};

}  // namespace

Result<std::string> render(const Program& program, Context& context,
                           const std::vector<std::pair<std::string_view, Value>>& variables) {
  return Renderer(program, context).run(variables);
}

}  // namespace sluice::model::jinja
