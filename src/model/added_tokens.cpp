// SPDX-License-Identifier: Apache-2.0
#include "model/added_tokens.hpp"

#include <algorithm>

#include "model/utf8.hpp"

namespace sluice::model {
namespace {

bool contains(const std::vector<int32_t>& ids, int32_t id) { return std::find(ids.begin(), ids.end(), id) != ids.end(); }

}  // namespace

AddedTokens::AddedTokens(const storage::TokenizerSpec& spec, const Vocabulary& vocabulary) {
  using storage::TokenKind;
  for (size_t i = 0; i < spec.kinds.size(); ++i) {
    const TokenKind kind = spec.kinds[i];
    if (kind != TokenKind::special && kind != TokenKind::added && kind != TokenKind::unknown) continue;
    const auto id = static_cast<int32_t>(i);
    const std::string_view text = vocabulary.text(id);
    if (text.empty() || vocabulary.find(text) != id) continue;
    sorted_.push_back({id, kind != TokenKind::added, contains(spec.lstrip_ids, id), contains(spec.rstrip_ids, id)});
    begins_[static_cast<uint8_t>(text.front())] = true;
  }
  std::sort(sorted_.begin(), sorted_.end(),
            [&](const Entry& a, const Entry& b) { return vocabulary.text(a.id) < vocabulary.text(b.id); });
}

// Narrows the sorted range byte by byte: after k bytes it holds the tokens that begin with text[0, k), the one that ends
// there first.
const AddedTokens::Entry* AddedTokens::longest_at(const Vocabulary& vocabulary, std::string_view text,
                                                  bool special) const {
  const Entry* best = nullptr;
  auto low = sorted_.begin();
  auto high = sorted_.end();
  for (size_t k = 0; k < text.size() && low != high; ++k) {
    const auto byte = static_cast<uint8_t>(text[k]);
    // -1 for a token that has ended, so that it sorts before all others.
    const auto byte_at = [&](const Entry& entry) {
      const std::string_view token = vocabulary.text(entry.id);
      return k < token.size() ? static_cast<int>(static_cast<uint8_t>(token[k])) : -1;
    };
    low = std::lower_bound(low, high, byte, [&](const Entry& entry, int wanted) { return byte_at(entry) < wanted; });
    high = std::upper_bound(low, high, byte, [&](int wanted, const Entry& entry) { return wanted < byte_at(entry); });
    if (low != high && vocabulary.text(low->id).size() == k + 1 && (special || !low->special)) best = &*low;
  }
  return best;
}

std::optional<AddedTokens::Match> AddedTokens::next(const Vocabulary& vocabulary, std::string_view text, size_t from,
                                                    bool special) const {
  for (size_t i = from; i < text.size(); ++i) {
    if (!begins_[static_cast<uint8_t>(text[i])]) continue;
    const Entry* entry = longest_at(vocabulary, text.substr(i), special);
    if (entry == nullptr) continue;
    Match match{i, i + vocabulary.text(entry->id).size(), entry->id};
    while (entry->rstrip && match.end < text.size()) {
      const Utf8Char c = next_utf8(text.substr(match.end));
      if (!is_white_space(c.code_point)) break;
      match.end += c.bytes;
    }
    while (entry->lstrip && match.begin > from) {
      size_t previous = match.begin - 1;
      while (previous > from && (static_cast<uint8_t>(text[previous]) & 0xc0) == 0x80) --previous;
      if (!is_white_space(next_utf8(text.substr(previous)).code_point)) break;
      match.begin = previous;
    }
    return match;
  }
  return std::nullopt;
}

}  // namespace sluice::model
