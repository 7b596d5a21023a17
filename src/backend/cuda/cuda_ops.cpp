// SPDX-License-Identifier: Apache-2.0
// The operations of a pass on a GPU: which kernel takes which memory. The arithmetic is in cuda/.
#include <fmt/format.h>

#include "backend/cuda/cuda_backend.hpp"
#include "backend/cuda/weight_planes.hpp"
#include "base/check.hpp"
#include "cuda/elementwise.hpp"
#include "cuda/matmul.hpp"

namespace sluice::backend::cuda {

using sluice::cuda::MatmulCall;
using sluice::cuda::MatmulPart;
using sluice::cuda::x_stride;

namespace {

const char* name_of(OpKind kind) {
  switch (kind) {
    case OpKind::rms_norm: return "RMSNorm";
    case OpKind::matmul: return "a matrix product";
    case OpKind::head_norm_rope: return "RoPE";
    case OpKind::attention: return "attention";
    case OpKind::swiglu: return "SwiGLU";
    case OpKind::select_rows: return "selecting rows";
  }
  return "an operation";
}

}  // namespace

const float* CudaBackend::vector(const Op& op, int index, uint32_t width) const {
  if (!op.has_vector[index]) return nullptr;
  return reinterpret_cast<const float*>(at(op.vectors[index], uint64_t{width} * sizeof(float)));
}

Status CudaBackend::launch(const Command& command, const PassKind& kind, bool overlap, cudaStream_t stream) {
  const Target target{.kind = kind, .rows = command.rows, .index = command.index, .stamp = stamp(command.index),
                      .programmatic = overlap && device_.programmatic_launch, .stream = stream};
  if (command.kind == CommandKind::begin_pass) return check(begin(target), "launching the start of a pass");
  if (command.kind == CommandKind::finish_pass) return check(finish(target), "launching the end of a pass");
  const Op& op = command.op;
  cudaError_t code = cudaErrorNotSupported;
  switch (op.kind) {
    case OpKind::rms_norm: code = rms_norm(op, target); break;
    case OpKind::matmul: code = matmul(op, target); break;
    case OpKind::head_norm_rope: code = head_norm_rope(op, target); break;
    case OpKind::attention: code = attention(op, target); break;
    case OpKind::swiglu: code = swiglu(target); break;
    case OpKind::select_rows: code = select_rows(target); break;
  }
  if (code == cudaSuccess) [[likely]] return {};
  return check(code, fmt::format("launching {} of layer {}", name_of(op.kind), op.layer));
}

cudaError_t CudaBackend::begin(const Target& target) const {
  return sluice::cuda::launch_begin_pass({.host_embeddings = pinned_.embeddings,
                            .host_table = pinned_.table,
                            .table_stride = shape_.max_rows,
                            .inverse_frequencies = scratch<float>(scratch_.inverse_frequencies),
                            .attention_factor = shape_.rope_attention_factor,
                            .rows = target.rows,
                            .hidden = shape_.hidden,
                            .pairs = shape_.rotary_dims / 2,
                            .residual = slot(Slot::residual),
                            .table = {.sessions = scratch<uint32_t>(scratch_.sessions),
                                      .positions = scratch<uint32_t>(scratch_.positions),
                                      .selected = scratch<uint32_t>(scratch_.selected)},
                            .angles = scratch<float2>(scratch_.angles),
                            .stamp = target.stamp,
                            .programmatic = target.programmatic}, target.stream);
}

cudaError_t CudaBackend::rms_norm(const Op& op, const Target& target) const {
  SLUICE_CHECK(op.in == Slot::residual && op.out[0] == Slot::normed);
  return sluice::cuda::launch_rms_norm({.in = slot(Slot::residual),
                          .weight = vector(op, 0, shape_.hidden),
                          .eps = shape_.norm_eps,
                          .rows = target.rows,
                          .width = shape_.hidden,
                          .out = scratch<__half>(scratch_.slots[static_cast<size_t>(Slot::normed)]),
                          .copies = copies_of_normed(target.rows),
                          .row_scale = scratch<float>(scratch_.normed_scale),
                          .stamp = target.stamp,
                          .programmatic = target.programmatic}, target.stream);
}

// Of slots that a product reads; no x otherwise.
MatmulInput CudaBackend::input(Slot from) const {
  const uint32_t ldx = x_stride(width(from));
  switch (from) {
    case Slot::normed:
      return {.x = scratch<__half>(scratch_.slots[static_cast<size_t>(from)]),
              .row_scale = scratch<float>(scratch_.normed_scale), .cols = width(from), .ldx = ldx};
    case Slot::attended:
      return {.x = scratch<__half>(scratch_.slots[static_cast<size_t>(from)]), .row_scale = nullptr,
              .cols = width(from), .ldx = ldx};
    case Slot::gate:
      return {.x = scratch<__half>(scratch_.gate_x), .row_scale = scratch<float>(scratch_.gate_scale),
              .cols = width(from), .ldx = ldx};
    default: return {};
  }
}

// Matrices that take the same input in the same order go in one call.
cudaError_t CudaBackend::matmul(const Op& op, const Target& target) const {
  SLUICE_CHECK(op.weight_count >= 1 && op.weight_count <= kMaxWeights);
  MatmulInput in = input(op.in);
  if (op.in == Slot::normed) in.copies = copies_of_normed(target.rows);
  if (in.x == nullptr) return cudaErrorNotSupported;  // no such input in any architecture
  for (int first = 0, last = 0; first < op.weight_count; first = last) {
    const Weight& weight = op.weights[first];
    for (last = first + 1; last < op.weight_count && same_order(weight, op.weights[last]);) ++last;
    MatmulInput ordered = in;
    if (weight.has_perm) {
      auto* gathered = scratch<__half>(scratch_.gathered);
      const auto* perm = reinterpret_cast<const uint32_t*>(at(weight.perm, uint64_t{weight.cols} * sizeof(uint32_t)));
      SLUICE_CHECK(shape_.gathers && weight.cols == in.cols);
      const cudaError_t code = sluice::cuda::launch_gather_columns(
          {.x = in.x, .perm = perm, .rows = target.rows, .width = in.cols, .out = gathered,
           .programmatic = target.programmatic}, target.stream);
      if (code != cudaSuccess) return code;
      ordered.x = gathered;
      ordered.copies = 1;
    }
    if (const cudaError_t code = multiply(op, first, last, ordered, target); code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

// Weights [first, last) of the operation.
cudaError_t CudaBackend::multiply(const Op& op, int first, int last, const MatmulInput& in, const Target& target) const {
  MatmulCall call;
  call.x = in.x;
  call.row_scale = in.row_scale;
  call.ldx = in.ldx;
  call.rows = target.rows;
  call.x_copies = in.copies;
  call.x_copy_elems = uint64_t{target.rows} * in.ldx;
  for (int i = first; i < last; ++i) {
    const Weight& weight = op.weights[i];
    SLUICE_CHECK(weight.cols == width(op.in) && weight.rows == width(op.out[i]) && op.in != op.out[i]);
    SLUICE_CHECK(op.out[i] != Slot::logits || target.rows <= shape_.max_logit_rows);
    MatmulPart& part = call.part[call.parts++];
    part.weight = {.format = format_of(weight.scheme), .rows = weight.rows, .cols = weight.cols,
                   .group_elems = weight.group_elems, .scale = weight.scale,
                   .values = at(weight.values, value_bytes(weight.scheme, weight.rows, weight.cols))};
    if (const uint64_t parameters = parameter_count(weight.rows, weight.cols, weight.group_elems); parameters != 0) {
      part.weight.scales = reinterpret_cast<const __half*>(at(weight.scales, parameters * 2));
      if (weight.has_zeros) part.weight.zeros = reinterpret_cast<const uint8_t*>(at(weight.zeros, parameters));
      if (weight.has_bias) part.weight.bias = reinterpret_cast<const __half*>(at(weight.bias, parameters * 2));
    }
    part.out = slot(op.out[i]);
    part.ldo = weight.rows;
    part.vector = vector(op, i, weight.rows);
  }
  call.accumulate = op.accumulate;
  // Weights that overlap the kernel in front are resident, or their copy was seen to be complete before the launch.
  call.programmatic = call.weights_early = target.programmatic;
  call.workspace = scratch<void>(scratch_.matmul_workspace);
  call.workspace_bytes = scratch_.matmul_workspace_bytes;
  return sluice::cuda::matmul(call, target.stream);
}

// Also stores k and v.
cudaError_t CudaBackend::head_norm_rope(const Op& op, const Target& target) const {
  return sluice::cuda::launch_head_norm_rope_store({.q = slot(Slot::q),
                                      .k = slot(Slot::k),
                                      .v = slot(Slot::v),
                                      .q_stride = width(Slot::q),
                                      .k_stride = width(Slot::k),
                                      .v_stride = width(Slot::v),
                                      .q_norm = vector(op, 0, shape_.head_dim),
                                      .k_norm = vector(op, 1, shape_.head_dim),
                                      .eps = shape_.norm_eps,
                                      .angles = scratch<float2>(scratch_.angles),
                                      .pairs = shape_.rotary_dims / 2,
                                      .sessions = scratch<uint32_t>(scratch_.sessions),
                                      .positions = scratch<uint32_t>(scratch_.positions),
                                      .row_count = target.rows,
                                      .heads = shape_.heads,
                                      .cache = kv_,
                                      .layer = op.layer,
                                      .stamp = target.stamp,
                                      .programmatic = target.programmatic}, target.stream);
}

// Captured with the bound of the pass's kind: positions grow past it into the next kind.
cudaError_t CudaBackend::attention(const Op& op, const Target& target) const {
  const sluice::cuda::Attention args{.q = slot(Slot::q),
                                     .q_stride = width(Slot::q),
                                     .out_x = scratch<__half>(scratch_.slots[static_cast<size_t>(Slot::attended)]),
                                     .out = nullptr,
                                     .sessions = scratch<uint32_t>(scratch_.sessions),
                                     .positions = scratch<uint32_t>(scratch_.positions),
                                     .row_count = target.rows,
                                     .heads = shape_.heads,
                                     .position_bound = target.kind.attention_bound,
                                     .cache = kv_,
                                     .layer = op.layer,
                                     .workspace = scratch<void>(scratch_.attention_workspace),
                                     .workspace_bytes = scratch_.attention_workspace_bytes,
                                     .stamp = target.stamp,
                                     .programmatic = target.programmatic};
  if (target.kind.prefill_attention) return sluice::cuda::launch_attention_prefill(args, target.stream);
  return sluice::cuda::launch_attention_decode(args, target.stream);
}

cudaError_t CudaBackend::swiglu(const Target& target) const {
  return sluice::cuda::launch_swiglu({.gate = slot(Slot::gate),
                        .up = slot(Slot::up),
                        .rows = target.rows,
                        .width = shape_.ffn,
                        .out = scratch<__half>(scratch_.gate_x),
                        .row_scale = scratch<float>(scratch_.gate_scale),
                        .sync = scratch<uint2>(scratch_.swiglu_sync),
                        .stamp = target.stamp,
                        .programmatic = target.programmatic}, target.stream);
}

cudaError_t CudaBackend::select_rows(const Target& target) const {
  return sluice::cuda::launch_select_rows({.rows = slot(Slot::residual),
                             .selected = scratch<uint32_t>(scratch_.selected),
                             .selected_rows = target.rows,
                             .width = shape_.hidden,
                             .stamp = target.stamp,
                             .programmatic = target.programmatic}, target.stream);
}

cudaError_t CudaBackend::finish(const Target& target) const {
  return sluice::cuda::launch_finish_pass({.logits = slot(Slot::logits),
                             .host_logits = pinned_.logits,
                             .logit_count = uint64_t{target.rows} * shape_.vocab,
                             .stamps = stamp(0),
                             .host_stamps = pinned_.stamps,
                             .stamp_count = target.index + 1,
                             .programmatic = target.programmatic}, target.stream);
}

}  // namespace sluice::backend::cuda
