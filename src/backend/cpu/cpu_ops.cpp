// SPDX-License-Identifier: Apache-2.0
// The operations of a pass on the CPU: how each is cut into parts for the threads. The arithmetic is in the kernels.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/cpu_backend.hpp"
#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::backend::cpu {

using storage::Layout;
using storage::Scheme;

namespace {

// Parts per thread that a loop over row tiles is cut into: enough that a thread which lost its core for a while does not
// hold the others up for long, few enough that a part is worth taking.
constexpr uint32_t kPartsPerThread = 4;
// Columns gathered at a time through a permutation: 4 KiB, which stay in L1. A multiple of 64.
constexpr uint32_t kGatherColumns = 1024;

}  // namespace

void CpuBackend::rms_norm(const Op& op) {
  const uint32_t columns = width(op.in);
  SLUICE_CHECK(width(op.out[0]) == columns);
  const float* in = slot(op.in);
  float* out = slot(op.out[0]);
  const float* weight = vector(op, 0, columns);
  pool_->parallel_for(active_rows_, 8, [&](uint32_t first, uint32_t last, uint32_t) {
    for (size_t r = first; r < last; ++r) {
      rms_norm_row(in + r * columns, weight, columns, shape_.norm_eps, out + r * columns);
    }
  });
}

void CpuBackend::head_norm_rope(const Op& op) {
  const uint32_t dim = shape_.head_dim;
  const float* norms[2] = {vector(op, 0, dim), vector(op, 1, dim)};
  const size_t pairs = shape_.rotary_dims / 2;
  const auto* cos = reinterpret_cast<const float*>(scratch_memory_.data() + scratch_.cos);
  const auto* sin = reinterpret_cast<const float*>(scratch_memory_.data() + scratch_.sin);
  float* q = slot(Slot::q);
  float* k = slot(Slot::k);
  const float* v = slot(Slot::v);
  const size_t kv_width = width(Slot::k);
  pool_->parallel_for(active_rows_, 8, [&](uint32_t first, uint32_t last, uint32_t) {
    const auto turn = [&](float* head, const float* norm, uint32_t heads, uint32_t r) {
      for (uint32_t h = 0; h < heads; ++h, head += dim) {
        if (norm != nullptr) rms_norm_row(head, norm, dim, shape_.norm_eps, head);
        rope_head(head, cos + r * pairs, sin + r * pairs, shape_.rotary_dims);
      }
    };
    for (uint32_t r = first; r < last; ++r) {
      turn(q + size_t{r} * width(Slot::q), norms[0], shape_.heads, r);
      turn(k + r * kv_width, norms[1], shape_.kv_heads, r);
      kv_.store(rows_[r], op.layer, k + r * kv_width, v + r * kv_width);
    }
  });
}

void CpuBackend::attention(const Op& op) {
  const uint32_t dim = shape_.head_dim;
  const uint32_t group = shape_.heads / shape_.kv_heads;
  const auto calls = static_cast<uint32_t>(ceil_div(group, kQueryGroup));  // per row and KV head
  const uint32_t per_row = shape_.kv_heads * calls;
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  const float* q = slot(Slot::q);
  float* out = slot(Slot::attended);
  pool_->parallel_for(active_rows_ * per_row, active_rows_ > 8 ? per_row : 1,
                      [&](uint32_t first, uint32_t last, uint32_t) {
    for (uint32_t i = first; i < last; ++i) {
      const uint32_t r = active_rows_ - 1 - i / per_row;  // the rows that see most positions first
      const uint32_t kv_head = i % per_row / calls, call = i % calls;
      const uint32_t count = std::min(kQueryGroup, group - call * kQueryGroup);
      const size_t head = size_t{r} * shape_.heads + kv_head * group + call * kQueryGroup;
      Query queries[kQueryGroup];
      for (uint32_t j = 0; j < count; ++j) {
        queries[j] = {.q = q + (head + j) * dim, .out = out + (head + j) * dim, .position = rows_[r].position};
      }
      attend(queries, count, kv_.head(rows_[r].session, op.layer, kv_head), dim, scale);
    }
  });
}

void CpuBackend::swiglu() {
  float* gate = slot(Slot::gate);
  const float* up = slot(Slot::up);
  // A row's values do not depend on the cut: the kernel treats every element alike.
  const auto count = static_cast<uint32_t>(active_rows_ * ceil_div(shape_.ffn, 1024));
  const uint32_t per_row = count / active_rows_;
  pool_->parallel_for(count, std::max(4u, count / (pool_->threads() * kPartsPerThread)),
                      [&](uint32_t first, uint32_t last, uint32_t) {
    for (uint32_t i = first; i < last; ++i) {
      const uint32_t begin = i % per_row * 1024;
      const size_t at = size_t{i / per_row} * shape_.ffn + begin;
      cpu::swiglu(gate + at, up + at, std::min(1024u, shape_.ffn - begin));
    }
  });
}

void CpuBackend::select_rows() {
  float* residual = slot(Slot::residual);
  const size_t columns = shape_.hidden;
  size_t to = 0;
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (!rows_[r].wants_logits) continue;
    if (to != r) std::memcpy(residual + to * columns, residual + r * columns, columns * sizeof(float));
    ++to;
  }
  active_rows_ = static_cast<uint32_t>(to);
}

// -------------------------------------------------------------------------------------------------------- matmul

Result<Matrix> CpuBackend::matrix(const Weight& weight) const {
  const uint64_t tiles = ceil_div(weight.rows, kTileRows);
  const bool quantized = weight.scheme == Scheme::int4 || weight.scheme == Scheme::int8;
  const bool half = weight.scheme == Scheme::f16 || weight.scheme == Scheme::bf16;
  const Layout layout = quantized ? Layout::tile16x64 : half ? Layout::tile16x16 : Layout::rows;
  const uint32_t group = weight.group_elems;
  if (weight.layout != layout || (quantized && group != 32 && (group == 0 || group % 64 != 0)) ||
      (weight.scheme == Scheme::int8 && (weight.has_zeros || weight.has_bias))) {
    return fail(ErrorCode::internal,
                fmt::format("no CPU kernel for scheme {}, layout {}, groups of {}", static_cast<int>(weight.scheme),
                            static_cast<int>(weight.layout), weight.group_elems));
  }
  uint64_t value_bytes = uint64_t{weight.rows} * weight.cols * sizeof(float);
  if (quantized) value_bytes = tiles * ceil_div(weight.cols, 64) * (weight.scheme == Scheme::int4 ? 512 : 1024);
  if (half) value_bytes = tiles * ceil_div(weight.cols, 16) * 512;

  Matrix m{.scheme = weight.scheme, .rows = weight.rows, .cols = weight.cols, .group_elems = group,
           .scale = weight.scale};
  m.values = reinterpret_cast<const uint8_t*>(at(weight.values, value_bytes));
  if (!quantized) return m;
  const uint64_t parameters = tiles * ceil_div(weight.cols, group) * kTileRows;
  m.scales = reinterpret_cast<const uint16_t*>(at(weight.scales, parameters * 2));
  if (weight.has_zeros) m.zeros = reinterpret_cast<const uint8_t*>(at(weight.zeros, parameters));
  if (weight.has_bias) m.bias = reinterpret_cast<const uint16_t*>(at(weight.bias, parameters * 2));
  if (weight.has_perm) {
    m.perm = reinterpret_cast<const uint32_t*>(at(weight.perm, uint64_t{weight.cols} * sizeof(uint32_t)));
    // The checksum says that the file is as it was written, not that it is sane.
    if (*std::max_element(m.perm, m.perm + m.cols) >= m.cols) {
      return fail(ErrorCode::corrupt, fmt::format("the column permutation of a matrix of {}x{} leads out of it; import the "
                                                  "model again", m.rows, m.cols));
    }
  }
  return m;
}

CpuBackend::Form CpuBackend::form_of(const Matrix& matrix) const {
  switch (matrix.scheme) {
    case Scheme::int4:
    case Scheme::int8: return activations_ == CpuActivations::int8 ? Form::quantized : Form::spread64;
    case Scheme::f16:
    case Scheme::bf16: return Form::spread16;
    case Scheme::f32: return Form::plain;
  }
  return Form::plain;
}

void CpuBackend::prepare_form(Form form, const float* in, const uint32_t* perm, uint32_t cols, uint32_t rows) {
  if (form == Form::plain) return;
  std::byte* to = scratch_memory_.data() + scratch_.form;
  if (perm != nullptr) {
    // int4 alone has a permutation, so the form has blocks of 64 columns: each is made of gathered columns.
    SLUICE_CHECK(form == Form::quantized || form == Form::spread64);
    pool_->parallel_for(rows, 1, [&](uint32_t first, uint32_t last, uint32_t) {
      float gathered[kGatherColumns];
      for (uint32_t r = first; r < last; ++r) {
        for (uint32_t begin = 0; begin < cols; begin += kGatherColumns) {
          const uint32_t count = std::min(kGatherColumns, cols - begin);
          for (uint32_t k = 0; k < count; ++k) gathered[k] = in[size_t{r} * cols + perm[begin + k]];
          const size_t block = size_t{begin / 64} * rows;
          if (form == Form::quantized) {
            quantize_rows(gathered, 0, count, rows, r, r + 1, reinterpret_cast<QuantizedBlock*>(to) + block);
          } else {
            spread64_rows(gathered, 0, count, rows, r, r + 1, reinterpret_cast<float*>(to) + block * 128);
          }
        }
      }
    });
    return;
  }
  pool_->parallel_for(rows, 4, [&](uint32_t first, uint32_t last, uint32_t) {
    switch (form) {
      case Form::quantized:
        return quantize_rows(in, cols, cols, rows, first, last, reinterpret_cast<QuantizedBlock*>(to));
      case Form::spread64: return spread64_rows(in, cols, cols, rows, first, last, reinterpret_cast<float*>(to));
      case Form::spread16: return spread16_rows(in, cols, cols, rows, first, last, reinterpret_cast<float*>(to));
      case Form::plain: return;
    }
  });
}

void CpuBackend::multiply_tiles(const Matrix& m, Form form, const float* in, uint32_t rows, uint32_t first_tile,
                                uint32_t last_tile, const MatmulOut& out, uint32_t thread) {
  const std::byte* acts = scratch_memory_.data() + scratch_.form;
  const auto* floats = reinterpret_cast<const float*>(acts);
  const auto* blocks = reinterpret_cast<const QuantizedBlock*>(acts);
  auto* sums = reinterpret_cast<float*>(scratch_memory_.data() + scratch_.accumulators) + thread * kAccumulatorFloats;
  const bool int4 = m.scheme == Scheme::int4;
  switch (form) {
    case Form::quantized:
      return (int4 ? matmul_int4_int8 : matmul_int8_int8)(m, blocks, rows, first_tile, last_tile, out, sums);
    case Form::spread64:
      return (int4 ? matmul_int4_f32 : matmul_int8_f32)(m, floats, rows, first_tile, last_tile, out, sums);
    case Form::spread16: return matmul_f16_f32(m, floats, rows, first_tile, last_tile, out);
    case Form::plain: return matmul_f32_f32(m, in, m.cols, rows, first_tile, last_tile, out);
  }
}

// Rows [first_row, first_row + rows) times weights [first_weight, last_weight), which take the same form: one loop over
// the row tiles of all of them.
void CpuBackend::multiply_chunk(const Op& op, uint32_t first_weight, uint32_t last_weight, Form form,
                                const Matrix* matrices, uint32_t first_row, uint32_t rows) {
  const uint32_t cols = matrices[first_weight].cols;
  const float* in = slot(op.in) + size_t{first_row} * cols;
  prepare_form(form, in, matrices[first_weight].perm, cols, rows);
  uint32_t tiles = 0;
  for (uint32_t i = first_weight; i < last_weight; ++i) {
    tiles += static_cast<uint32_t>(ceil_div(matrices[i].rows, kTileRows));
  }
  const auto grain = static_cast<uint32_t>(ceil_div(tiles, pool_->threads() * kPartsPerThread));
  pool_->parallel_for(tiles, grain, [&](uint32_t first, uint32_t last, uint32_t thread) {
    uint32_t begin = 0;  // first tile of the matrix in the count of all
    for (uint32_t i = first_weight; i < last_weight; ++i) {
      const Matrix& m = matrices[i];
      const auto end = begin + static_cast<uint32_t>(ceil_div(m.rows, kTileRows));
      const uint32_t from = std::max(first, begin), to = std::min(last, end);
      if (from < to) {
        const MatmulOut out{.out = slot(op.out[i]) + size_t{first_row} * m.rows,
                            .stride = m.rows,
                            .vector = vector(op, static_cast<int>(i), m.rows),
                            .accumulate = op.accumulate};
        multiply_tiles(m, form, in, rows, from - begin, to - begin, out, thread);
      }
      begin = end;
    }
  });
}

Status CpuBackend::matmul(const Op& op) {
  SLUICE_CHECK(op.weight_count >= 1 && op.weight_count <= kMaxWeights);
  Matrix matrices[kMaxWeights];
  for (uint32_t i = 0; i < op.weight_count; ++i) {
    SLUICE_TRY_ASSIGN(m, matrix(op.weights[i]));
    SLUICE_CHECK(m.cols == width(op.in) && m.rows == width(op.out[i]) && op.in != op.out[i]);
    SLUICE_CHECK(op.out[i] != Slot::logits || active_rows_ <= shape_.max_logit_rows);
    matrices[i] = m;
  }
  // Weights of one form next to each other share it; a mixed operation takes one run after the other.
  for (uint32_t first = 0, last = 0; first < op.weight_count; first = last) {
    const Form form = form_of(matrices[first]);
    const auto shares_form = [&](uint32_t i) {
      return form_of(matrices[i]) == form && same_order(op.weights[first], op.weights[i]);
    };
    for (last = first + 1; last < op.weight_count && shares_form(last);) ++last;
    const uint32_t chunk = form == Form::quantized ? kChunkRows : kFloatChunkRows;
    for (uint32_t row = 0; row < active_rows_; row += chunk) {
      multiply_chunk(op, first, last, form, matrices, row, std::min(chunk, active_rows_ - row));
    }
  }
  return {};
}

}  // namespace sluice::backend::cpu
