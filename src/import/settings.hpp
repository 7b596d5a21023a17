// SPDX-License-Identifier: Apache-2.0
// Typed access to the settings of a JSON object out of a checkpoint's folder.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "import/json_text.hpp"
#include "import/text.hpp"
#include "sluice/result.hpp"

namespace sluice::import {

// One JSON object of settings, which it borrows. An absent or null key gives `otherwise`; one of another kind is `corrupt`.
class Settings {
 public:
  Settings(const Json& object, std::string path) : object_(object), path_(std::move(path)) {}

  const std::string& path() const { return path_; }
  const Json* find(const char* key) const { return json_member(object_, key); }

  Result<uint32_t> size(const char* key, std::optional<uint32_t> otherwise = std::nullopt) const {
    const Json* value = find(key);
    if (value == nullptr && otherwise) return *otherwise;
    if (value == nullptr) return fail(ErrorCode::corrupt, fmt::format("{}: \"{}\" is missing", path_, key));
    if (!value->is_number_unsigned() || value->get<uint64_t>() > std::numeric_limits<uint32_t>::max()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: \"{}\" is {}, expected a whole number", path_, key, shown(*value)));
    }
    return value->get<uint32_t>();
  }

  Result<double> number(const char* key, std::optional<double> otherwise = std::nullopt) const {
    const Json* value = find(key);
    if (value == nullptr && otherwise) return *otherwise;
    if (value == nullptr) return fail(ErrorCode::corrupt, fmt::format("{}: \"{}\" is missing", path_, key));
    if (!value->is_number()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: \"{}\" is {}, expected a number", path_, key, shown(*value)));
    }
    return value->get<double>();
  }

  Result<bool> flag(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: \"{}\" is {}, expected true or false", path_, key, shown(*value)));
    }
    return value->get<bool>();
  }

  Result<std::string> text(const char* key, std::string otherwise = "") const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: \"{}\" is {}, expected a string", path_, key, shown(*value)));
    }
    return value->get<std::string>();
  }

 private:
  static std::string shown(const Json& value) { return in_quotes(value.dump()); }

  const Json& object_;
  std::string path_;
};

}  // namespace sluice::import
