// SPDX-License-Identifier: Apache-2.0
// Finds special and added tokens in text, before anything else looks at it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "model/vocabulary.hpp"
#include "storage/manifest.hpp"

namespace sluice::model {

// Immutable after construction; any thread. `vocabulary` holds the texts and is passed to each call.
class AddedTokens {
 public:
  struct Match {
    size_t begin = 0;  // of the text that the token replaces: white space that it swallows is inside
    size_t end = 0;
    int32_t id = kNoToken;
  };

  AddedTokens() = default;
  AddedTokens(const storage::TokenizerSpec& spec, const Vocabulary& vocabulary);

  // The first token at or after byte `from`, the longest one where several begin there. Without `special`, only added
  // tokens that are not special count.
  std::optional<Match> next(const Vocabulary& vocabulary, std::string_view text, size_t from, bool special) const;

 private:
  struct Entry {
    int32_t id;
    bool special;
    bool lstrip;
    bool rstrip;
  };
  const Entry* longest_at(const Vocabulary& vocabulary, std::string_view text, bool special) const;

  std::vector<Entry> sorted_;          // by text, bytewise
  std::array<bool, 256> begins_ = {};  // bytes that some token begins with
};

}  // namespace sluice::model
