// SPDX-License-Identifier: Apache-2.0
// Text to token ids and back, from the specification that a container carries.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::model {

struct EncodeOptions {
  bool special = true;   // special tokens in the text are recognised; without, only added tokens that are not special
  bool bos_eos = false;  // add bos and eos as the specification asks
};

// Immutable after create; any thread may call any function at any time.
class Tokenizer {
 public:
  // Copies what it needs out of `spec`. A specification that contradicts itself is `corrupt`; a pattern, a model kind or
  // a size that is not handled is `unsupported`.
  static Result<Tokenizer> create(const storage::TokenizerSpec& spec);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Token ids of `text`. Malformed UTF-8 counts as U+FFFD. Up to 2 GiB of text; takes O(n log n).
  std::vector<int32_t> encode(std::string_view text, EncodeOptions options = {}) const;

  // Text of `ids`: what a StreamDecoder would give for them, always valid UTF-8. Ids that are not in the vocabulary give
  // nothing.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;

  // Raw bytes of one token, which need not be whole characters; empty for an id that is not in the vocabulary.
  std::string token_bytes(int32_t id) const;
  // The same, appended to `out`.
  void append_token_bytes(int32_t id, std::string& out) const;

  bool is_special(int32_t id) const;
  uint32_t size() const;

 private:
  friend class StreamDecoder;
  struct Parts;
  explicit Tokenizer(std::unique_ptr<const Parts> parts);
  void encode_segment(std::string_view segment, bool first, struct EncodeScratch& scratch,
                      std::vector<int32_t>& ids) const;
  bool is_sentencepiece() const;
  bool strips_first_space() const;

  std::unique_ptr<const Parts> parts_;
};

// Turns tokens into text as they come and never hands out a part of a UTF-8 character. One per generation, not thread
// safe; `tokenizer` must outlive it and stay where it is.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true);

  // Text that became final with this token; often empty in the middle of a character.
  std::string push(int32_t id);
  // The same, appended to `out`: no allocation where `out` has room.
  void push(int32_t id, std::string& out);
  // What is left: an unfinished character becomes U+FFFD. The decoder is then as new.
  std::string finish();

 private:
  void take(bool at_end, std::string& out);

  const Tokenizer* tokenizer_;
  bool skip_special_;
  bool at_start_ = true;  // no text yet: a SentencePiece model's first space is not text
  std::string pending_;   // bytes that are not text yet
};

// Tokens that end a turn in the chat formats of the supported models ("<|eot_id|>", "<|im_end|>", ...), as far as `spec`
// has them as special tokens. Importers add them to stop_ids where the checkpoint names only eos.
std::vector<int32_t> end_of_turn_ids(const storage::TokenizerSpec& spec);

}  // namespace sluice::model
