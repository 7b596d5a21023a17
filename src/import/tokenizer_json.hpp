// SPDX-License-Identifier: Apache-2.0
// tokenizer.json and its neighbours in a Hugging Face folder, as a tokenizer specification.
#pragma once

#include <string>
#include <string_view>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

// Reads a byte-level or SentencePiece-style BPE tokenizer. `tokenizer_config_path` gives bos, eos, add_bos_token and the
// chat template (or chat_template.jinja beside it does), `generation_config_path` the tokens that stop a generation;
// either may be "". A file that is not there is `not_found`, one that is no such JSON `corrupt`, and a tokenizer whose
// parts this version does not reproduce exactly `unsupported`, naming the part.
Result<storage::TokenizerSpec> read_tokenizer_json(const std::string& path, const std::string& tokenizer_config_path,
                                                   const std::string& generation_config_path);

// The same from text in memory; an empty text is a file that is not there. `path` is for messages.
struct TokenizerTexts {
  std::string_view tokenizer;
  std::string_view tokenizer_config;
  std::string_view generation_config;
  std::string_view chat_template;  // chat_template.jinja; wins over the one in tokenizer_config
};
Result<storage::TokenizerSpec> parse_tokenizer_json(const TokenizerTexts& texts, const std::string& path);
Result<storage::TokenizerSpec> parse_tokenizer_json(std::string_view text, const std::string& path = "tokenizer.json");

}  // namespace sluice::import
