// SPDX-License-Identifier: Apache-2.0
#include "import/toml_table.hpp"

#include "base/units.hpp"
#include "import/source_file.hpp"

namespace sluice::import {
namespace {

constexpr uint64_t kMaxTomlBytes = 1 * kMiB;

}  // namespace

Result<toml::table> parse_toml(const std::string& text, const std::string& path) {
#if TOML_EXCEPTIONS
  try {
    return toml::parse(text, path);
  } catch (const toml::parse_error& error) {
    return fail(ErrorCode::corrupt, fmt::format("{}: line {}: {}", path, error.source().begin.line, error.description()));
  }
#else
  toml::parse_result result = toml::parse(text, path);
  if (result) return std::move(result).table();
  return fail(ErrorCode::corrupt, fmt::format("{}: line {}: {}", path, result.error().source().begin.line,
                                              result.error().description()));
#endif
}

Result<toml::table> read_toml(const std::string& path) {
  SLUICE_TRY_ASSIGN(text, read_text_file(path, kMaxTomlBytes));
  return parse_toml(text, path);
}

}  // namespace sluice::import
