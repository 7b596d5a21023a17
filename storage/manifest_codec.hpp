// SPDX-License-Identifier: Apache-2.0
// storage::Manifest to FlatBuffers bytes and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::storage {

// No manifest is larger: FlatBuffers addresses 2 GiB, and a 140 GB model with a tokenizer of 256k needs about 30 MiB.
inline constexpr uint64_t kMaxManifestBytes = 1 * kGiB;

// The manifest as FlatBuffers bytes. `path` is for the message. Error: unsupported (larger than kMaxManifestBytes).
Result<std::vector<std::byte>> encode_manifest(const Manifest& manifest, const std::string& path);

// Reads FlatBuffers bytes of unknown origin. `data` is 8-byte aligned and needed during the call only. Nothing is
// allocated by a count before that count was compared with its cap, and never more than a few times data.size().
// What the fields mean together is check_manifest's business. Error: corrupt, naming `path` and the field.
Result<Manifest> decode_manifest(std::span<const std::byte> data, const std::string& path);

}  // namespace sluice::storage
