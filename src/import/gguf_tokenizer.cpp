// SPDX-License-Identifier: Apache-2.0
#include "import/gguf_tokenizer.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "import/text.hpp"
#include "model/tokenizer.hpp"
#include "model/pre_tokenizer.hpp"

namespace sluice::import {
namespace {

using storage::TokenizerModel;
using storage::TokenizerSpec;
using storage::TokenKind;

TokenKind kind_of(int64_t gguf_type) {
  switch (gguf_type) {
    case 2: return TokenKind::unknown;
    case 3: return TokenKind::special;
    case 4: return TokenKind::added;
    case 5: return TokenKind::unused;
    case 6: return TokenKind::byte;
    default: return TokenKind::normal;
  }
}

// llama.cpp puts a begin token before Llama 3 texts when the file does not say; files of that time rely on it.
bool adds_bos_unasked(TokenizerModel model, std::string_view pre) {
  if (model == TokenizerModel::sentencepiece_bpe) return true;
  return pre == "llama3" || pre == "llama-v3" || pre == "llama-bpe";
}

Result<int32_t> token_id(const Gguf& gguf, const char* key, size_t tokens, int32_t otherwise) {
  SLUICE_TRY_ASSIGN(id, gguf.unsigned_integer(key));
  if (!id) return otherwise;
  if (*id >= tokens) {
    // 2^32 - 1 is how some writers say "none".
    if (*id == 0xffffffffu) return -1;
    return fail(ErrorCode::corrupt, fmt::format("{}: key {} is {}, the vocabulary has {} tokens", gguf.path(),
                                                in_quotes(key), *id, tokens));
  }
  return static_cast<int32_t>(*id);
}

Status read_tokens(const Gguf& gguf, uint32_t vocab, const LogHook& log, TokenizerSpec& spec) {
  SLUICE_TRY_ASSIGN(tokens, gguf.strings("tokenizer.ggml.tokens"));
  SLUICE_TRY_ASSIGN(types, gguf.integers("tokenizer.ggml.token_type"));
  SLUICE_TRY_ASSIGN(scores, gguf.floats("tokenizer.ggml.scores"));
  if (tokens.empty()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: tokenizer.ggml.tokens is missing; convert the model again",
                                                gguf.path()));
  }
  const size_t count = tokens.size();
  if ((!types.empty() && types.size() != count) || (!scores.empty() && scores.size() != count)) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the tokenizer has {} tokens, {} types and {} scores", gguf.path(),
                                                count, types.size(), scores.size()));
  }
  for (const int64_t type : types) spec.kinds.push_back(kind_of(type));
  spec.kinds.resize(count, TokenKind::normal);
  spec.tokens = std::move(tokens);
  if (spec.model == TokenizerModel::sentencepiece_bpe) spec.scores = std::move(scores);
  if (count > vocab) {
    log_warning(log, fmt::format("{}: the tokenizer has {} tokens, the embedding {} rows; the tokens from {} on are "
                                 "dropped", gguf.path(), count, vocab, vocab));
    spec.tokens.resize(vocab);
    spec.kinds.resize(vocab);
    if (!spec.scores.empty()) spec.scores.resize(vocab);
  }
  return {};
}

Status read_ids(const Gguf& gguf, bool sentencepiece, TokenizerSpec& spec) {
  const size_t tokens = spec.tokens.size();
  const auto if_there = [&](int32_t id) { return sentencepiece && static_cast<size_t>(id) < tokens ? id : -1; };
  SLUICE_TRY_ASSIGN(bos, token_id(gguf, "tokenizer.ggml.bos_token_id", tokens, if_there(1)));
  SLUICE_TRY_ASSIGN(eos, token_id(gguf, "tokenizer.ggml.eos_token_id", tokens, if_there(2)));
  SLUICE_TRY_ASSIGN(unknown, token_id(gguf, "tokenizer.ggml.unknown_token_id", tokens, if_there(0)));
  SLUICE_TRY_ASSIGN(eot, token_id(gguf, "tokenizer.ggml.eot_token_id", tokens, -1));
  SLUICE_TRY_ASSIGN(eom, token_id(gguf, "tokenizer.ggml.eom_token_id", tokens, -1));
  spec.bos = bos;
  spec.eos = eos;
  spec.unknown = unknown;
  for (const int32_t id : {eos, eot, eom}) {
    if (id >= 0) spec.stop_ids.push_back(id);
  }
  for (const int32_t id : model::end_of_turn_ids(spec)) spec.stop_ids.push_back(id);
  std::sort(spec.stop_ids.begin(), spec.stop_ids.end());
  spec.stop_ids.erase(std::unique(spec.stop_ids.begin(), spec.stop_ids.end()), spec.stop_ids.end());
  return {};
}

}  // namespace

Result<TokenizerSpec> read_gguf_tokenizer(const Gguf& gguf, uint32_t vocab, const LogHook& log) {
  TokenizerSpec spec;
  SLUICE_TRY_ASSIGN(model, gguf.string("tokenizer.ggml.model"));
  if (model.empty() || model == "no_vocab" || model == "none") {
    log_warning(log, fmt::format("{}: no tokenizer in the file; the container takes token ids only", gguf.path()));
    return spec;
  }
  const bool sentencepiece = model == "llama";
  if (!sentencepiece && model != "gpt2") {
    return fail(ErrorCode::unsupported, fmt::format("{}: tokenizer model {}; supported are \"gpt2\" and \"llama\"",
                                                    gguf.path(), in_quotes(model)));
  }
  spec.model = sentencepiece ? TokenizerModel::sentencepiece_bpe : TokenizerModel::byte_level_bpe;
  SLUICE_TRY(read_tokens(gguf, vocab, log, spec));
  SLUICE_TRY_ASSIGN(pre, gguf.string("tokenizer.ggml.pre", "default"));
  SLUICE_TRY_ASSIGN(merges, gguf.strings("tokenizer.ggml.merges"));
  spec.merges = std::move(merges);
  if (sentencepiece) {
    spec.byte_fallback = true;
    if (spec.merges.empty() && spec.scores.empty()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: the tokenizer has neither merges nor scores", gguf.path()));
    }
  } else {
    if (spec.merges.empty()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: the tokenizer has no merges; convert the model again",
                                                  gguf.path()));
    }
    auto splits = model::pre_tokenizer_by_name(pre, &spec.ignore_merges, &spec.nfc);
    if (!splits) {
      splits.error().message = gguf.path() + ": " + splits.error().message;
      return fail(std::move(splits.error()));
    }
    spec.splits = std::move(*splits);
  }
  SLUICE_TRY(read_ids(gguf, sentencepiece, spec));
  SLUICE_TRY_ASSIGN(add_bos, gguf.boolean("tokenizer.ggml.add_bos_token"));
  SLUICE_TRY_ASSIGN(add_eos, gguf.boolean("tokenizer.ggml.add_eos_token"));
  SLUICE_TRY_ASSIGN(space, gguf.boolean("tokenizer.ggml.add_space_prefix"));
  spec.add_bos = add_bos.value_or(adds_bos_unasked(spec.model, pre)) && spec.bos >= 0;
  spec.add_eos = add_eos.value_or(false) && spec.eos >= 0;
  spec.add_prefix_space = space.value_or(sentencepiece);
  SLUICE_TRY_ASSIGN(chat_template, gguf.string("tokenizer.chat_template"));
  spec.chat_template = std::move(chat_template);
  return spec;
}

}  // namespace sluice::import
