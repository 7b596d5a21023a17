// SPDX-License-Identifier: Apache-2.0
#include "import/safetensors.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "import/json_text.hpp"
#include "import/source_file.hpp"
#include "import/text.hpp"

namespace sluice::import {
namespace {

constexpr size_t kMaxTensors = 1u << 17;
constexpr size_t kMaxNameBytes = 1024;
constexpr size_t kMaxDimensions = 8;

// Bytes of one element; 0 where they are not whole bytes or the dtype is newer than this list.
uint64_t dtype_bytes(std::string_view dtype) {
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") return 2;
  if (dtype == "I8" || dtype == "U8" || dtype == "BOOL" || dtype.starts_with("F8_")) return 1;
  return 0;
}

// Whole numbers of 0 and more; nothing if any element is something else.
std::optional<std::vector<uint64_t>> whole_numbers(const Json* array, size_t most) {
  if (array == nullptr || !array->is_array() || array->size() > most) return std::nullopt;
  std::vector<uint64_t> numbers;
  for (const Json& number : *array) {
    if (!number.is_number_unsigned()) return std::nullopt;
    numbers.push_back(number.get<uint64_t>());
  }
  return numbers;
}

Result<SafetensorsTensor> read_tensor(const std::string& name, const Json& entry, uint64_t data_bytes,
                                      const std::string& path) {
  const std::string where = fmt::format("{}: tensor {}", path, in_quotes(name));
  const Json* dtype = json_member(entry, "dtype");
  const auto shape = whole_numbers(json_member(entry, "shape"), kMaxDimensions);
  const auto offsets = whole_numbers(json_member(entry, "data_offsets"), 2);
  if (dtype == nullptr || !dtype->is_string() || !shape || !offsets || offsets->size() != 2) {
    return fail(ErrorCode::corrupt, fmt::format("{}: its dtype, shape or data_offsets are missing or not of their kind",
                                                where));
  }
  const uint64_t begin = (*offsets)[0], end = (*offsets)[1];
  if (begin > end || end > data_bytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: claims data bytes {} to {}, the file has {}; it is truncated or "
                                                "damaged, download it again", where, begin, end, data_bytes));
  }
  SafetensorsTensor tensor;
  tensor.dtype = dtype->get<std::string>();
  tensor.shape = *shape;
  tensor.offset = begin;
  tensor.bytes = end - begin;
  const uint64_t each = dtype_bytes(tensor.dtype);
  if (each == 0) return tensor;  // nothing that import reads, and so nothing that it must get right
  uint64_t bytes = each;
  for (const uint64_t size : tensor.shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      return fail(ErrorCode::corrupt, fmt::format("{}: the shape {} is impossibly large", where,
                                                  fmt::join(tensor.shape, "x")));
    }
  }
  if (bytes != tensor.bytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: {} of shape {} needs {} bytes, its data_offsets hold {}", where,
                                                in_quotes(tensor.dtype), fmt::join(tensor.shape, "x"), bytes, tensor.bytes));
  }
  return tensor;
}

Status refuse_overlaps(const SafetensorsIndex& index, const std::string& path) {
  std::vector<const SafetensorsIndex::value_type*> runs;
  for (const auto& entry : index) {
    if (entry.second.bytes != 0) runs.push_back(&entry);
  }
  std::sort(runs.begin(), runs.end(), [](const auto* a, const auto* b) { return a->second.offset < b->second.offset; });
  for (size_t i = 1; i < runs.size(); ++i) {
    if (runs[i]->second.offset < runs[i - 1]->second.offset + runs[i - 1]->second.bytes) {
      return fail(ErrorCode::corrupt, fmt::format("{}: tensors {} and {} overlap at file offset {}", path,
                                                  in_quotes(runs[i - 1]->first), in_quotes(runs[i]->first),
                                                  runs[i]->second.offset));
    }
  }
  return {};
}

}  // namespace

Result<uint64_t> safetensors_header_bytes(std::span<const std::byte> prefix, uint64_t file_bytes,
                                          const std::string& path) {
  if (file_bytes < kSafetensorsPrefixBytes || prefix.size() < kSafetensorsPrefixBytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: {} bytes are no safetensors file; download it again", path,
                                                file_bytes));
  }
  uint64_t bytes = 0;
  std::memcpy(&bytes, prefix.data(), sizeof bytes);
  if (bytes > file_bytes - kSafetensorsPrefixBytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: claims a header of {} bytes, the file has {}; it is truncated or no "
                                                "safetensors file, download it again", path, bytes, file_bytes));
  }
  if (bytes > kMaxSafetensorsHeaderBytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: claims a header of {} bytes, the format allows {}", path, bytes,
                                                kMaxSafetensorsHeaderBytes));
  }
  return bytes;
}

Result<SafetensorsIndex> parse_safetensors_header(std::string_view header, uint64_t file_bytes,
                                                  const std::string& path) {
  const uint64_t data_offset = kSafetensorsPrefixBytes + header.size();
  if (file_bytes < data_offset) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the file ends inside its header", path));
  }
  SLUICE_TRY_ASSIGN(root, parse_json_object(header, path));
  if (root.size() > kMaxTensors) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the header names {} tensors, at most {} are possible", path,
                                                root.size(), kMaxTensors));
  }
  SafetensorsIndex index;
  for (const auto& [name, entry] : root.items()) {
    if (name == "__metadata__") continue;
    if (name.empty() || name.size() > kMaxNameBytes) {
      return fail(ErrorCode::corrupt, fmt::format("{}: a tensor name of {} bytes", path, name.size()));
    }
    SLUICE_TRY_ASSIGN(tensor, read_tensor(name, entry, file_bytes - data_offset, path));
    tensor.offset += data_offset;
    index.emplace(name, std::move(tensor));
  }
  SLUICE_TRY(refuse_overlaps(index, path));
  return index;
}

Result<SafetensorsIndex> read_safetensors_header(const UniqueFd& fd, const std::string& path) {
  SLUICE_TRY_ASSIGN(file_bytes, regular_file_bytes(fd, path));
  std::byte prefix[kSafetensorsPrefixBytes] = {};
  if (file_bytes >= sizeof prefix) SLUICE_TRY(read_exactly(fd.get(), prefix, 0, path));
  SLUICE_TRY_ASSIGN(header_bytes, safetensors_header_bytes(prefix, file_bytes, path));
  std::string header(header_bytes, '\0');
  SLUICE_TRY(read_exactly(fd.get(), std::as_writable_bytes(std::span(header)), kSafetensorsPrefixBytes, path));
  return parse_safetensors_header(header, file_bytes, path);
}

}  // namespace sluice::import
