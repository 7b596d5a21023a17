// SPDX-License-Identifier: Apache-2.0
// The header of a safetensors file, every size checked against the file.
//
//   u64 header bytes (little-endian), the header, then the data
//   header  {"NAME": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
//           offsets count from the first byte behind the header
// Source: the format description of https://github.com/huggingface/safetensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/handles.hpp"
#include "base/units.hpp"
#include "sluice/result.hpp"

namespace sluice::import {

// Size of the number in front of the header.
inline constexpr uint64_t kSafetensorsPrefixBytes = 8;
// The format's own limit. A header has about 150 bytes per tensor.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct SafetensorsTensor {
  std::string dtype;             // "F32", "F16", "BF16", and others that import does not read
  std::vector<uint64_t> shape;   // outermost first; empty for a scalar
  uint64_t offset = 0;           // in the file
  uint64_t bytes = 0;
};

using SafetensorsIndex = std::map<std::string, SafetensorsTensor, std::less<>>;

// Parses the header (its JSON alone) of a file of `file_bytes`. Tensors are inside the file and do not overlap; where the
// dtype is known, shape and size agree. `path` is for messages.
// Error: corrupt, naming the tensor.
Result<SafetensorsIndex> parse_safetensors_header(std::string_view header, uint64_t file_bytes, const std::string& path);

// The size of the header, from the first 8 bytes of a file of `file_bytes`.
// Error: corrupt (it is larger than the file or than any real one, or the file is too short to have one).
Result<uint64_t> safetensors_header_bytes(std::span<const std::byte> prefix, uint64_t file_bytes,
                                          const std::string& path);

// Reads and parses the header of an open file. Allocates the header's size and what its tensors need.
// Errors: io, corrupt.
Result<SafetensorsIndex> read_safetensors_header(const UniqueFd& fd, const std::string& path);

}  // namespace sluice::import
