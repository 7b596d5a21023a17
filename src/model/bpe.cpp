// SPDX-License-Identifier: Apache-2.0
//
// Merging repeats one rule: of all neighbouring pairs, merge the one of the lowest rank, the leftmost if several have it.
// Symbols form a doubly linked list over an array, and each keeps the rank of the merge with its right neighbour. Short
// pieces (nearly all: a word has about five bytes) look for the lowest rank by walking the list; long ones keep a heap of
// (rank, symbol), in which an entry whose rank is no longer that of its symbol is out of date and skipped.
#include "model/bpe.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "model/utf8.hpp"

namespace sluice::model {
namespace {

using Symbol = BpeScratch::Symbol;

constexpr uint32_t kNoRank = std::numeric_limits<uint32_t>::max();
constexpr int32_t kGone = -2;
constexpr size_t kWalkUpTo = 24;  // symbols; beyond, the heap is faster (measured on English and Chinese text)
constexpr size_t kMaxMerges = 1u << 24;

uint64_t pair_key(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

size_t hash_of(uint64_t key) {
  key *= 0x9e3779b97f4a7c15ull;
  return static_cast<size_t>(key ^ (key >> 32));
}

// Merges until no pair is left that can. `find(left, right)` gives the merge of two symbols or null.
template <class Find>
void merge_all(std::vector<Symbol>& symbols, std::vector<uint64_t>& heap, const Find& find) {
  const bool use_heap = symbols.size() > kWalkUpTo;
  heap.clear();
  const auto rate = [&](int32_t at) {  // looks up the merge of a symbol with its right neighbour
    Symbol& symbol = symbols[static_cast<size_t>(at)];
    symbol.rank = kNoRank;
    if (symbol.next < 0) return;
    if (const auto merge = find(symbol, symbols[static_cast<size_t>(symbol.next)])) {
      symbol.rank = merge->rank;
      symbol.merged = merge->id;
      if (use_heap) heap.push_back((static_cast<uint64_t>(merge->rank) << 32) | static_cast<uint32_t>(at));
    }
  };
  const auto push_last = [&](size_t before) {
    if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  for (size_t i = 0; i < symbols.size(); ++i) rate(static_cast<int32_t>(i));
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  for (;;) {
    int32_t best = -1;
    if (use_heap) {
      while (!heap.empty() && best < 0) {
        const uint64_t top = heap.front();
        std::pop_heap(heap.begin(), heap.end(), std::greater<>());
        heap.pop_back();
        const auto at = static_cast<uint32_t>(top);
        if (symbols[at].next != kGone && symbols[at].rank == static_cast<uint32_t>(top >> 32)) {
          best = static_cast<int32_t>(at);
        }
      }
    } else {
      uint32_t lowest = kNoRank;
      for (int32_t at = symbols.empty() ? -1 : 0; at >= 0; at = symbols[static_cast<size_t>(at)].next) {
        if (symbols[static_cast<size_t>(at)].rank < lowest) {
          lowest = symbols[static_cast<size_t>(at)].rank;
          best = at;
        }
      }
    }
    if (best < 0) return;

    Symbol& left = symbols[static_cast<size_t>(best)];
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    left.id = left.merged;
    left.end = right.end;
    left.next = right.next;
    right.next = kGone;
    right.rank = kNoRank;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best;
    size_t before = heap.size();
    rate(best);
    push_last(before);
    if (left.previous >= 0) {
      before = heap.size();
      rate(left.previous);
      push_last(before);
    }
  }
}

// Rank of each token by its score: the best score is rank 0.
std::vector<uint32_t> ranks_of(const std::vector<float>& scores) {
  std::vector<uint32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; });
  std::vector<uint32_t> ranks(scores.size());
  uint32_t rank = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    if (i > 0 && scores[order[i]] != scores[order[i - 1]]) ++rank;
    ranks[order[i]] = rank;
  }
  return ranks;
}

Status read_merges(const std::vector<std::string>& merges, const Vocabulary& vocabulary, MergeTable& table) {
  if (merges.size() > kMaxMerges) {
    return fail(ErrorCode::unsupported,
                fmt::format("tokenizer: {} merges are more than the {} supported", merges.size(), kMaxMerges));
  }
  table.reserve(merges.size());
  std::string joined;
  for (size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    bool found = false;
    // A token may itself hold a space: the separator is the one with a token on both sides.
    for (size_t space = merge.find(' ', 1); space != std::string_view::npos && !found; space = merge.find(' ', space + 1)) {
      const int32_t left = vocabulary.find(merge.substr(0, space));
      const int32_t right = vocabulary.find(merge.substr(space + 1));
      if (left == kNoToken || right == kNoToken) continue;
      joined.assign(merge.substr(0, space));
      joined += merge.substr(space + 1);
      const int32_t id = vocabulary.find(joined);
      if (id == kNoToken) continue;
      table.insert(left, right, {static_cast<uint32_t>(i), id});
      found = true;
    }
    if (!found) {
      return fail(ErrorCode::corrupt,
                  fmt::format("tokenizer: merge {} (\"{}\") is not two tokens whose concatenation is a token", i, merge));
    }
  }
  return {};
}

}  // namespace

void MergeTable::reserve(size_t count) { slots_.assign(std::bit_ceil(count + count / 3 + 2), Slot{}); }

void MergeTable::insert(int32_t left, int32_t right, Merge merge) {
  const uint64_t key = pair_key(left, right);
  const size_t mask = slots_.size() - 1;
  size_t slot = hash_of(key) & mask;
  while (slots_[slot].key != kEmpty && slots_[slot].key != key) slot = (slot + 1) & mask;
  slots_[slot] = {key, merge};
}

const MergeTable::Merge* MergeTable::find(int32_t left, int32_t right) const {
  if (slots_.empty()) return nullptr;
  const uint64_t key = pair_key(left, right);
  const size_t mask = slots_.size() - 1;
  for (size_t slot = hash_of(key) & mask; slots_[slot].key != kEmpty; slot = (slot + 1) & mask) {
    if (slots_[slot].key == key) return &slots_[slot].merge;
  }
  return nullptr;
}

int Bpe::byte_of_token(std::string_view text) {
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text.back() != '>') return -1;
  int value = 0;
  const auto [end, error] = std::from_chars(text.data() + 3, text.data() + 5, value, 16);
  return error == std::errc() && end == text.data() + 5 ? value : -1;
}

Result<Bpe> Bpe::create(const storage::TokenizerSpec& spec, const Vocabulary& vocabulary) {
  Bpe bpe;
  bpe.byte_level_ = spec.model == storage::TokenizerModel::byte_level_bpe;
  bpe.ignore_merges_ = spec.ignore_merges;
  bpe.byte_fallback_ = spec.byte_fallback;
  bpe.unknown_ = spec.unknown;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    std::string text;
    if (bpe.byte_level_) {
      append_utf8(text, byte_alphabet_char(static_cast<uint8_t>(byte)));
    } else {
      text = fmt::format("<0x{:02X}>", byte);
    }
    bpe.byte_ids_[byte] = vocabulary.find(text);
  }
  if (!spec.merges.empty() || bpe.byte_level_) {
    SLUICE_TRY(read_merges(spec.merges, vocabulary, bpe.merges_));
    return bpe;
  }
  if (spec.scores.size() != spec.tokens.size()) {
    return fail(ErrorCode::corrupt, fmt::format("tokenizer: no merges, and {} scores for {} tokens", spec.scores.size(),
                                                spec.tokens.size()));
  }
  for (size_t id = 0; id < spec.scores.size(); ++id) {
    if (std::isnan(spec.scores[id])) {
      return fail(ErrorCode::corrupt, fmt::format("tokenizer: the score of token {} is not a number", id));
    }
  }
  bpe.score_ranks_ = ranks_of(spec.scores);
  for (size_t id = 0; id < spec.kinds.size(); ++id) {  // control and byte tokens never come out of merging
    using storage::TokenKind;
    const TokenKind kind = spec.kinds[id];
    if (kind == TokenKind::special || kind == TokenKind::byte || kind == TokenKind::unknown) {
      bpe.score_ranks_[id] = kNoRank;
    }
  }
  return bpe;
}

void Bpe::start_bytes(std::string_view piece, std::vector<Symbol>& symbols) const {
  for (size_t i = 0; i < piece.size(); ++i) {
    int32_t id = byte_ids_[static_cast<uint8_t>(piece[i])];
    if (id == kNoToken) id = unknown_;
    if (id == kNoToken) continue;  // a byte that no token spells vanishes, as in the reference
    const auto at = static_cast<uint32_t>(i);
    symbols.push_back({id, 0, 0, at, at + 1, kNoRank, kNoToken});
  }
}

void Bpe::start_characters(const Vocabulary& vocabulary, std::string_view piece, std::vector<Symbol>& symbols) const {
  const bool by_score = !score_ranks_.empty();
  bool after_unknown = false;
  for (size_t i = 0; i < piece.size();) {
    const size_t bytes = std::min(next_utf8(piece.substr(i)).bytes, piece.size() - i);
    const std::string_view character = piece.substr(i, bytes);
    const auto begin = static_cast<uint32_t>(i);
    const auto end = static_cast<uint32_t>(i + bytes);
    i += bytes;
    int32_t id = vocabulary.find(character);
    if (id != kNoToken && by_score && score_ranks_[static_cast<size_t>(id)] == kNoRank) id = kNoToken;
    const bool known = id != kNoToken;
    if (known || by_score) {  // by score, an unknown character may still be a part of a longer token
      symbols.push_back({id, 0, 0, begin, end, kNoRank, kNoToken});
    } else if (byte_fallback_ && std::all_of(character.begin(), character.end(), [&](char c) {
                 return byte_ids_[static_cast<uint8_t>(c)] != kNoToken;
               })) {
      for (const char c : character) {
        symbols.push_back({byte_ids_[static_cast<uint8_t>(c)], 0, 0, begin, end, kNoRank, kNoToken});
      }
    } else if (unknown_ != kNoToken) {
      if (!after_unknown) symbols.push_back({unknown_, 0, 0, begin, end, kNoRank, kNoToken});
      after_unknown = true;
      continue;
    }
    after_unknown = false;
  }
}

void Bpe::append_bytes(std::string_view text, std::vector<int32_t>& ids) const {
  for (const char c : text) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(c)];
    if (id != kNoToken) {
      ids.push_back(id);
    } else if (unknown_ != kNoToken) {
      ids.push_back(unknown_);
      return;
    }
  }
}

void Bpe::encode(const Vocabulary& vocabulary, std::string_view piece, BpeScratch& scratch,
                 std::vector<int32_t>& ids) const {
  if (piece.empty()) return;
  if (ignore_merges_) {
    std::string_view spelled = piece;
    if (byte_level_) {
      scratch.text.clear();
      for (const char c : piece) append_utf8(scratch.text, byte_alphabet_char(static_cast<uint8_t>(c)));
      spelled = scratch.text;
    }
    if (const int32_t id = vocabulary.find(spelled); id != kNoToken) {
      ids.push_back(id);
      return;
    }
  }

  std::vector<Symbol>& symbols = scratch.symbols;
  symbols.clear();
  if (byte_level_) {
    start_bytes(piece, symbols);
  } else {
    start_characters(vocabulary, piece, symbols);
  }
  for (size_t i = 0; i < symbols.size(); ++i) {
    symbols[i].previous = static_cast<int32_t>(i) - 1;
    symbols[i].next = i + 1 < symbols.size() ? static_cast<int32_t>(i) + 1 : -1;
  }

  if (score_ranks_.empty()) {
    merge_all(symbols, scratch.heap,
              [&](const Symbol& left, const Symbol& right) { return merges_.find(left.id, right.id); });
  } else {
    MergeTable::Merge merge;
    merge_all(symbols, scratch.heap, [&](const Symbol& left, const Symbol& right) -> const MergeTable::Merge* {
      merge.id = vocabulary.find(piece.substr(left.begin, right.end - left.begin));
      if (merge.id == kNoToken) return nullptr;
      merge.rank = score_ranks_[static_cast<size_t>(merge.id)];
      return merge.rank == kNoRank ? nullptr : &merge;
    });
  }
  for (int32_t at = symbols.empty() ? -1 : 0; at >= 0; at = symbols[static_cast<size_t>(at)].next) {
    const Symbol& symbol = symbols[static_cast<size_t>(at)];
    if (symbol.id != kNoToken) {
      ids.push_back(symbol.id);
    } else {
      append_bytes(piece.substr(symbol.begin, symbol.end - symbol.begin), ids);
    }
  }
}

}  // namespace sluice::model
