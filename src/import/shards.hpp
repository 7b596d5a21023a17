// SPDX-License-Identifier: Apache-2.0
// The safetensors of a folder: one file, or shards with an index.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "import/checkpoint.hpp"
#include "import/safetensors.hpp"
#include "sluice/result.hpp"

namespace sluice::import {

std::string in_folder(const std::string& folder, std::string_view name);
bool exists(const std::string& path);

// Where every tensor of the folder lies.
struct Shards {
  std::vector<SourceFile> files;
  std::vector<SafetensorsIndex> indices;               // one per file
  std::map<std::string, uint32_t, std::less<>> where;  // tensor name to file
};

// Opens model.safetensors, or every shard that model.safetensors.index.json names, and reads their headers.
// Errors: not_found, io, corrupt.
Result<Shards> open_shards(const std::string& folder);

// F32, F16 and BF16; nothing for a dtype that weights as plain numbers do not have.
std::optional<SourceType> source_type_of_dtype(std::string_view dtype);

}  // namespace sluice::import
