// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/scratch.hpp"

#include <algorithm>

#include "backend/vulkan/kernels.hpp"
#include "base/units.hpp"

namespace sluice::backend::vulkan {

namespace {

// Of a whole context, at most: their partial results take memory, and somebody has to put them together.
constexpr uint32_t kMostChunks = 64;

}  // namespace

ScratchLayout::ScratchLayout(const Shape& shape) {
  const auto reserve = [this](uint64_t wanted) {
    const uint64_t offset = bytes;
    bytes = align_up(bytes + wanted, 256);
    return offset;
  };
  const uint64_t rows = shape.max_rows;
  const auto place = [&](Slot slot, uint32_t width, uint64_t floats) {
    widths[static_cast<size_t>(slot)] = width;
    slots[static_cast<size_t>(slot)] = reserve(floats * sizeof(float));
  };
  const uint32_t q_width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
  place(Slot::residual, shape.hidden, rows * shape.hidden);
  place(Slot::normed, shape.hidden, rows * x_stride(shape.hidden));
  place(Slot::q, q_width, rows * q_width);
  place(Slot::k, kv_width, rows * kv_width);
  place(Slot::v, kv_width, rows * kv_width);
  place(Slot::attended, q_width, rows * x_stride(q_width));
  place(Slot::gate, shape.ffn, rows * shape.ffn);
  place(Slot::up, shape.ffn, rows * shape.ffn);
  place(Slot::logits, shape.vocab, uint64_t{shape.max_logit_rows} * shape.vocab);
  gate_x = reserve(rows * x_stride(shape.ffn) * sizeof(float));
  const uint32_t widest = std::max({shape.hidden, q_width, shape.ffn});
  if (shape.gathers) gathered = reserve(rows * x_stride(widest) * sizeof(float));
  x_half = reserve(x_half_bytes(rows, widest));
  x_scale = reserve(x_scale_bytes(rows, widest));
  const uint64_t blocks = shape.sessions * ceil_div(shape.context, kKvBlockTokens);
  table = reserve((3 * rows + blocks) * sizeof(uint32_t));
  block_table = table + 3 * rows * sizeof(uint32_t);
  angles = reserve(rows * shape.rotary_dims * sizeof(float));
  chunk_positions = static_cast<uint32_t>(
      std::max<uint64_t>(kAttentionStep, align_up(ceil_div(shape.context, kMostChunks), kAttentionStep)));
  chunks = static_cast<uint32_t>(ceil_div(shape.context, chunk_positions));
  const uint64_t partials = std::min<uint64_t>(rows, kSplitRows) * shape.heads * chunks;
  partial_out = reserve(partials * shape.head_dim * sizeof(float));
  partial_sum = reserve(partials * 2 * sizeof(float));
  bytes = align_up(bytes, 4096);
}

}  // namespace sluice::backend::vulkan
