// SPDX-License-Identifier: Apache-2.0
// What the container's test files share.
#pragma once

#include <fcntl.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/handles.hpp"
#include "catch.hpp"
#include "storage/manifest.hpp"
#include "tiny_container.hpp"

namespace sluice::test {

// The smallest container that has every kind of plane the default schemes bring: one layer, a manifest of a few KiB.
inline TinyOptions smallest() {
  TinyOptions options;
  options.hyper = tiny_hyper();
  options.hyper.layers = 1;
  options.hyper.hidden = 16;
  options.hyper.heads = 1;
  options.hyper.kv_heads = 1;
  options.hyper.head_dim = 4;
  options.hyper.ffn = 8;
  options.hyper.vocab = 8;
  return options;
}

inline storage::TokenizerSpec every_tokenizer_field() {
  storage::TokenizerSpec tokenizer;
  tokenizer.model = storage::TokenizerModel::sentencepiece_bpe;
  tokenizer.tokens = {"<s>", std::string("a\0b", 3), "\xff\xfe not UTF-8", "", "\xe2\x96\x81the"};
  tokenizer.kinds = {storage::TokenKind::special, storage::TokenKind::normal, storage::TokenKind::byte, storage::TokenKind::unused, storage::TokenKind::added};
  tokenizer.scores = {0, -1.5f, -1e9f, 3, -std::numeric_limits<float>::infinity()};
  tokenizer.merges = {"a b", "ab c"};
  tokenizer.splits = {{"\\p{L}+", storage::SplitBehavior::removed, true}, {" ", storage::SplitBehavior::isolated, false}};
  tokenizer.nfc = tokenizer.ignore_merges = tokenizer.byte_fallback = tokenizer.add_prefix_space = true;
  tokenizer.space_prefix = storage::SpacePrefix::first_if_missing;
  tokenizer.add_bos = tokenizer.add_eos = true;
  tokenizer.bos = 0;
  tokenizer.eos = 4;
  tokenizer.unknown = 3;
  tokenizer.stop_ids = {4, 0};
  tokenizer.rstrip_ids = {1};
  tokenizer.lstrip_ids = {2, 3};
  tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}";
  return tokenizer;
}

inline std::vector<std::byte> read_all(const std::string& path) {
  std::vector<std::byte> bytes(std::filesystem::file_size(path));
  auto fd = open_file(path, O_RDONLY);
  REQUIRE(fd);
  REQUIRE(read_exactly(fd->get(), bytes, 0, path));
  return bytes;
}

inline void write_all(const std::string& path, std::span<const std::byte> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

inline bool mentions(const Error& error, std::string_view text) {
  const bool found = error.message.find(text) != std::string::npos;
  if (!found) UNSCOPED_INFO("message: " << error.message << " | wanted: " << text);
  return found;
}

inline size_t entries_in(const std::string& folder) {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

}  // namespace sluice::test
