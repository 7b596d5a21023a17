// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/kv_cache.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::backend::cpu {

namespace {

uint64_t block_elems(const Shape& shape) {
  return uint64_t{shape.layers} * shape.kv_heads * 2 * shape.head_dim * kKvBlockTokens;
}

}  // namespace

uint64_t KvCache::bytes_needed(const Shape& shape) {
  const uint64_t blocks = ceil_div(shape.context, kKvBlockTokens) * shape.sessions;
  return align_up(blocks * block_elems(shape) * sizeof(uint16_t), 4096);
}

Result<KvCache> KvCache::create(const Shape& shape) {
  KvCache cache;
  SLUICE_TRY_ASSIGN(memory, Mapping::anonymous(bytes_needed(shape), "the KV cache"));
  cache.memory_ = std::move(memory);
  cache.layers_ = shape.layers;
  cache.kv_heads_ = shape.kv_heads;
  cache.head_dim_ = shape.head_dim;
  cache.blocks_per_session_ = static_cast<uint32_t>(ceil_div(shape.context, kKvBlockTokens));
  cache.head_elems_ = size_t{shape.head_dim} * kKvBlockTokens;
  cache.block_elems_ = block_elems(shape);
  cache.table_.resize(size_t{cache.blocks_per_session_} * shape.sessions);
  std::iota(cache.table_.begin(), cache.table_.end(), 0u);
  return cache;
}

uint16_t* KvCache::block(uint32_t session, uint32_t index) const {
  SLUICE_CHECK(index < blocks_per_session_);
  const uint32_t physical = table_[size_t{session} * blocks_per_session_ + index];
  return reinterpret_cast<uint16_t*>(memory_.data()) + physical * block_elems_;
}

void KvCache::store(const Row& row, uint32_t layer, const float* k, const float* v) {
  const uint32_t at = row.position % kKvBlockTokens;
  uint16_t* to = block(row.session, row.position / kKvBlockTokens) + size_t{layer} * kv_heads_ * 2 * head_elems_;
  for (uint32_t head = 0; head < kv_heads_; ++head, to += 2 * head_elems_, k += head_dim_, v += head_dim_) {
    store_half(k, head_dim_, to + at, kKvBlockTokens);
    store_half(v, head_dim_, to + head_elems_ + size_t{at} * head_dim_, 1);
  }
}

KvHead KvCache::head(uint32_t session, uint32_t layer, uint32_t kv_head) const {
  const auto* k = reinterpret_cast<const uint16_t*>(memory_.data()) +
                  (size_t{layer} * kv_heads_ + kv_head) * 2 * head_elems_;
  return {.k = k,
          .v = k + head_elems_,
          .block_stride = block_elems_,
          .blocks = table_.data() + size_t{session} * blocks_per_session_};
}

uint64_t KvCache::saved_bytes(uint32_t tokens) const {
  return ceil_div(tokens, kKvBlockTokens) * block_elems_ * sizeof(uint16_t);
}

void KvCache::copy(uint32_t from_session, uint32_t to_session, uint32_t tokens) {
  if (from_session == to_session) return;
  for (uint32_t i = 0; i < ceil_div(tokens, kKvBlockTokens); ++i) {
    std::memcpy(block(to_session, i), block(from_session, i), block_elems_ * sizeof(uint16_t));
  }
}

void KvCache::save(uint32_t session, uint32_t tokens, std::span<std::byte> out) const {
  SLUICE_CHECK(out.size() == saved_bytes(tokens));
  const size_t block_bytes = block_elems_ * sizeof(uint16_t);
  const auto blocks = static_cast<uint32_t>(ceil_div(tokens, kKvBlockTokens));
  for (uint32_t i = 0; i < blocks; ++i) std::memcpy(out.data() + i * block_bytes, block(session, i), block_bytes);

  // Positions past the end may be another conversation's.
  const uint32_t used = tokens % kKvBlockTokens;
  if (used == 0) return;
  std::byte* head = out.data() + (blocks - 1) * block_bytes;
  const size_t head_bytes = head_elems_ * sizeof(uint16_t), row_bytes = kKvBlockTokens * sizeof(uint16_t);
  for (uint32_t i = 0; i < layers_ * kv_heads_; ++i, head += 2 * head_bytes) {
    for (uint32_t dim = 0; dim < head_dim_; ++dim) {
      std::memset(head + dim * row_bytes + used * sizeof(uint16_t), 0, row_bytes - used * sizeof(uint16_t));
    }
    const size_t used_bytes = size_t{used} * head_dim_ * sizeof(uint16_t);
    std::memset(head + head_bytes + used_bytes, 0, head_bytes - used_bytes);
  }
}

void KvCache::load(uint32_t session, uint32_t tokens, std::span<const std::byte> in) {
  SLUICE_CHECK(in.size() == saved_bytes(tokens));
  const size_t block_bytes = block_elems_ * sizeof(uint16_t);
  for (uint32_t i = 0; i < ceil_div(tokens, kKvBlockTokens); ++i) {
    std::memcpy(block(session, i), in.data() + i * block_bytes, block_bytes);
  }
}

}  // namespace sluice::backend::cpu
