// SPDX-License-Identifier: Apache-2.0
// Byte-pair encoding of one piece of text. Both kinds of vocabulary end here: byte-level (a symbol is a byte) and
// SentencePiece (a symbol is a character; merges come as a list, or follow from the scores of the tokens).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/vocabulary.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::model {

// (left id, right id) -> (rank, merged id), open addressing; 280k merges take 8 MB.
class MergeTable {
 public:
  struct Merge {
    uint32_t rank = 0;
    int32_t id = kNoToken;
  };
  void reserve(size_t count);
  void insert(int32_t left, int32_t right, Merge merge);  // the last of equal pairs counts
  const Merge* find(int32_t left, int32_t right) const;   // null: these two do not merge

 private:
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge;
  };
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  std::vector<Slot> slots_;
};

// Memory that encoding one piece after another reuses. One per call of Tokenizer::encode.
struct BpeScratch {
  struct Symbol {
    int32_t id;       // kNoToken: not in the vocabulary
    int32_t previous; // -1: first
    int32_t next;     // -1: last; kGone: merged into another
    uint32_t begin;   // bytes of the piece that it stands for
    uint32_t end;
    uint32_t rank;    // of the merge with the next symbol, kNoRank if there is none
    int32_t merged;   // the id that merge gives
  };
  std::vector<Symbol> symbols;
  std::vector<uint64_t> heap;  // rank << 32 | symbol; the smallest on top
  std::string text;
};

// Immutable after create; any thread. `vocabulary` is the one it was created with.
class Bpe {
 public:
  static Result<Bpe> create(const storage::TokenizerSpec& spec, const Vocabulary& vocabulary);

  // Appends the ids of `piece` (raw UTF-8; for SentencePiece with U+2581 for spaces). O(n log n).
  void encode(const Vocabulary& vocabulary, std::string_view piece, BpeScratch& scratch,
              std::vector<int32_t>& ids) const;

  // The byte that an SentencePiece token such as "<0x0A>" stands for, -1 if it is none.
  static int byte_of_token(std::string_view text);

 private:
  void start_bytes(std::string_view piece, std::vector<BpeScratch::Symbol>& symbols) const;
  void start_characters(const Vocabulary& vocabulary, std::string_view piece,
                        std::vector<BpeScratch::Symbol>& symbols) const;
  void append_bytes(std::string_view text, std::vector<int32_t>& ids) const;

  bool byte_level_ = true;
  bool ignore_merges_ = false;
  bool byte_fallback_ = false;
  int32_t unknown_ = kNoToken;
  std::array<int32_t, 256> byte_ids_ = {};
  MergeTable merges_;
  std::vector<uint32_t> score_ranks_;  // by id, equal scores equal ranks; empty where merges are listed
};

}  // namespace sluice::model
