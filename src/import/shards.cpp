// SPDX-License-Identifier: Apache-2.0
#include "import/shards.hpp"

#include <fcntl.h>
#include <fmt/format.h>

#include <filesystem>

#include "base/units.hpp"
#include "import/json_text.hpp"
#include "import/source_file.hpp"
#include "import/text.hpp"

namespace sluice::import {
namespace {

constexpr uint64_t kMaxIndexBytes = 64 * kMiB;

Status add_file(const std::string& path, Shards& shards) {
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY | O_NONBLOCK));
  SLUICE_TRY_ASSIGN(index, read_safetensors_header(fd, path));
  shards.files.push_back({path, std::move(fd)});
  shards.indices.push_back(std::move(index));
  return {};
}

// model.safetensors.index.json: {"weight_map": {tensor: file name}}.
Result<Shards> open_indexed(const std::string& folder, const std::string& index_path) {
  SLUICE_TRY_ASSIGN(text, read_text_file(index_path, kMaxIndexBytes));
  SLUICE_TRY_ASSIGN(root, parse_json_object(text, index_path));
  const Json* map = json_member(root, "weight_map");
  if (map == nullptr || !map->is_object() || map->empty()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: \"weight_map\" is missing or empty", index_path));
  }
  Shards shards;
  std::map<std::string, uint32_t> numbers;
  for (const auto& [tensor, file] : map->items()) {
    // A plain name: the index of a downloaded folder must not lead out of it.
    if (!file.is_string() || file.get_ref<const std::string&>().find('/') != std::string::npos ||
        !file.get_ref<const std::string&>().ends_with(".safetensors")) {
      return fail(ErrorCode::corrupt, fmt::format("{}: tensor {} is said to be in {}, which is no name of a shard",
                                                  index_path, in_quotes(tensor), in_quotes(file.dump())));
    }
    const auto& name = file.get_ref<const std::string&>();
    const auto [shard, is_new] = numbers.emplace(name, static_cast<uint32_t>(numbers.size()));
    if (is_new) {
      const std::string path = in_folder(folder, name);
      if (!exists(path)) {
        return fail(ErrorCode::not_found, fmt::format("{}: shard {} is missing, {} names it for tensor {}; download it",
                                                      path, in_quotes(name), index_path, in_quotes(tensor)));
      }
      SLUICE_TRY(add_file(path, shards));
    }
    if (!shards.indices[shard->second].contains(tensor)) {
      return fail(ErrorCode::corrupt, fmt::format("{}: tensor {} is missing, {} says it is here; download the folder "
                                                  "again",
                                                  shards.files[shard->second].path, in_quotes(tensor), index_path));
    }
    shards.where.emplace(tensor, shard->second);
  }
  return shards;
}

}  // namespace

std::string in_folder(const std::string& folder, std::string_view name) {
  return (std::filesystem::path(folder) / name).string();
}

bool exists(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

Result<Shards> open_shards(const std::string& folder) {
  const std::string single = in_folder(folder, "model.safetensors");
  const std::string index = in_folder(folder, "model.safetensors.index.json");
  if (!exists(single) && exists(index)) return open_indexed(folder, index);
  if (!exists(single)) {
    return fail(ErrorCode::not_found, fmt::format("{}: neither model.safetensors nor model.safetensors.index.json is "
                                                  "there; other formats of weights are not read",
                                                  folder));
  }
  Shards shards;
  SLUICE_TRY(add_file(single, shards));
  for (const auto& entry : shards.indices[0]) shards.where.emplace(entry.first, 0);
  return shards;
}

std::optional<SourceType> source_type_of_dtype(std::string_view dtype) {
  if (dtype == "F32") return SourceType::f32;
  if (dtype == "F16") return SourceType::f16;
  if (dtype == "BF16") return SourceType::bf16;
  return std::nullopt;
}

}  // namespace sluice::import
