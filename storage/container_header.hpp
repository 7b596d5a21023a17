// SPDX-License-Identifier: Apache-2.0
// The first 4096 bytes of a container.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "sluice/result.hpp"
#include "storage/container.hpp"

namespace sluice::storage {

// As in PNG, the line end shows what a transfer in text mode did to the file.
inline constexpr std::array<char, 8> kMagic = {'S', 'L', 'U', 'I', 'C', 'E', '\r', '\n'};

struct ContainerHeader {
  uint32_t version = kFormatVersion;
  uint64_t manifest_offset = 0;
  uint64_t manifest_bytes = 0;
  uint64_t manifest_sum = 0;
  uint64_t file_bytes = 0;
  std::array<uint8_t, 16> uuid = {};
};

using HeaderBytes = std::array<std::byte, kHeaderBytes>;

HeaderBytes encode_header(const ContainerHeader& header);

// Checks the header of a file that is `file_bytes` long: its checksum, magic, version, and every size against the file.
// Errors: corrupt (foreign, damaged or truncated), unsupported (a newer version).
Result<ContainerHeader> decode_header(std::span<const std::byte, kHeaderBytes> bytes, uint64_t file_bytes,
                                      const std::string& path);

// The error of a file that is too short to hold a header; `start` is all of it.
Error short_file_error(std::span<const std::byte> start, const std::string& path);

// A random (version 4) UUID.
std::array<uint8_t, 16> random_uuid();
// "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx".
std::string format_uuid(std::span<const uint8_t, 16> uuid);

}  // namespace sluice::storage
