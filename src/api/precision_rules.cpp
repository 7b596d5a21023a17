// SPDX-License-Identifier: Apache-2.0
// PrecisionRules of sluice.hpp.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <array>
#include <utility>
#include <vector>

#include "api/default_precision_rules.hpp"
#include "import/toml_table.hpp"
#include "sluice/sluice.hpp"

namespace sluice {
namespace {

using import::in_quotes;
using import::TomlTable;

// Steps of backtracking: a pattern that takes more on a prompt is written badly. 10 million are below a second.
constexpr uint32_t kMatchLimit = 10'000'000;

struct Deleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
using Pattern = std::unique_ptr<pcre2_code, Deleter>;

struct Rule {
  std::string name;
  std::vector<Pattern> patterns;
  Precision precision = Precision::int4;
};

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> text = {};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

Result<Pattern> compile(const std::string& text, const std::string& where) {
  int code = 0;
  PCRE2_SIZE offset = 0;
  // A prompt may hold bytes that are not UTF-8; they match nothing.
  constexpr uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_CASELESS | PCRE2_MATCH_INVALID_UTF;
  Pattern pattern(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), kOptions, &code, &offset, nullptr));
  if (pattern) return pattern;
  return fail(ErrorCode::corrupt,
              fmt::format("{}: pattern {}: {} at offset {}", where, in_quotes(text), message_of(code), offset));
}

Result<Precision> parse_precision(const std::string& text, const std::string& where) {
  if (text == "int4") return Precision::int4;
  if (text == "fine") return Precision::fine;
  return fail(ErrorCode::corrupt, fmt::format("{}: precision {}; there are int4 and fine", where, in_quotes(text)));
}

Result<Rule> parse_rule(const toml::table& table, const std::string& path) {
  const std::string where = fmt::format("{}: rule in line {}", path, table.source().begin.line);
  TomlTable keys(table, where);
  Rule rule;
  SLUICE_TRY_ASSIGN(name, keys.value<std::string>("name"));
  SLUICE_TRY_ASSIGN(precision_name, keys.value<std::string>("precision"));
  SLUICE_TRY_ASSIGN(precision, parse_precision(precision_name, where));
  keys.ask("patterns");
  SLUICE_TRY(keys.refuse_others());
  const toml::array* patterns = table["patterns"].as_array();
  if (patterns == nullptr || patterns->empty()) {
    return fail(ErrorCode::corrupt, where + ": \"patterns\" is missing; it takes a list of regular expressions");
  }
  for (const toml::node& node : *patterns) {
    const auto text = node.value<std::string>();
    if (!text) return fail(ErrorCode::corrupt, where + ": \"patterns\" has an entry that is no text");
    SLUICE_TRY_ASSIGN(pattern, compile(*text, where));
    rule.patterns.push_back(std::move(pattern));
  }
  rule.name = std::move(name);
  rule.precision = precision;
  return rule;
}

}  // namespace

struct PrecisionRules::State {
  std::string path;
  Precision otherwise = Precision::int4;
  std::vector<Rule> rules;
};

PrecisionRules::PrecisionRules(std::unique_ptr<State> state) : state_(std::move(state)) {}
PrecisionRules::PrecisionRules(PrecisionRules&&) noexcept = default;
PrecisionRules& PrecisionRules::operator=(PrecisionRules&&) noexcept = default;
PrecisionRules::~PrecisionRules() = default;

Result<PrecisionRules> PrecisionRules::open(const std::string& path) {
  auto state = std::make_unique<State>();
  state->path = path.empty() ? "the shipped rules" : path;
  SLUICE_TRY_ASSIGN(
      root, path.empty() ? import::parse_toml(api::kDefaultPrecisionRules, state->path) : import::read_toml(path));
  TomlTable keys(root, state->path);
  SLUICE_TRY_ASSIGN(otherwise_name, keys.value<std::string>("default"));
  SLUICE_TRY_ASSIGN(otherwise, parse_precision(otherwise_name, state->path));
  keys.ask("rule");
  SLUICE_TRY(keys.refuse_others());
  state->otherwise = otherwise;
  if (root.contains("rule")) {
    const toml::array* rules = root["rule"].as_array();
    for (size_t i = 0; rules == nullptr || i < rules->size(); ++i) {
      const toml::table* table = rules != nullptr ? (*rules)[i].as_table() : nullptr;
      if (table == nullptr) {
        return fail(ErrorCode::corrupt, state->path + ": a rule is not a table; write [[rule]]");
      }
      SLUICE_TRY_ASSIGN(rule, parse_rule(*table, state->path));
      state->rules.push_back(std::move(rule));
    }
  }
  return PrecisionRules(std::move(state));
}

Result<PrecisionChoice> PrecisionRules::choose(std::string_view prompt) const {
  const std::unique_ptr<pcre2_match_context, Deleter> context(pcre2_match_context_create(nullptr));
  if (context) pcre2_set_match_limit(context.get(), kMatchLimit);
  for (const Rule& rule : state_->rules) {
    for (const Pattern& pattern : rule.patterns) {
      const std::unique_ptr<pcre2_match_data, Deleter> data(
          pcre2_match_data_create_from_pattern(pattern.get(), nullptr));
      if (!data) return fail(ErrorCode::out_of_memory, "not enough memory to look for a pattern in the prompt");
      const int code = pcre2_match(pattern.get(), reinterpret_cast<PCRE2_SPTR>(prompt.data()), prompt.size(), 0, 0,
                                   data.get(), context.get());
      if (code == PCRE2_ERROR_NOMATCH) continue;
      if (code < 0) {
        return fail(ErrorCode::usage, fmt::format("{}: rule {}: a pattern gives up on this prompt: {}; simplify it, or "
                                                  "give --precision int4 or fine",
                                                  state_->path, in_quotes(rule.name), message_of(code)));
      }
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data.get());
      const std::string found(prompt.substr(span[0], span[1] - span[0]));
      return PrecisionChoice{
          .precision = rule.precision,
          .rule = rule.name,
          .found = found,
          .why = fmt::format("rule {} finds {} in the prompt", in_quotes(rule.name), in_quotes(found))};
    }
  }
  return PrecisionChoice{
      .precision = state_->otherwise, .rule = {}, .found = {}, .why = "no rule finds its words in the prompt"};
}

}  // namespace sluice
