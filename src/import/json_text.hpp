// SPDX-License-Identifier: Apache-2.0
// JSON out of files: parsed with a limit on depth, and read without surprises.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "sluice/result.hpp"

namespace sluice::import {

using Json = nlohmann::json;

// Parses text whose top is an object. Values nested deeper than 64 are refused before the parser sees them: it copes, but
// copying and printing recurse. A key that comes twice in the outermost object is refused as well.
// `path` begins the message. Error: corrupt.
Result<Json> parse_json_object(std::string_view text, const std::string& path);

// The member of an object; nullptr if it is absent or null, or `object` is none.
const Json* json_member(const Json& object, const char* key);

}  // namespace sluice::import
