// SPDX-License-Identifier: Apache-2.0
// TOML files with a closed list of keys.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <toml++/toml.h>
#include <utility>

#include "import/text.hpp"
#include "sluice/result.hpp"

namespace sluice::import {

// Reads a file of at most 1 MiB. Errors: not_found, io, usage, corrupt (with the line).
Result<toml::table> read_toml(const std::string& path);
// The same of a text; `path` begins messages.
Result<toml::table> parse_toml(const std::string& text, const std::string& path);

// One table, which it borrows; remembers which keys were asked for, the rest is refused at the end.
class TomlTable {
 public:
  TomlTable(const toml::table& table, std::string where) : table_(table), where_(std::move(where)) {}

  template <class T>
  Result<T> value(std::string_view key, std::optional<T> otherwise = std::nullopt) {
    asked_.insert(std::string(key));
    const auto node = table_[key];
    if (!node && otherwise) return *otherwise;
    const auto found = node.template value<T>();
    if (!node) return fail(ErrorCode::corrupt, fmt::format("{}: key \"{}\" is missing", where_, key));
    if (!found) return fail(ErrorCode::corrupt, fmt::format("{}: key \"{}\" is of the wrong kind", where_, key));
    return *found;
  }

  Result<uint32_t> size(std::string_view key) {
    SLUICE_TRY_ASSIGN(number, value<int64_t>(key));
    if (number < 0 || number > std::numeric_limits<uint32_t>::max()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: key \"{}\" is {}", where_, key, number));
    }
    return static_cast<uint32_t>(number);
  }

  // A key that somebody else reads.
  void ask(std::string_view key) { asked_.insert(std::string(key)); }

  const toml::table* table(std::string_view key) {
    asked_.insert(std::string(key));
    return table_[key].as_table();
  }

  Status refuse_others() const {
    for (const auto& [key, node] : table_) {
      if (asked_.contains(std::string(key.str()))) continue;
      return fail(ErrorCode::corrupt, fmt::format("{}: unknown key {} in line {}", where_, in_quotes(key.str()),
                                                  node.source().begin.line));
    }
    return {};
  }

 private:
  const toml::table& table_;
  std::string where_;
  std::set<std::string> asked_;
};

}  // namespace sluice::import
