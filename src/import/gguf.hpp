// SPDX-License-Identifier: Apache-2.0
// The GGUF container, versions 2 and 3, little-endian: metadata and tensor table, every size checked against the file.
//
//   magic "GGUF", u32 version, u64 tensors, u64 keys
//   per key     string name (u64 length + bytes), u32 type, value (arrays: u32 type, u64 count, elements)
//   per tensor  string name, u32 dimensions, u64 each (innermost first), u32 type, u64 offset into the data
//   data        at the next multiple of general.alignment (32 if absent)
// Source: docs/gguf.md of the ggml project.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "import/checkpoint.hpp"
#include "sluice/result.hpp"

namespace sluice::import {

enum class GgufType : uint32_t {
  u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6, boolean = 7, string = 8, array = 9, u64 = 10, i64 = 11,
  f64 = 12,
};

// One value; it borrows from the bytes that were parsed. For arrays `type` is the elements', `count` their number and
// `bytes` exactly theirs; for strings `bytes` is the text.
struct GgufValue {
  GgufType type = GgufType::u8;
  bool array = false;
  uint64_t count = 1;
  std::span<const std::byte> bytes;
};

struct GgufTensor {
  std::string name;
  std::vector<uint64_t> shape;   // innermost (columns) first, as in the file
  uint32_t ggml_type = 0;
  uint64_t offset = 0;           // in the file
};

// What a GGUF file says. Borrows from the bytes given to `parse`.
class Gguf {
 public:
  // `file` holds the file from its beginning (the weights need not be touched); `path` is for messages.
  // Errors: corrupt, unsupported (another version, byte order or part of a split file).
  static Result<Gguf> parse(std::span<const std::byte> file, const std::string& path);

  const std::string& path() const { return path_; }
  uint32_t version() const { return version_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find(std::string_view name) const;
  bool has(std::string_view key) const { return values_.find(key) != values_.end(); }

  // The value of a key. Absent: an empty optional, `otherwise`, or no elements; there with another type: `corrupt`.
  // Integers of any width serve.
  Result<std::optional<uint64_t>> unsigned_integer(std::string_view key) const;
  Result<std::optional<double>> number(std::string_view key) const;
  Result<std::optional<bool>> boolean(std::string_view key) const;
  Result<std::string> string(std::string_view key, std::string otherwise = "") const;
  Result<std::vector<std::string>> strings(std::string_view key) const;
  Result<std::vector<float>> floats(std::string_view key) const;
  Result<std::vector<int64_t>> integers(std::string_view key) const;

 private:
  Status check_tensors(uint64_t file_bytes, uint64_t data_offset, uint64_t alignment);
  Unexpected wrong_type(std::string_view key, std::string_view expected) const;
  const GgufValue* value(std::string_view key) const;

  std::string path_;
  uint32_t version_ = 0;
  std::map<std::string, GgufValue, std::less<>> values_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
};

// ggml's number of a type as SourceType; nothing for those that import does not read. The name is known for more.
std::optional<SourceType> source_type_of_ggml(uint32_t ggml_type);
std::string ggml_type_name(uint32_t ggml_type);

}  // namespace sluice::import
