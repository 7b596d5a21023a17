// SPDX-License-Identifier: Apache-2.0
// What a Tokenizer is made of; shared by encoding (tokenizer.cpp) and decoding (detokenizer.cpp) alone.
#pragma once

#include <vector>

#include "model/added_tokens.hpp"
#include "model/bpe.hpp"
#include "model/pre_tokenizer.hpp"
#include "model/tokenizer.hpp"
#include "model/vocabulary.hpp"

namespace sluice::model {

struct Tokenizer::Parts {
  Vocabulary vocabulary;
  AddedTokens added;
  Bpe bpe;
  PreTokenizer pre_tokenizer;
  std::vector<storage::TokenKind> kinds;  // may be empty: all normal
  bool sentencepiece;
  bool has_splits;
  bool nfc;
  bool add_prefix_space;
  storage::SpacePrefix space_prefix;
  int32_t bos;  // kNoToken: not added
  int32_t eos;
};

}  // namespace sluice::model
