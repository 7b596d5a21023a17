// SPDX-License-Identifier: Apache-2.0
#include "model/tokenizer.hpp"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "model/added_tokens.hpp"
#include "model/bpe.hpp"
#include "model/pre_tokenizer.hpp"
#include "model/tokenizer_parts.hpp"
#include "model/utf8.hpp"
#include "model/vocabulary.hpp"

namespace sluice::model {

// What one call of encode reuses from segment to segment.
struct EncodeScratch {
  std::string normalized;
  std::string prefixed;
  std::vector<std::string_view> pieces;
  BpeScratch bpe;
};

namespace {

constexpr std::string_view kSpaceSymbol = "\xe2\x96\x81";  // U+2581, SentencePiece's space

// Characters below U+0300 are their own NFC, alone and in a row; lead bytes from 0xCC on begin the others.
bool may_change_under_nfc(std::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) >= 0xcc; });
}

// The NFC of valid UTF-8, in `storage` unless it is the text itself.
std::string_view to_nfc(std::string_view text, std::string& storage) {
  if (!may_change_under_nfc(text)) return text;
  utf8proc_uint8_t* composed = nullptr;
  const utf8proc_ssize_t bytes =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &composed, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (bytes < 0) return text;  // out of memory: valid input has no other failure
  storage.assign(reinterpret_cast<const char*>(composed), static_cast<size_t>(bytes));
  std::free(composed);
  return storage;
}

Status check_ids(const storage::TokenizerSpec& spec) {
  const auto check = [&](int32_t id, const char* what, bool may_be_absent) -> Status {
    if (id >= 0 && static_cast<size_t>(id) < spec.tokens.size()) return {};
    if (id < 0 && may_be_absent) return {};
    return fail(ErrorCode::corrupt,
                fmt::format("tokenizer: {} token {} is not among the {} tokens", what, id, spec.tokens.size()));
  };
  SLUICE_TRY(check(spec.bos, "bos", true));
  SLUICE_TRY(check(spec.eos, "eos", true));
  SLUICE_TRY(check(spec.unknown, "unknown", true));
  for (const int32_t id : spec.stop_ids) SLUICE_TRY(check(id, "stop", false));
  for (const int32_t id : spec.rstrip_ids) SLUICE_TRY(check(id, "rstrip", false));
  for (const int32_t id : spec.lstrip_ids) SLUICE_TRY(check(id, "lstrip", false));
  return {};
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<const Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<Tokenizer> Tokenizer::create(const storage::TokenizerSpec& spec) {
  if (spec.model != storage::TokenizerModel::byte_level_bpe &&
      spec.model != storage::TokenizerModel::sentencepiece_bpe) {
    return fail(ErrorCode::unsupported,
                "this model carries no tokenizer; import it again from a source that has one, or pass token ids");
  }
  if (spec.tokens.empty()) return fail(ErrorCode::corrupt, "tokenizer: the vocabulary is empty");
  if (!spec.kinds.empty() && spec.kinds.size() != spec.tokens.size()) {
    return fail(ErrorCode::corrupt,
                fmt::format("tokenizer: {} token kinds for {} tokens", spec.kinds.size(), spec.tokens.size()));
  }
  SLUICE_TRY(check_ids(spec));
  SLUICE_TRY_ASSIGN(vocabulary, Vocabulary::create(spec.tokens));
  SLUICE_TRY_ASSIGN(bpe, Bpe::create(spec, vocabulary));
  SLUICE_TRY_ASSIGN(pre_tokenizer, PreTokenizer::create(spec.splits));
  AddedTokens added(spec, vocabulary);
  return Tokenizer(std::unique_ptr<const Parts>(new Parts{
      std::move(vocabulary), std::move(added), std::move(bpe), std::move(pre_tokenizer), spec.kinds,
      spec.model == storage::TokenizerModel::sentencepiece_bpe, !spec.splits.empty(), spec.nfc, spec.add_prefix_space,
      spec.space_prefix, spec.add_bos ? spec.bos : kNoToken, spec.add_eos ? spec.eos : kNoToken}));
}

// Added tokens split the text first, and everything else sees only what is between them.
std::vector<int32_t> Tokenizer::encode(std::string_view raw, EncodeOptions options) const {
  std::string storage;
  const std::string_view text = valid_utf8(raw, storage);
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 4 + 2);
  EncodeScratch scratch;
  if (options.bos_eos && parts_->bos != kNoToken) ids.push_back(parts_->bos);
  size_t done = 0;
  while (done < text.size()) {
    const auto match = parts_->added.next(parts_->vocabulary, text, done, options.special);
    const size_t until = match ? match->begin : text.size();
    encode_segment(text.substr(done, until - done), done == 0, scratch, ids);
    if (!match) break;
    ids.push_back(match->id);
    done = match->end;
  }
  if (options.bos_eos && parts_->eos != kNoToken) ids.push_back(parts_->eos);
  return ids;
}

void Tokenizer::encode_segment(std::string_view segment, bool first, EncodeScratch& scratch,
                               std::vector<int32_t>& ids) const {
  using storage::SpacePrefix;
  if (segment.empty()) return;
  if (parts_->nfc) segment = to_nfc(segment, scratch.normalized);
  if (parts_->sentencepiece) {
    // Every space becomes U+2581, and one more may go before the text.
    const bool has_space = segment.front() == ' ' || segment.substr(0, kSpaceSymbol.size()) == kSpaceSymbol;
    const bool prefix = parts_->add_prefix_space &&
                        (parts_->space_prefix == SpacePrefix::always ||
                         (!has_space && (first || parts_->space_prefix == SpacePrefix::if_missing)));
    scratch.prefixed.clear();
    if (prefix) scratch.prefixed += kSpaceSymbol;
    for (const char c : segment) {
      if (c == ' ') {
        scratch.prefixed += kSpaceSymbol;
      } else {
        scratch.prefixed += c;
      }
    }
    segment = scratch.prefixed;
  } else if (parts_->add_prefix_space && segment.front() != ' ') {
    scratch.prefixed.assign(1, ' ');
    scratch.prefixed += segment;
    segment = scratch.prefixed;
  }
  if (!parts_->has_splits) {
    parts_->bpe.encode(parts_->vocabulary, segment, scratch.bpe, ids);
    return;
  }
  scratch.pieces.clear();
  parts_->pre_tokenizer.split(segment, scratch.pieces);
  for (const std::string_view piece : scratch.pieces) {
    parts_->bpe.encode(parts_->vocabulary, piece, scratch.bpe, ids);
  }
}

bool Tokenizer::is_special(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= parts_->kinds.size()) return false;
  const storage::TokenKind kind = parts_->kinds[static_cast<size_t>(id)];
  return kind == storage::TokenKind::special || kind == storage::TokenKind::unknown;
}

uint32_t Tokenizer::size() const { return parts_->vocabulary.size(); }

std::vector<int32_t> end_of_turn_ids(const storage::TokenizerSpec& spec) {
  constexpr std::array<std::string_view, 9> kTexts = {
      "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>",
      "<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>",  // DeepSeek
      "<|EOT|>", "</s>"};
  std::vector<int32_t> ids;
  for (size_t id = 0; id < spec.tokens.size() && id < spec.kinds.size(); ++id) {
    if (spec.kinds[id] == storage::TokenKind::special &&
        std::find(kTexts.begin(), kTexts.end(), spec.tokens[id]) != kTexts.end()) {
      ids.push_back(static_cast<int32_t>(id));
    }
  }
  return ids;
}

}  // namespace sluice::model
