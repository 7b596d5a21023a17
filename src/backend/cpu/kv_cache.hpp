// SPDX-License-Identifier: Apache-2.0
// The CPU backend's KV cache: FP16 blocks of 64 positions that hold all layers, so that a session's past is saved,
// forked and restored block by block.
//
//   block    [layers][kv_heads][K, V]     K: [head_dim][64]    V: [64][head_dim]
//   table    [sessions][context / 64]     number of the physical block; the identity at first
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cpu/kernels.hpp"
#include "base/handles.hpp"
#include "sluice/result.hpp"

namespace sluice::backend::cpu {

class KvCache {
 public:
  // What create() allocates.
  static uint64_t bytes_needed(const Shape& shape);
  // Error: out_of_memory.
  static Result<KvCache> create(const Shape& shape);

  // Stores what one row attends to; k and v are [kv_heads][head_dim]. Rows may be stored by several threads.
  void store(const Row& row, uint32_t layer, const float* k, const float* v);
  KvHead head(uint32_t session, uint32_t layer, uint32_t kv_head) const;

  // Positions 0..tokens-1 in whole blocks; what lies past `tokens` is saved as zeros.
  uint64_t saved_bytes(uint32_t tokens) const;
  void copy(uint32_t from_session, uint32_t to_session, uint32_t tokens);
  void save(uint32_t session, uint32_t tokens, std::span<std::byte> out) const;
  void load(uint32_t session, uint32_t tokens, std::span<const std::byte> in);

 private:
  uint16_t* block(uint32_t session, uint32_t index) const;

  Mapping memory_;
  std::vector<uint32_t> table_;
  uint32_t layers_ = 0, kv_heads_ = 0, head_dim_ = 0;
  uint32_t blocks_per_session_ = 0;
  size_t head_elems_ = 0;             // K or V of one head in a block
  size_t block_elems_ = 0;
};

}  // namespace sluice::backend::cpu
