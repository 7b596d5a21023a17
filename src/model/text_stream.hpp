// SPDX-License-Identifier: Apache-2.0
// Generated tokens in, final text out: whole characters, and nothing that may yet become part of a stop text.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer.hpp"

namespace sluice::model {

// One per generation, not thread safe. `tokenizer` (null: no text at all) and `stops` must outlive it; empty stops are
// ignored. No allocation per token as long as less than 4 KiB are held back.
class TextStream {
 public:
  TextStream(const Tokenizer* tokenizer, const std::vector<std::string>& stops);

  // Takes a token; ready() is then the text that became final with it. True: a stop text is complete, and ready() is what
  // stood before it. `last`: no token follows, so nothing is held back.
  bool push(int32_t id, bool last);
  // The end without a further token: ready() is all that was held back. Returns as push does.
  bool finish();
  std::string_view ready() const { return ready_; }

 private:
  bool release(bool all);

  std::optional<StreamDecoder> decoder_;
  const std::vector<std::string>& stops_;
  std::string held_, ready_;
};

}  // namespace sluice::model
