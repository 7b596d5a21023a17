// SPDX-License-Identifier: Apache-2.0
#include "storage/container_header.hpp"

#include <fmt/format.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>

#include "base/units.hpp"
#include "storage/checksum.hpp"
#include "storage/manifest_codec.hpp"

namespace sluice::storage {

// Fields are copied as they lie in memory; a big-endian build would need byte swaps here and in every kernel.
static_assert(std::endian::native == std::endian::little);

namespace {

// Byte offsets of the fields. docs/container.md has the same table.
constexpr size_t kMagicAt = 0;
constexpr size_t kVersionAt = 8;
constexpr size_t kHeaderBytesAt = 12;
constexpr size_t kManifestOffsetAt = 16;
constexpr size_t kManifestBytesAt = 24;
constexpr size_t kManifestSumAt = 32;
constexpr size_t kFileBytesAt = 40;
constexpr size_t kUuidAt = 48;
constexpr size_t kHeaderSumAt = kHeaderBytes - 8;

template <class T>
void put(HeaderBytes& bytes, size_t at, const T& value) {
  std::memcpy(bytes.data() + at, &value, sizeof(T));
}

template <class T>
T get(std::span<const std::byte> bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

size_t matching_magic_bytes(std::span<const std::byte> start) {
  size_t matching = 0;
  for (size_t i = 0; i < std::min(start.size(), kMagic.size()); ++i) {
    if (static_cast<char>(start[i]) == kMagic[i]) ++matching;
  }
  return matching;
}

Unexpected foreign(std::span<const std::byte> start, const std::string& path) {
  std::string shown;
  for (size_t i = 0; i < std::min(start.size(), kMagic.size()); ++i) {
    const auto byte = static_cast<unsigned char>(start[i]);
    shown += byte >= 0x20 && byte < 0x7f ? std::string(1, static_cast<char>(byte)) : fmt::format("\\x{:02x}", byte);
  }
  return fail(ErrorCode::corrupt,
              fmt::format("{}: not a Sluice container (magic \"{}\"); import a GGUF file or a Hugging Face folder with "
                          "`sluice import`",
                          path, shown));
}

}  // namespace

HeaderBytes encode_header(const ContainerHeader& header) {
  HeaderBytes bytes = {};
  put(bytes, kMagicAt, kMagic);
  put(bytes, kVersionAt, header.version);
  put(bytes, kHeaderBytesAt, static_cast<uint32_t>(kHeaderBytes));
  put(bytes, kManifestOffsetAt, header.manifest_offset);
  put(bytes, kManifestBytesAt, header.manifest_bytes);
  put(bytes, kManifestSumAt, header.manifest_sum);
  put(bytes, kFileBytesAt, header.file_bytes);
  put(bytes, kUuidAt, header.uuid);
  put(bytes, kHeaderSumAt, checksum(std::span(bytes).first(kHeaderSumAt)));
  return bytes;
}

Result<ContainerHeader> decode_header(std::span<const std::byte, kHeaderBytes> bytes, uint64_t file_bytes,
                                      const std::string& path) {
  const bool sum_fits = get<uint64_t>(bytes, kHeaderSumAt) == checksum(bytes.first(kHeaderSumAt));
  // With a wrong checksum, most of the magic in place tells a damaged container from a file of another kind.
  if (!sum_fits && matching_magic_bytes(bytes) >= 6) {
    return fail(ErrorCode::corrupt,
                fmt::format("{}: the header checksum does not fit: the first {} bytes are damaged; copy or import the "
                            "file again",
                            path, kHeaderBytes));
  }
  if (matching_magic_bytes(bytes) != kMagic.size()) return foreign(bytes, path);

  ContainerHeader header;
  header.version = get<uint32_t>(bytes, kVersionAt);
  header.manifest_offset = get<uint64_t>(bytes, kManifestOffsetAt);
  header.manifest_bytes = get<uint64_t>(bytes, kManifestBytesAt);
  header.manifest_sum = get<uint64_t>(bytes, kManifestSumAt);
  header.file_bytes = get<uint64_t>(bytes, kFileBytesAt);
  header.uuid = get<std::array<uint8_t, 16>>(bytes, kUuidAt);
  if (header.version > kFormatVersion) {
    return fail(ErrorCode::unsupported, fmt::format("{}: format version {} is newer than this Sluice reads ({}); update "
                                                    "Sluice",
                                                    path, header.version, kFormatVersion));
  }
  if (header.version == 0) return fail(ErrorCode::corrupt, fmt::format("{}: format version 0 does not exist", path));
  if (const auto header_bytes = get<uint32_t>(bytes, kHeaderBytesAt); header_bytes != kHeaderBytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: header says it has {} bytes, version 1 has {}", path, header_bytes,
                                                kHeaderBytes));
  }

  if (file_bytes < header.file_bytes) {
    return fail(ErrorCode::corrupt,
                fmt::format("{}: truncated: header says {} bytes, file has {}; copy or import the file again", path,
                            header.file_bytes, file_bytes));
  }
  if (file_bytes > header.file_bytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: header says {} bytes, file has {}: something was appended to it",
                                                path, header.file_bytes, file_bytes));
  }
  // From here file_bytes is what the file system says, so that sums below cannot wrap.
  if (header.manifest_offset % kPlaneAlignment != 0 || header.manifest_offset < kHeaderBytes ||
      header.manifest_offset >= file_bytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: manifest offset {} is not a multiple of {} inside the file of {} "
                                                "bytes",
                                                path, header.manifest_offset, kPlaneAlignment, file_bytes));
  }
  const uint64_t room = file_bytes - header.manifest_offset;
  if (header.manifest_bytes == 0 || header.manifest_bytes > kMaxManifestBytes || header.manifest_bytes > room ||
      align_up(header.manifest_bytes, kPlaneAlignment) != room) {
    return fail(ErrorCode::corrupt, fmt::format("{}: manifest at offset {} says {} bytes, {} are left for it and its "
                                                "padding",
                                                path, header.manifest_offset, header.manifest_bytes, room));
  }
  return header;
}

Error short_file_error(std::span<const std::byte> start, const std::string& path) {
  if (start.empty()) return Error{ErrorCode::corrupt, fmt::format("{}: the file is empty", path)};
  const size_t comparable = std::min(start.size(), kMagic.size());
  if (matching_magic_bytes(start) != comparable) return foreign(start, path).error;
  return Error{ErrorCode::corrupt, fmt::format("{}: truncated: the header alone has {} bytes, file has {}; copy or "
                                               "import the file again",
                                               path, kHeaderBytes, start.size())};
}

std::array<uint8_t, 16> random_uuid() {
  std::array<uint8_t, 16> uuid = {};
  if (::getrandom(uuid.data(), uuid.size(), 0) != static_cast<ssize_t>(uuid.size())) {
    // Refused (an old kernel, a sandbox): it names files apart, it keeps no secret.
    const int64_t now = std::chrono::system_clock::now().time_since_epoch().count();
    const int64_t process = ::getpid();
    std::memcpy(uuid.data(), &now, sizeof(now));
    std::memcpy(uuid.data() + 8, &process, sizeof(process));
  }
  uuid[6] = static_cast<uint8_t>((uuid[6] & 0x0f) | 0x40);
  uuid[8] = static_cast<uint8_t>((uuid[8] & 0x3f) | 0x80);
  return uuid;
}

std::string format_uuid(std::span<const uint8_t, 16> uuid) {
  std::string text;
  for (size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += fmt::format("{:02x}", uuid[i]);
  }
  return text;
}

}  // namespace sluice::storage
