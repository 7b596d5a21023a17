// SPDX-License-Identifier: Apache-2.0
// The token texts of a tokenizer: one blob, and a flat hash table from text to id. 128k tokens take about 3 MB.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/result.hpp"

namespace sluice::model {

inline constexpr int32_t kNoToken = -1;

// Immutable after create; any thread.
class Vocabulary {
 public:
  // Texts by id. An empty text is a hole that `find` never returns; of equal texts the first is found.
  static Result<Vocabulary> create(const std::vector<std::string>& tokens);

  // The id of exactly this text, or kNoToken.
  int32_t find(std::string_view text) const;
  std::string_view text(int32_t id) const;  // empty for an id that is not there
  uint32_t size() const { return static_cast<uint32_t>(offsets_.size() - 1); }

 private:
  std::string blob_;
  std::vector<uint32_t> offsets_ = {0};  // size() + 1
  std::vector<int32_t> slots_;           // open addressing, a power of two, at most half full
};

}  // namespace sluice::model
