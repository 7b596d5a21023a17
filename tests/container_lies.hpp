// SPDX-License-Identifier: Apache-2.0
// Containers that lie with valid checksums: manifests and headers changed after the fact, FlatBuffers no writer would make.
#pragma once

#include <flatbuffers/flatbuffers.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "storage/checksum.hpp"
#include "storage/container_header.hpp"
#include "storage/manifest_codec.hpp"
#include "storage/manifest_generated.h"

namespace sluice::test {

// A container file as bytes, with its manifest replaced and moved to `manifest_offset` (planes are cut or grow by zeros);
// the header's sizes and sums follow.
inline std::vector<std::byte> with_manifest(std::vector<std::byte> file, std::span<const std::byte> manifest,
                                            uint64_t manifest_offset) {
  storage::ContainerHeader header;
  header.manifest_offset = manifest_offset;
  header.manifest_bytes = manifest.size();
  header.manifest_sum = storage::checksum(manifest);
  header.file_bytes = manifest_offset + align_up(manifest.size(), storage::kPlaneAlignment);
  const storage::HeaderBytes header_bytes = storage::encode_header(header);
  file.resize(manifest_offset);
  file.resize(header.file_bytes);
  std::memcpy(file.data(), header_bytes.data(), header_bytes.size());
  std::memcpy(file.data() + manifest_offset, manifest.data(), manifest.size());
  return file;
}

inline std::vector<std::byte> file_bytes_of(const std::string& path) {
  std::vector<std::byte> bytes(std::filesystem::file_size(path));
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

inline storage::ContainerHeader header_of(const std::string& path) {
  const auto bytes = file_bytes_of(path);
  auto header = storage::decode_header(std::span(bytes).first<storage::kHeaderBytes>(), bytes.size(), path);
  return *header;
}

inline void rewrite_header(const std::string& path, const std::function<void(storage::ContainerHeader&)>& change) {
  storage::ContainerHeader header;
  change(header);
  const storage::HeaderBytes bytes = storage::encode_header(header);
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// Lays the planes of all tensors out anew and returns where they end.
inline uint64_t pack_planes(storage::Manifest& manifest) {
  uint64_t offset = storage::kHeaderBytes;
  for (storage::Tensor& tensor : manifest.tensors) {
    for (storage::Plane& plane : tensor.planes) {
      plane.offset = offset;
      offset += plane.padded_bytes();
    }
  }
  return offset;
}

inline void add_plane(storage::Tensor& tensor, storage::PlaneKind kind) {
  storage::Plane plane;
  plane.kind = kind;
  plane.bytes = storage::expected_plane_bytes(tensor, kind);
  plane.block_sums.resize(ceil_div(plane.bytes, storage::kBlockBytes));
  tensor.planes.push_back(std::move(plane));
}

// Copies container `from` to `to` with its manifest changed. `pack`: lays the planes out anew after the change, so that a
// lie about one thing is not caught by the offsets of the rest.
inline void rewrite_manifest(const std::string& from, const std::string& to,
                             const std::function<void(storage::Manifest&)>& change, bool pack) {
  auto file = file_bytes_of(from);
  const storage::ContainerHeader header = header_of(from);
  std::vector<std::byte> encoded(file.begin() + static_cast<ptrdiff_t>(header.manifest_offset),
                                 file.begin() + static_cast<ptrdiff_t>(header.manifest_offset + header.manifest_bytes));
  storage::Manifest manifest = *storage::decode_manifest(encoded, from);
  change(manifest);
  const uint64_t manifest_offset = pack ? pack_planes(manifest) : header.manifest_offset;
  encoded = *storage::encode_manifest(manifest, to);
  file = with_manifest(std::move(file), encoded, manifest_offset);
  std::ofstream out(to, std::ios::binary | std::ios::trunc);
  out.write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
}

inline std::vector<std::byte> finished(flatbuffers::FlatBufferBuilder& builder,
                                       flatbuffers::Offset<storage::fb::Manifest> root) {
  storage::fb::FinishManifestBuffer(builder, root);
  const auto* bytes = reinterpret_cast<const std::byte*>(builder.GetBufferPointer());
  return {bytes, bytes + builder.GetSize()};
}

// A manifest whose tokens are `count` references to one string of `bytes`.
inline std::vector<std::byte> aliased_tokens(uint32_t count, uint32_t bytes) {
  namespace fb = storage::fb;
  flatbuffers::FlatBufferBuilder builder;
  const auto text = builder.CreateString(std::string(bytes, 'x'));
  const auto tokens = builder.CreateVector(std::vector<flatbuffers::Offset<flatbuffers::String>>(count, text));
  const auto tokenizer = fb::CreateTokenizer(builder, fb::TokenizerModel::byte_level_bpe, tokens);
  const auto hyper = fb::CreateHyperParameters(builder);
  const auto rope = fb::CreateRope(builder);
  const auto tensors = builder.CreateVector(std::vector<flatbuffers::Offset<fb::Tensor>>());
  return finished(builder, fb::CreateManifest(builder, 0, 0, hyper, rope, tokenizer, 0, tensors));
}

// Manifests that lack what every manifest has, and what the refusal names.
inline std::vector<std::pair<std::vector<std::byte>, std::string>> partial_manifests() {
  namespace fb = storage::fb;
  std::vector<std::pair<std::vector<std::byte>, std::string>> manifests;
  for (int missing = 0; missing < 4; ++missing) {
    flatbuffers::FlatBufferBuilder builder;
    const auto hyper = fb::CreateHyperParameters(builder);
    const auto rope = fb::CreateRope(builder);
    const auto tensor = fb::CreateTensor(builder);  // no name, no planes
    const auto tensors = builder.CreateVector(&tensor, 1);
    fb::ManifestBuilder root(builder);
    if (missing != 0) root.add_hyper(hyper);
    if (missing != 1) root.add_rope(rope);
    if (missing != 2) root.add_tensors(tensors);
    static const char* const kReasons[] = {"hyper is missing", "rope is missing", "tensors is missing",
                                           "planes is missing"};
    manifests.emplace_back(finished(builder, root.Finish()), kReasons[missing]);
  }
  manifests.emplace_back(std::vector<std::byte>(8), "manifest of 8 bytes");
  manifests.emplace_back(std::vector<std::byte>(64), "not a valid FlatBuffer");
  return manifests;
}

}  // namespace sluice::test
