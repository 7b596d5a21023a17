// SPDX-License-Identifier: Apache-2.0
// Recursive descent with Jinja's own precedences: conditional, or, and, not, comparison, + -, ~, * / // %, **, unary,
// postfix, filter.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <initializer_list>
#include <optional>
#include <utility>

#include "model/jinja_lexer.hpp"
#include "model/jinja_program.hpp"
#include "model/utf8.hpp"

namespace sluice::model::jinja {
namespace {

constexpr size_t kMaxSourceBytes = 1 << 20;
constexpr int kMaxNesting = 64;  // of tags in tags plus brackets in brackets; real templates stay under 12

using ExprResult = Result<const Expr*>;
using Words = std::initializer_list<std::string_view>;

class Parser {
 public:
  Parser(const std::vector<Token>& tokens, Program& program) : tokens_(tokens), program_(program) {}

  Status run() {
    SLUICE_TRY(body({}, program_.body));
    if (token().kind != TokenKind::end) return unexpected();
    return {};
  }

 private:
  // Counts one level of recursion for as long as it lives.
  struct Level {
    explicit Level(int& counter) : depth(counter) { ++depth; }
    ~Level() { --depth; }
    Level(const Level&) = delete;
    int& depth;
  };

  const Token& token() const { return tokens_[at_]; }
  const Token& following() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  void next() { at_ = std::min(at_ + 1, tokens_.size() - 1); }
  bool at_op(std::string_view op) const { return token().kind == TokenKind::op && token().text == op; }
  bool at_word(std::string_view word) const { return token().kind == TokenKind::name && token().text == word; }
  bool at_any(Words words) const {
    return std::any_of(words.begin(), words.end(), [&](std::string_view word) { return at_word(word); });
  }
  bool skip_op(std::string_view op) {
    if (!at_op(op)) return false;
    next();
    return true;
  }
  bool skip_word(std::string_view word) {
    if (!at_word(word)) return false;
    next();
    return true;
  }

  Unexpected broken(std::string_view what) const {
    return fail(ErrorCode::corrupt, fmt::format("chat template, line {}: {}", token().line, what));
  }
  Unexpected lacking(std::string_view what) const {
    return fail(ErrorCode::unsupported, fmt::format("chat template, line {}: {} is not supported", token().line, what));
  }
  Unexpected unexpected() const {
    switch (token().kind) {
      case TokenKind::end: return broken("the template ends too early");
      case TokenKind::print_end:
      case TokenKind::block_end: return broken("the tag ends too early");
      default: return broken(fmt::format("unexpected '{}'", token().text));
    }
  }
  Status expect_op(std::string_view op) {
    if (!skip_op(op)) return unexpected();
    return {};
  }
  Status expect(TokenKind kind) {
    if (token().kind != kind) return unexpected();
    next();
    return {};
  }
  Result<std::string_view> expect_name() {
    if (token().kind != TokenKind::name) return unexpected();
    const std::string_view name = token().text;
    next();
    return name;
  }
  Status check_nesting() const {
    if (depth_ > kMaxNesting) return lacking(fmt::format("nesting deeper than {}", kMaxNesting));
    return {};
  }

  Expr& make(ExprKind kind) {
    Expr& expr = program_.exprs.emplace_back();
    expr.kind = kind;
    expr.line = token().line;
    return expr;
  }
  const Expr* make(ExprKind kind, std::vector<const Expr*> args) {
    Expr& expr = make(kind);
    expr.args = std::move(args);
    return &expr;
  }
  const Expr* make(Op op, const Expr* left, const Expr* right) {
    Expr& expr = make(ExprKind::binary);
    expr.ops = {op};
    expr.args = {left, right};
    return &expr;
  }
  const Expr* constant(const Value& value) {
    Expr& expr = make(ExprKind::constant);
    expr.value = value;
    return &expr;
  }
  Stmt& make(StmtKind kind) {
    Stmt& stmt = program_.stmts.emplace_back();
    stmt.kind = kind;
    stmt.line = token().line;
    return stmt;
  }

  // ---- statements ----

  // Statements up to a tag that begins with one of `ends`, which is left to the caller with `{%` passed, or to the end.
  Status body(Words ends, Body& out) {
    const Level level(depth_);
    SLUICE_TRY(check_nesting());
    while (token().kind != TokenKind::end) {
      if (token().kind == TokenKind::data) {
        Stmt& stmt = make(StmtKind::text);
        stmt.text = token().text;
        next();
        out.push_back(&stmt);
      } else if (token().kind == TokenKind::print_begin) {
        next();
        Stmt& stmt = make(StmtKind::print);
        SLUICE_TRY_ASSIGN(value, tuple(true));
        stmt.value = value;
        SLUICE_TRY(expect(TokenKind::print_end));
        out.push_back(&stmt);
      } else {
        SLUICE_TRY(expect(TokenKind::block_begin));
        if (at_any(ends)) return {};
        SLUICE_TRY(statement(out));
      }
    }
    if (ends.size() != 0) return broken(fmt::format("the template ends where '{}' is due", *(ends.end() - 1)));
    return {};
  }

  // The tag's word was seen at the end of a body: passes it and the tag's end.
  Status end_tag() {
    next();
    return expect(TokenKind::block_end);
  }

  Status statement(Body& out) {
    if (token().kind != TokenKind::name) return unexpected();
    const std::string_view word = token().text;
    if (word == "if") return condition(out);
    if (word == "for") return loop(out);
    if (word == "set") return assign(out);
    if (word == "macro") return macro(out);
    if (word == "generation") {
      Stmt& stmt = make(StmtKind::scope);
      SLUICE_TRY(end_tag());
      SLUICE_TRY(body({"endgeneration"}, stmt.body));
      out.push_back(&stmt);
      return end_tag();
    }
    if (word == "break" || word == "continue") {
      if (loops_ == 0) return broken(fmt::format("'{}' outside of a loop", word));
      out.push_back(&make(word == "break" ? StmtKind::stop : StmtKind::next));
      return end_tag();
    }
    for (const std::string_view known : {"block", "extends", "include", "import", "from", "call", "filter", "with",
                                         "autoescape", "do", "trans", "debug"}) {
      if (word == known) return lacking(fmt::format("the tag '{}'", word));
    }
    return broken(fmt::format("unknown tag '{}'", word));
  }

  Status condition(Body& out) {
    Stmt& stmt = make(StmtKind::condition);
    do {
      next();
      Branch branch;
      SLUICE_TRY_ASSIGN(test, tuple(false));
      branch.condition = test;
      SLUICE_TRY(expect(TokenKind::block_end));
      SLUICE_TRY(body({"elif", "else", "endif"}, branch.body));
      stmt.branches.push_back(std::move(branch));
    } while (at_word("elif"));
    if (at_word("else")) {
      SLUICE_TRY(end_tag());
      Branch branch;
      SLUICE_TRY(body({"endif"}, branch.body));
      stmt.branches.push_back(std::move(branch));
    }
    out.push_back(&stmt);
    return end_tag();
  }

  // name, or name, name...; with `attributes` also name.name.
  Status target(Stmt& stmt, bool attributes) {
    const bool parenthesis = skip_op("(");
    do {
      if (!stmt.names.empty() && token().kind != TokenKind::name) break;  // a comma at the end
      if (at_op("(")) return lacking("a nested target");
      SLUICE_TRY_ASSIGN(name, expect_name());
      if (is_constant(name) || is_reserved(name)) return broken(fmt::format("'{}' cannot be assigned to", name));
      stmt.names.push_back(name);
      if (at_op(".") && attributes && stmt.names.size() == 1 && !parenthesis) {
        next();
        SLUICE_TRY_ASSIGN(attribute, expect_name());
        stmt.attribute = attribute;
        if (at_op(",")) return lacking("an attribute among several targets");
        return {};
      }
      if (at_op(",")) stmt.unpacks = true;
    } while (skip_op(","));
    if (parenthesis) SLUICE_TRY(expect_op(")"));
    return {};
  }

  Status loop(Body& out) {
    Stmt& stmt = make(StmtKind::loop);
    next();
    SLUICE_TRY(target(stmt, false));
    if (!skip_word("in")) return unexpected();
    SLUICE_TRY_ASSIGN(items, tuple(false));
    stmt.value = items;
    if (skip_word("if")) {
      SLUICE_TRY_ASSIGN(filter, expression());
      stmt.filter = filter;
    }
    if (at_word("recursive")) return lacking("a recursive loop");
    SLUICE_TRY(expect(TokenKind::block_end));
    ++loops_;
    SLUICE_TRY(body({"else", "endfor"}, stmt.body));
    --loops_;
    if (at_word("else")) {
      SLUICE_TRY(end_tag());
      SLUICE_TRY(body({"endfor"}, stmt.otherwise));
    }
    out.push_back(&stmt);
    return end_tag();
  }

  Status assign(Body& out) {
    Stmt& stmt = make(StmtKind::assign);
    next();
    SLUICE_TRY(target(stmt, true));
    if (skip_op("=")) {
      SLUICE_TRY_ASSIGN(value, tuple(true));
      stmt.value = value;
      out.push_back(&stmt);
      return expect(TokenKind::block_end);
    }
    if (at_op("|")) return lacking("a filter on a set block");
    if (stmt.unpacks) return lacking("a set block with several targets");
    stmt.kind = StmtKind::capture;
    SLUICE_TRY(expect(TokenKind::block_end));
    SLUICE_TRY(body({"endset"}, stmt.body));
    out.push_back(&stmt);
    return end_tag();
  }

  Status macro(Body& out) {
    Stmt& stmt = make(StmtKind::macro);
    next();
    SLUICE_TRY_ASSIGN(name, expect_name());
    stmt.names.push_back(name);
    SLUICE_TRY(expect_op("("));
    while (!at_op(")")) {
      SLUICE_TRY_ASSIGN(parameter, expect_name());
      if (std::find(stmt.names.begin() + 1, stmt.names.end(), parameter) != stmt.names.end()) {
        return broken(fmt::format("two parameters are named '{}'", parameter));
      }
      stmt.names.push_back(parameter);
      stmt.defaults.push_back(nullptr);
      if (skip_op("=")) {
        SLUICE_TRY_ASSIGN(value, expression());
        stmt.defaults.back() = value;
      } else if (stmt.defaults.size() > 1 && stmt.defaults[stmt.defaults.size() - 2] != nullptr) {
        return broken("a parameter without default behind one with");
      }
      if (!at_op(")")) SLUICE_TRY(expect_op(","));
    }
    next();
    SLUICE_TRY(expect(TokenKind::block_end));
    const int loops = std::exchange(loops_, 0);
    SLUICE_TRY(body({"endmacro"}, stmt.body));
    loops_ = loops;
    out.push_back(&stmt);
    return end_tag();
  }

  // ---- expressions ----

  static bool is_constant(std::string_view name) {
    for (const std::string_view word : {"true", "True", "false", "False", "none", "None"}) {
      if (name == word) return true;
    }
    return false;
  }
  static bool is_reserved(std::string_view name) {
    for (const std::string_view word : {"and", "or", "not", "in", "is", "if", "else", "loop"}) {
      if (name == word) return true;
    }
    return false;
  }

  // An expression, or several with commas, which are a tuple.
  ExprResult tuple(bool conditional_too) {
    SLUICE_TRY_ASSIGN(first, conditional_too ? expression() : logical_or());
    if (!at_op(",")) return first;
    std::vector<const Expr*> items = {first};
    while (skip_op(",")) {
      if (at_tuple_end()) break;
      SLUICE_TRY_ASSIGN(item, conditional_too ? expression() : logical_or());
      items.push_back(item);
    }
    return make(ExprKind::tuple, std::move(items));
  }

  bool at_tuple_end() const {
    return token().kind == TokenKind::print_end || token().kind == TokenKind::block_end || at_op(")") || at_word("if");
  }

  ExprResult expression() {
    const Level level(depth_);
    SLUICE_TRY(check_nesting());
    SLUICE_TRY_ASSIGN(value, logical_or());
    while (skip_word("if")) {
      SLUICE_TRY_ASSIGN(condition, logical_or());
      const Expr* otherwise = nullptr;
      if (skip_word("else")) {
        SLUICE_TRY_ASSIGN(other, expression());
        otherwise = other;
      }
      value = make(ExprKind::conditional, {condition, value, otherwise});
    }
    return value;
  }

  ExprResult logical_or() {
    SLUICE_TRY_ASSIGN(left, logical_and());
    while (skip_word("or")) {
      SLUICE_TRY_ASSIGN(right, logical_and());
      left = make(ExprKind::logical_or, {left, right});
    }
    return left;
  }

  ExprResult logical_and() {
    SLUICE_TRY_ASSIGN(left, logical_not());
    while (skip_word("and")) {
      SLUICE_TRY_ASSIGN(right, logical_not());
      left = make(ExprKind::logical_and, {left, right});
    }
    return left;
  }

  ExprResult logical_not() {
    if (!skip_word("not")) return comparison();
    const Level level(depth_);
    SLUICE_TRY(check_nesting());
    SLUICE_TRY_ASSIGN(value, logical_not());
    return make(ExprKind::logical_not, {value});
  }

  std::optional<Op> comparison_op() {
    constexpr std::array<std::pair<std::string_view, Op>, 6> kOps = {{{"==", Op::equal},
                                                                      {"!=", Op::not_equal},
                                                                      {"<", Op::less},
                                                                      {"<=", Op::less_or_equal},
                                                                      {">", Op::greater},
                                                                      {">=", Op::greater_or_equal}}};
    for (const auto& [text, op] : kOps) {
      if (skip_op(text)) return op;
    }
    if (skip_word("in")) return Op::contained;
    if (at_word("not") && following().kind == TokenKind::name && following().text == "in") {
      next();
      next();
      return Op::not_contained;
    }
    return std::nullopt;
  }

  ExprResult comparison() {
    SLUICE_TRY_ASSIGN(first, sum());
    std::vector<Op> ops;
    std::vector<const Expr*> args = {first};
    while (const auto op = comparison_op()) {
      SLUICE_TRY_ASSIGN(operand, sum());
      ops.push_back(*op);
      args.push_back(operand);
    }
    if (ops.empty()) return first;
    Expr& expr = make(ExprKind::compare);
    expr.ops = std::move(ops);
    expr.args = std::move(args);
    return &expr;
  }

  ExprResult sum() {
    SLUICE_TRY_ASSIGN(left, concatenation());
    while (at_op("+") || at_op("-")) {
      const Op op = at_op("+") ? Op::add : Op::subtract;
      next();
      SLUICE_TRY_ASSIGN(right, concatenation());
      left = make(op, left, right);
    }
    return left;
  }

  ExprResult concatenation() {
    SLUICE_TRY_ASSIGN(left, product());
    while (skip_op("~")) {
      SLUICE_TRY_ASSIGN(right, product());
      left = make(Op::concatenate, left, right);
    }
    return left;
  }

  ExprResult product() {
    SLUICE_TRY_ASSIGN(left, power());
    while (true) {
      const bool multiplies = at_op("*"), divides = at_op("/"), floors = at_op("//"), remains = at_op("%");
      if (!multiplies && !divides && !floors && !remains) return left;
      next();
      SLUICE_TRY_ASSIGN(right, power());
      const Op op = multiplies ? Op::multiply : divides ? Op::divide : floors ? Op::floor_divide : Op::modulo;
      left = make(op, left, right);
    }
  }

  ExprResult power() {
    SLUICE_TRY_ASSIGN(left, unary(true));
    while (skip_op("**")) {
      SLUICE_TRY_ASSIGN(right, unary(true));
      left = make(Op::power, left, right);
    }
    return left;
  }

  ExprResult unary(bool filters_too) {
    const Expr* value = nullptr;
    if (at_op("-") || at_op("+")) {
      const Level level(depth_);
      SLUICE_TRY(check_nesting());
      const ExprKind kind = at_op("-") ? ExprKind::negative : ExprKind::positive;
      next();
      SLUICE_TRY_ASSIGN(operand, unary(false));
      value = make(kind, {operand});
    } else {
      SLUICE_TRY_ASSIGN(operand, primary());
      value = operand;
    }
    SLUICE_TRY_ASSIGN(whole, postfix(value));
    return filters_too ? filters(whole) : ExprResult(whole);
  }

  ExprResult primary() {
    const Token first = token();
    switch (first.kind) {
      case TokenKind::name: {
        next();
        if (first.text == "true" || first.text == "True") return constant(Value::of(true));
        if (first.text == "false" || first.text == "False") return constant(Value::of(false));
        if (first.text == "none" || first.text == "None") return constant(Value::none());
        Expr& expr = make(ExprKind::name);
        expr.line = first.line;
        expr.name = first.text;
        return &expr;
      }
      case TokenKind::text: return text_constant();
      case TokenKind::integer: {
        int64_t value = 0;
        const auto [end, error] = std::from_chars(first.text.data(), first.text.data() + first.text.size(), value);
        if (error != std::errc()) return lacking("an integer beyond 64 bits");
        next();
        return constant(Value::of(value));
      }
      case TokenKind::real: {
        double value = 0;
        const auto [end, error] = std::from_chars(first.text.data(), first.text.data() + first.text.size(), value);
        if (error != std::errc()) return lacking("a number beyond double precision");
        next();
        return constant(Value::of(value));
      }
      case TokenKind::op: break;
      default: return unexpected();
    }
    if (skip_op("(")) {
      if (skip_op(")")) return make(ExprKind::tuple, {});
      SLUICE_TRY_ASSIGN(inner, tuple(true));
      SLUICE_TRY(expect_op(")"));
      return inner;
    }
    if (skip_op("[")) {
      std::vector<const Expr*> items;
      while (!skip_op("]")) {
        SLUICE_TRY_ASSIGN(item, expression());
        items.push_back(item);
        if (!at_op("]")) SLUICE_TRY(expect_op(","));
      }
      return make(ExprKind::list, std::move(items));
    }
    if (skip_op("{")) {
      std::vector<const Expr*> items;
      while (!skip_op("}")) {
        SLUICE_TRY_ASSIGN(key, expression());
        SLUICE_TRY(expect_op(":"));
        SLUICE_TRY_ASSIGN(value, expression());
        items.insert(items.end(), {key, value});
        if (!at_op("}")) SLUICE_TRY(expect_op(","));
      }
      return make(ExprKind::dict, std::move(items));
    }
    return unexpected();
  }

  // Neighbouring literals are one.
  ExprResult text_constant() {
    std::string_view text = token().text;
    next();
    if (token().kind == TokenKind::text) {
      std::string& joined = program_.texts.emplace_back(text);
      for (; token().kind == TokenKind::text; next()) joined += token().text;
      text = joined;
    }
    return constant(Value::of(text));
  }

  ExprResult postfix(const Expr* value) {
    while (true) {
      if (skip_op(".")) {
        if (token().kind == TokenKind::integer) {
          SLUICE_TRY_ASSIGN(index, primary());
          value = make(ExprKind::index, {value, index});
          continue;
        }
        SLUICE_TRY_ASSIGN(name, expect_name());
        Expr& expr = make(ExprKind::attribute);
        expr.name = name;
        expr.args = {value};
        value = &expr;
      } else if (skip_op("[")) {
        SLUICE_TRY_ASSIGN(indexed, subscript(value));
        value = indexed;
      } else if (at_op("(")) {
        SLUICE_TRY_ASSIGN(called, call(ExprKind::call, value, {}));
        value = called;
      } else {
        return value;
      }
    }
  }

  ExprResult subscript(const Expr* value) {
    std::array<const Expr*, 3> parts = {};
    size_t colons = 0;
    while (!at_op("]")) {
      if (at_op(",")) return lacking("a subscript with a comma");
      if (skip_op(":")) {
        if (++colons > 2) return unexpected();
        continue;
      }
      if (parts[colons] != nullptr) return unexpected();
      SLUICE_TRY_ASSIGN(part, expression());
      parts[colons] = part;
    }
    if (colons == 0 && parts[0] == nullptr) return unexpected();
    next();
    if (colons == 0) return make(ExprKind::index, {value, parts[0]});
    return make(ExprKind::slice, {value, parts[0], parts[1], parts[2]});
  }

  // `(args)`, here or absent, of a call, filter or test on `subject`.
  ExprResult call(ExprKind kind, const Expr* subject, std::string_view name) {
    Expr& expr = make(kind);
    expr.name = name;
    expr.args = {subject};
    if (!skip_op("(")) return &expr;
    while (!skip_op(")")) {
      if (at_op("*") || at_op("**")) return lacking("unpacking of arguments");
      if (token().kind == TokenKind::name && following().kind == TokenKind::op && following().text == "=") {
        const std::string_view keyword = token().text;
        next();
        next();
        SLUICE_TRY_ASSIGN(value, expression());
        const auto same = [&](const auto& argument) { return argument.first == keyword; };
        if (std::any_of(expr.named.begin(), expr.named.end(), same)) {
          return broken(fmt::format("the argument '{}' is given twice", keyword));
        }
        expr.named.emplace_back(keyword, value);
      } else {
        if (!expr.named.empty()) return broken("an argument without a name behind one with a name");
        SLUICE_TRY_ASSIGN(value, expression());
        expr.args.push_back(value);
      }
      if (!at_op(")")) SLUICE_TRY(expect_op(","));
    }
    return &expr;
  }

  Result<std::string_view> dotted_name() {
    SLUICE_TRY_ASSIGN(name, expect_name());
    if (at_op(".")) return lacking(fmt::format("a filter or test '{}.'", name));
    return name;
  }

  ExprResult filters(const Expr* value) {
    while (true) {
      if (skip_op("|")) {
        SLUICE_TRY_ASSIGN(name, dotted_name());
        SLUICE_TRY_ASSIGN(filtered, call(ExprKind::filter, value, name));
        value = filtered;
      } else if (skip_word("is")) {
        SLUICE_TRY_ASSIGN(tested, test(value));
        value = tested;
      } else if (at_op("(")) {
        SLUICE_TRY_ASSIGN(called, call(ExprKind::call, value, {}));
        value = called;
      } else {
        return value;
      }
    }
  }

  // `is` was passed. One argument may come without parentheses: `is divisibleby 3`.
  ExprResult test(const Expr* value) {
    const bool negated = skip_word("not");
    SLUICE_TRY_ASSIGN(name, dotted_name());
    const Expr* tested = nullptr;
    const TokenKind kind = token().kind;
    const bool starts_value = kind == TokenKind::text || kind == TokenKind::integer || kind == TokenKind::real ||
                              at_op("[") || at_op("{") ||
                              (kind == TokenKind::name && !at_any({"else", "or", "and"}));
    if (!at_op("(") && starts_value) {
      if (at_word("is")) return broken("tests cannot be chained");
      SLUICE_TRY_ASSIGN(operand, primary());
      SLUICE_TRY_ASSIGN(argument, postfix(operand));
      Expr& expr = make(ExprKind::test);
      expr.name = name;
      expr.args = {value, argument};
      tested = &expr;
    } else {
      SLUICE_TRY_ASSIGN(plain, call(ExprKind::test, value, name));
      tested = plain;
    }
    return negated ? make(ExprKind::logical_not, {tested}) : tested;
  }

  const std::vector<Token>& tokens_;
  Program& program_;
  size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;  // around the statement, within its macro
};

}  // namespace

Status parse(std::string source, Program& program) {
  if (source.size() > kMaxSourceBytes) {
    return fail(ErrorCode::unsupported, fmt::format("the chat template is {} bytes long; {} are supported",
                                                    source.size(), kMaxSourceBytes));
  }
  std::string repaired;
  program.source = normalize_source(valid_utf8(source, repaired));
  SLUICE_TRY_ASSIGN(tokens, tokenize(program.source, program.texts));
  return Parser(tokens, program).run();
}

}  // namespace sluice::model::jinja
