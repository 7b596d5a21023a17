// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/scratch.hpp"

#include <algorithm>
#include <initializer_list>

#include "base/units.hpp"
#include "cuda/attention.hpp"
#include "cuda/elementwise.hpp"
#include "cuda/matmul.hpp"

namespace sluice::backend::cuda {

namespace {

using sluice::cuda::MatmulCall;
using sluice::cuda::WeightFormat;
using sluice::cuda::x_stride;

// The largest workspace of any product of a pass. Which formats will come, and which matrices share a call, is not known
// yet: all are asked for, with what takes most of it: a bias and the smallest groups (sums of x over each group).
uint64_t largest_matmul_workspace(const Shape& shape) {
  struct Product {
    uint32_t cols;
    std::initializer_list<uint32_t> rows;
    uint32_t max_rows;
  };
  const uint32_t q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
  const Product products[] = {
      {shape.hidden, {q, kv, kv}, shape.max_rows},  {shape.hidden, {q}, shape.max_rows},
      {shape.hidden, {kv}, shape.max_rows},         {shape.hidden, {q, kv}, shape.max_rows},
      {shape.hidden, {kv, kv}, shape.max_rows},     {q, {shape.hidden}, shape.max_rows},
      {shape.hidden, {shape.ffn, shape.ffn}, shape.max_rows}, {shape.hidden, {shape.ffn}, shape.max_rows},
      {shape.ffn, {shape.hidden}, shape.max_rows},  {shape.hidden, {shape.vocab}, shape.max_logit_rows}};
  static const __half some_bias = {};  // that there is one counts
  uint64_t bytes = sluice::cuda::kMatmulCounterBytes;
  for (const Product& product : products) {
    for (uint32_t rows = 1; rows <= product.max_rows; ++rows) {
      for (const WeightFormat format :
           {WeightFormat::int4, WeightFormat::int8, WeightFormat::f16, WeightFormat::bf16, WeightFormat::f32}) {
        MatmulCall call;
        call.ldx = x_stride(product.cols);
        call.rows = std::min(rows, sluice::cuda::kMatmulMaxRows);
        for (const uint32_t outputs : product.rows) {
          call.part[call.parts].weight = {
              .format = format, .rows = outputs, .cols = product.cols, .group_elems = 32, .bias = &some_bias};
          call.part[call.parts++].ldo = outputs;
        }
        bytes = std::max(bytes, sluice::cuda::matmul_workspace_bytes(call));
      }
      // Up to there a kernel may choose differently for every number of rows; beyond, it goes by tiles of 16 or more.
      if (rows >= 64) rows = std::max(rows, std::min(rows + 15, product.max_rows - 1));
    }
  }
  return bytes;
}

}  // namespace

ScratchLayout::ScratchLayout(const Shape& shape) {
  const auto reserve = [this](uint64_t wanted) {
    const uint64_t offset = bytes;
    bytes = align_up(bytes + wanted, 256);
    return offset;
  };
  const uint64_t rows = shape.max_rows;
  const auto place = [&](Slot slot, uint32_t width, uint64_t slot_bytes) {
    widths[static_cast<size_t>(slot)] = width;
    slots[static_cast<size_t>(slot)] = reserve(slot_bytes);
  };
  const auto place_float = [&](Slot slot, uint32_t width, uint64_t slot_rows) {
    place(slot, width, slot_rows * width * sizeof(float));
  };
  const auto x_bytes = [&](uint32_t width) { return rows * x_stride(width) * sizeof(uint16_t); };
  const uint32_t q_width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
  place_float(Slot::residual, shape.hidden, rows);
  place(Slot::normed, shape.hidden,
        std::max<uint64_t>(rows, kNormedCopies * std::min<uint64_t>(rows, kCopiedRows)) * x_stride(shape.hidden) *
            sizeof(uint16_t));
  place_float(Slot::q, q_width, rows);
  place_float(Slot::k, kv_width, rows);
  place_float(Slot::v, kv_width, rows);
  place(Slot::attended, q_width, x_bytes(q_width));
  place_float(Slot::gate, shape.ffn, rows);
  place_float(Slot::up, shape.ffn, rows);
  place_float(Slot::logits, shape.vocab, shape.max_logit_rows);
  gate_x = reserve(x_bytes(shape.ffn));
  if (shape.gathers) gathered = reserve(x_bytes(std::max({shape.hidden, q_width, shape.ffn})));
  normed_scale = reserve(rows * sizeof(float));
  gate_scale = reserve(rows * sizeof(float));
  for (uint64_t* table : {&sessions, &positions, &selected}) *table = reserve(rows * sizeof(uint32_t));
  angles = reserve(rows * (shape.rotary_dims / 2) * 2 * sizeof(float));
  inverse_frequencies = reserve(shape.rotary_dims / 2 * sizeof(float));
  block_table = reserve(shape.sessions * ceil_div(shape.context, kKvBlockTokens) * sizeof(uint32_t));
  stamp_count = most_commands(shape.layers);
  stamps = reserve(stamp_count * sizeof(sluice::cuda::Stamp));
  swiglu_sync = reserve(sluice::cuda::swiglu_sync_bytes(shape.max_rows));
  attention_workspace_bytes =
      sluice::cuda::attention_workspace_bytes(shape.heads, shape.kv_heads, shape.head_dim, shape.context);
  attention_workspace = reserve(attention_workspace_bytes);
  matmul_workspace_bytes = largest_matmul_workspace(shape);
  matmul_workspace = reserve(matmul_workspace_bytes);
  bytes = align_up(bytes, 4096);
}

}  // namespace sluice::backend::cuda
