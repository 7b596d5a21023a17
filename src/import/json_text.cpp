// SPDX-License-Identifier: Apache-2.0
#include "import/json_text.hpp"

#include <fmt/format.h>

#include <cstdint>
#include <set>

#include "import/text.hpp"

namespace sluice::import {
namespace {

constexpr uint32_t kMaxDepth = 64;  // tokenizer.json needs 9

// Whether brackets outside strings nest deeper than the limit. Of invalid JSON it may say either; the parser decides then.
bool too_deep(std::string_view text) {
  uint32_t depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kMaxDepth) return true;
    } else if ((c == '}' || c == ']') && depth > 0) {
      --depth;
    }
  }
  return false;
}

}  // namespace

Result<Json> parse_json_object(std::string_view text, const std::string& path) {
  if (too_deep(text)) {
    return fail(ErrorCode::corrupt, fmt::format("{}: JSON nested more than {} deep", path, kMaxDepth));
  }
  // nlohmann::json keeps the last of two members with one key; which one a writer meant is anybody's guess.
  std::set<std::string> keys;
  std::string twice;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::key && depth == 1 && twice.empty()) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.insert(key).second) twice = in_quotes(key);
    }
    return true;
  };
  Json root = Json::parse(text.begin(), text.end(), watch, false);
  if (root.is_discarded()) return fail(ErrorCode::corrupt, fmt::format("{}: not valid JSON", path));
  if (!root.is_object()) return fail(ErrorCode::corrupt, fmt::format("{}: the top of the JSON is not an object", path));
  if (!twice.empty()) return fail(ErrorCode::corrupt, fmt::format("{}: {} is there twice", path, twice));
  return root;
}

const Json* json_member(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

}  // namespace sluice::import
