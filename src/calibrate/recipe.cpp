// SPDX-License-Identifier: Apache-2.0
#include "calibrate/recipe.hpp"

#include <fmt/format.h>
#include <fnmatch.h>

#include <algorithm>
#include <charconv>
#include <span>
#include <string_view>

#include "import/toml_table.hpp"

namespace sluice::calibrate {
namespace {

using import::in_quotes;
using import::SourceTensor;
using import::TomlTable;
using storage::Scheme;

Unexpected bad(const std::string& where, const std::string& what) {
  return fail(ErrorCode::corrupt, fmt::format("{}: {}", where, what));
}

// "0-3, 28, 30-31" into ranges.
Result<std::vector<LayerRange>> parse_layers(std::string_view text, const std::string& where) {
  std::vector<LayerRange> ranges;
  const auto number = [&](const char*& at) -> std::optional<int32_t> {
    int32_t value = 0;
    const auto [end, error] = std::from_chars(at, text.data() + text.size(), value);
    if (error != std::errc() || value < 0) return std::nullopt;
    at = end;
    return value;
  };
  const char* at = text.data();
  const char* const end = text.data() + text.size();
  const auto skip_spaces = [&] {
    while (at != end && *at == ' ') ++at;
  };
  while (true) {
    skip_spaces();
    const std::optional<int32_t> first = number(at);
    std::optional<int32_t> last = first;
    if (first && at != end && *at == '-') last = number(++at);
    skip_spaces();
    if (!first || !last || *last < *first || (at != end && *at != ',')) {
      return bad(where, fmt::format("layers {}, expected numbers and ranges such as \"0-3, 28\"", in_quotes(text)));
    }
    ranges.emplace_back(*first, *last);
    if (at == end) return ranges;
    ++at;
  }
}

Result<std::vector<std::string>> parse_patterns(const toml::table& table, const std::string& where) {
  std::vector<std::string> patterns;
  if (const auto one = table["tensors"].value<std::string>()) patterns.push_back(*one);
  if (const toml::array* many = table["tensors"].as_array()) {
    for (const toml::node& node : *many) {
      const auto pattern = node.value<std::string>();
      if (!pattern) return bad(where, "\"tensors\" has an entry that is no text");
      patterns.push_back(*pattern);
    }
  }
  if (patterns.empty()) return bad(where, "\"tensors\" is missing; it takes a pattern or a list of them");
  return patterns;
}

Result<std::optional<Scheme>> parse_scheme(const std::string& text, const std::string& where) {
  if (text == "keep") return std::optional<Scheme>();
  for (const Scheme scheme : {Scheme::f16, Scheme::bf16, Scheme::int8, Scheme::int4}) {
    if (text == storage::name_of(scheme)) return std::optional(scheme);
  }
  return bad(where, fmt::format("scheme {}; there are keep, f16, bf16, int8 and int4", in_quotes(text)));
}

Result<Rule> parse_rule(const toml::table& table, const std::string& path) {
  Rule rule;
  rule.line = table.source().begin.line;
  const std::string where = fmt::format("{}: rule in line {}", path, rule.line);
  TomlTable keys(table, where);
  SLUICE_TRY_ASSIGN(patterns, parse_patterns(table, where));
  keys.ask("tensors");
  SLUICE_TRY_ASSIGN(scheme_name, keys.value<std::string>("scheme"));
  SLUICE_TRY_ASSIGN(scheme, parse_scheme(scheme_name, where));
  SLUICE_TRY_ASSIGN(group, keys.value<int64_t>("group", 128));
  SLUICE_TRY_ASSIGN(method, keys.value<std::string>("method", "rtn"));
  SLUICE_TRY_ASSIGN(symmetric, keys.value<bool>("symmetric", true));
  SLUICE_TRY_ASSIGN(layers, keys.value<std::string>("layers", ""));
  SLUICE_TRY(keys.refuse_others());
  if (group != 32 && group != 64 && group != 128)
    return bad(where, fmt::format("group {}; there are 32, 64 and 128", group));
  if (method != "rtn" && method != "gptq") {
    return bad(where, fmt::format("method {}; there are rtn and gptq", in_quotes(method)));
  }
  const bool by_gptq = scheme == Scheme::int4 && method == "gptq";
  if (method == "gptq" && !by_gptq) return bad(where, "gptq makes int4; leave the method away with another scheme");
  if (!symmetric && !by_gptq) return bad(where, "zero points (symmetric = false) need scheme int4 and method gptq");
  rule.patterns = std::move(patterns);
  rule.choice = {.scheme = scheme,
                 .group_elems = static_cast<uint32_t>(group),
                 .method = by_gptq ? Method::gptq : Method::rtn,
                 .symmetric = symmetric};
  if (!layers.empty()) {
    SLUICE_TRY_ASSIGN(ranges, parse_layers(layers, where));
    rule.layers = std::move(ranges);
  }
  return rule;
}

Result<Measured> parse_measured(const toml::table& table, const std::string& path) {
  const std::string where = path + ": [measured]";
  TomlTable keys(table, where);
  SLUICE_TRY_ASSIGN(model, keys.value<std::string>("model"));
  SLUICE_TRY_ASSIGN(kl, keys.value<double>("kl"));
  const bool has_fine = table.contains("kl_fine");
  SLUICE_TRY_ASSIGN(kl_fine, keys.value<double>("kl_fine", 0.0));
  SLUICE_TRY(keys.refuse_others());
  if (!(kl >= 0) || !(kl_fine >= 0)) return bad(where, "a KL divergence is a number from 0 on");
  return Measured{.model = std::move(model), .kl = kl, .kl_fine = has_fine ? std::optional(kl_fine) : std::nullopt};
}

bool matches(std::span<const std::string> patterns, std::span<const LayerRange> layers, const SourceTensor& tensor) {
  const auto in_layer = [&](const LayerRange& range) {
    return range.first <= tensor.layer && tensor.layer <= range.second;
  };
  if (!layers.empty() && std::none_of(layers.begin(), layers.end(), in_layer)) return false;
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return ::fnmatch(pattern.c_str(), tensor.name.c_str(), 0) == 0;
  });
}

// Every pattern and every range of a list matches a matrix, whichever rule takes it: one that does not is a typo, which
// the others of its list would hide.
Status check_parts(const Recipe& recipe, const Rule& rule, const std::vector<SourceTensor>& tensors) {
  const auto idle = [&](std::span<const std::string> patterns, std::span<const LayerRange> layers) {
    return std::none_of(tensors.begin(), tensors.end(), [&](const SourceTensor& tensor) {
      return !tensor.vector && matches(patterns, layers, tensor);
    });
  };
  const auto refuse = [&](const std::string& what) {
    return fail(ErrorCode::usage,
                fmt::format("{}: the rule in line {}: {}; correct it or leave it away", recipe.path, rule.line, what));
  };
  for (const std::string& pattern : rule.patterns) {
    if (idle({&pattern, 1}, {})) return refuse(fmt::format("{} matches no matrix of this model", in_quotes(pattern)));
  }
  for (const LayerRange& range : rule.layers) {
    if (!idle(rule.patterns, {&range, 1})) continue;
    const std::string where = range.first == range.second ? fmt::format("layer {}", range.first)
                                                          : fmt::format("layers {}-{}", range.first, range.second);
    return refuse(fmt::format("no matrix that it names lies in {} of this model", where));
  }
  for (const std::string& pattern : rule.patterns) {
    if (idle({&pattern, 1}, rule.layers)) {
      return refuse(fmt::format("{} matches no matrix in the rule's layers", in_quotes(pattern)));
    }
  }
  return {};
}

}  // namespace

Result<Recipe> read_recipe(const std::string& path) {
  SLUICE_TRY_ASSIGN(root, import::read_toml(path));
  TomlTable keys(root, path);
  SLUICE_TRY_ASSIGN(description, keys.value<std::string>("description", ""));
  keys.ask("rule");
  const toml::table* measured = keys.table("measured");
  SLUICE_TRY(keys.refuse_others());
  Recipe recipe{.path = path, .description = std::move(description), .rules = {}, .measured = {}};
  if (measured != nullptr) {
    SLUICE_TRY_ASSIGN(figures, parse_measured(*measured, path));
    recipe.measured = std::move(figures);
  }
  const toml::array* rules = root["rule"].as_array();
  if (rules == nullptr || rules->empty()) return bad(path, "there is no [[rule]]");
  for (const toml::node& node : *rules) {
    const toml::table* table = node.as_table();
    if (table == nullptr) return bad(path, "a rule is not a table; write [[rule]]");
    SLUICE_TRY_ASSIGN(rule, parse_rule(*table, path));
    recipe.rules.push_back(std::move(rule));
  }
  return recipe;
}

Result<std::vector<std::optional<Choice>>> apply_recipe(const Recipe& recipe,
                                                        const std::vector<SourceTensor>& tensors,
                                                        std::optional<Method> method) {
  for (const Rule& rule : recipe.rules) SLUICE_TRY(check_parts(recipe, rule, tensors));
  std::vector<std::optional<Choice>> choices(tensors.size());
  std::vector<bool> used(recipe.rules.size(), false);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const SourceTensor& tensor = tensors[i];
    if (tensor.vector) continue;
    const auto rule = std::find_if(recipe.rules.begin(), recipe.rules.end(), [&](const Rule& candidate) {
      return matches(candidate.patterns, candidate.layers, tensor);
    });
    if (rule == recipe.rules.end()) {
      return fail(ErrorCode::usage, fmt::format("{}: no rule matches tensor {}; end the recipe with a rule for \"*\"",
                                                recipe.path, in_quotes(tensor.name)));
    }
    used[static_cast<size_t>(rule - recipe.rules.begin())] = true;
    Choice choice = rule->choice;
    if (tensor.role == storage::Role::token_embedding && choice.scheme == Scheme::int4) {
      return fail(ErrorCode::usage,
                  fmt::format("{}: rule in line {} makes the embedding int4, whose rows are read one at a "
                              "time; give \"*embed_tokens*\" a rule with int8 or f16 before it",
                              recipe.path, rule->line));
    }
    if (choice.scheme == Scheme::int4 && method) choice.method = *method;
    if (choice.method == Method::rtn) choice.symmetric = true;
    if (tensor.layer < 0) choice.method = Method::rtn, choice.symmetric = true;
    choices[i] = choice;
  }
  const auto idle = std::find(used.begin(), used.end(), false);
  if (idle != used.end()) {
    const Rule& rule = recipe.rules[static_cast<size_t>(idle - used.begin())];
    return fail(ErrorCode::usage,
                fmt::format("{}: the rule in line {} ({}) gets no tensor of this model, for rules before it take all; "
                            "move it up or leave it away",
                            recipe.path, rule.line, in_quotes(rule.patterns.front())));
  }
  return choices;
}

}  // namespace sluice::calibrate
