// SPDX-License-Identifier: Apache-2.0
// Pre-tokenizers: regular expressions that cut text into the pieces that BPE merges within.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::model {

// The GPT-2 pattern, which a ByteLevel pre-tokenizer with use_regex stands for.
std::string_view gpt2_split_pattern();

// The steps that a GGUF's tokenizer.ggml.pre stands for. `ignore_merges` and `nfc`, not null, receive what that
// tokenizer does beside splitting. A name that is not known: `unsupported`, naming it; outputs untouched.
Result<std::vector<storage::SplitStep>> pre_tokenizer_by_name(std::string_view gguf_pre, bool* ignore_merges,
                                                              bool* nfc);

// A pattern as found in tokenizer.json, for PCRE2: \s and \S, in and out of brackets, become the White_Space property.
// PCRE2's own \s contains U+180E even with UCP, Oniguruma's does not, and then text would split otherwise than where the
// model was trained.
std::string with_explicit_white_space(std::string_view pattern);

// The compiled steps. Immutable after create; any thread.
class PreTokenizer {
 public:
  static Result<PreTokenizer> create(const std::vector<storage::SplitStep>& steps);
  PreTokenizer(PreTokenizer&&) noexcept;
  PreTokenizer& operator=(PreTokenizer&&) noexcept;
  ~PreTokenizer();

  // Cuts `text`, which must be valid UTF-8, into pieces that borrow from it, appended to `pieces`. What a `removed`
  // step takes out is in none. Where the regular expression gives up (its match limit), the rest is one piece.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  struct Step;
  PreTokenizer();
  std::vector<Step> steps_;
};

}  // namespace sluice::model
