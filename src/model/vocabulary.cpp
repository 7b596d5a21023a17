// SPDX-License-Identifier: Apache-2.0
#include "model/vocabulary.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <bit>

namespace sluice::model {
namespace {

constexpr size_t kMaxTokens = 1u << 24;
constexpr size_t kMaxTextBytes = 1u << 30;

size_t hash_of(std::string_view text) { return static_cast<size_t>(XXH3_64bits(text.data(), text.size())); }

}  // namespace

Result<Vocabulary> Vocabulary::create(const std::vector<std::string>& tokens) {
  if (tokens.size() > kMaxTokens) {
    return fail(ErrorCode::unsupported,
                fmt::format("tokenizer: {} tokens are more than the {} supported", tokens.size(), kMaxTokens));
  }
  size_t bytes = 0;
  for (const std::string& token : tokens) bytes += token.size();
  if (bytes > kMaxTextBytes) {
    return fail(ErrorCode::unsupported, fmt::format("tokenizer: {} bytes of token text are more than 1 GiB", bytes));
  }

  Vocabulary vocabulary;
  vocabulary.blob_.reserve(bytes);
  vocabulary.offsets_.reserve(tokens.size() + 1);
  vocabulary.slots_.assign(std::bit_ceil(2 * tokens.size() + 2), kNoToken);
  const size_t mask = vocabulary.slots_.size() - 1;
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string& token = tokens[id];
    vocabulary.blob_ += token;
    vocabulary.offsets_.push_back(static_cast<uint32_t>(vocabulary.blob_.size()));
    if (token.empty()) continue;
    size_t slot = hash_of(token) & mask;
    while (vocabulary.slots_[slot] != kNoToken && vocabulary.text(vocabulary.slots_[slot]) != token) {
      slot = (slot + 1) & mask;
    }
    if (vocabulary.slots_[slot] == kNoToken) vocabulary.slots_[slot] = static_cast<int32_t>(id);
  }
  return vocabulary;
}

int32_t Vocabulary::find(std::string_view wanted) const {
  if (wanted.empty() || slots_.empty()) return kNoToken;
  const size_t mask = slots_.size() - 1;
  for (size_t slot = hash_of(wanted) & mask; slots_[slot] != kNoToken; slot = (slot + 1) & mask) {
    if (text(slots_[slot]) == wanted) return slots_[slot];
  }
  return kNoToken;
}

std::string_view Vocabulary::text(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) + 1 >= offsets_.size()) return {};
  const auto at = static_cast<size_t>(id);
  return std::string_view(blob_).substr(offsets_[at], offsets_[at + 1] - offsets_[at]);
}

}  // namespace sluice::model
