// SPDX-License-Identifier: Apache-2.0
#include "storage/manifest.hpp"

namespace sluice::storage {

const Plane* Tensor::plane(PlaneKind kind) const {
  for (const Plane& plane : planes) {
    if (plane.kind == kind) return &plane;
  }
  return nullptr;
}

Tensor Tensor::residual() const {
  Tensor of = *this;
  of.name += " (residual)";
  of.is_residual = true;
  of.group_elems = residual_group();
  of.residual_group_elems = 0;
  std::erase_if(of.planes, [](const Plane& plane) {
    return plane.kind != PlaneKind::residual && plane.kind != PlaneKind::residual_scales;
  });
  for (Plane& plane : of.planes) {
    plane.kind = plane.kind == PlaneKind::residual ? PlaneKind::values : PlaneKind::scales;
  }
  return of;
}

namespace {

constexpr uint64_t kHalfBytes = 2;

// One entry per row and group; tiled layouts round the rows up to whole tiles.
uint64_t group_entries(const Tensor& tensor, uint32_t group_elems) {
  if (group_elems == 0) return 0;
  const uint64_t rows = tensor.layout == Layout::rows ? tensor.rows : align_up(tensor.rows, kTileRows);
  return rows * ceil_div(tensor.cols, group_elems);
}

uint64_t values_bytes(const Tensor& tensor) {
  const uint64_t row_tiles = ceil_div(tensor.rows, kTileRows);
  switch (tensor.layout) {
    case Layout::rows: {
      const uint64_t elements = uint64_t{tensor.rows} * tensor.cols;
      switch (tensor.scheme) {
        case Scheme::f32: return elements * 4;
        case Scheme::f16:
        case Scheme::bf16: return elements * 2;
        case Scheme::int8: return elements;
        case Scheme::int4: return 0;  // rows are never int4
      }
      return 0;
    }
    case Layout::tile16x16:
      if (tensor.scheme != Scheme::f16 && tensor.scheme != Scheme::bf16) return 0;
      return row_tiles * ceil_div(tensor.cols, 16) * 512;
    case Layout::tile16x64:
      if (tensor.scheme == Scheme::int4) return row_tiles * ceil_div(tensor.cols, 64) * 512;
      if (tensor.scheme == Scheme::int8) return row_tiles * ceil_div(tensor.cols, 64) * 1024;
      return 0;
  }
  return 0;
}

}  // namespace

uint64_t expected_plane_bytes(const Tensor& tensor, PlaneKind kind) {
  const bool int4 = tensor.scheme == Scheme::int4;
  const bool quantized = int4 || tensor.scheme == Scheme::int8;
  switch (kind) {
    case PlaneKind::values: return values_bytes(tensor);
    case PlaneKind::scales: return quantized ? group_entries(tensor, tensor.group_elems) * kHalfBytes : 0;
    case PlaneKind::zeros: return int4 ? group_entries(tensor, tensor.group_elems) : 0;
    case PlaneKind::bias: return int4 ? group_entries(tensor, tensor.group_elems) * kHalfBytes : 0;
    case PlaneKind::residual: return int4 ? values_bytes(tensor) : 0;
    case PlaneKind::residual_scales: return int4 ? group_entries(tensor, tensor.residual_group()) * kHalfBytes : 0;
    case PlaneKind::perm: return int4 ? uint64_t{tensor.cols} * 4 : 0;
    case PlaneKind::row_sums: return tensor.role == Role::token_embedding ? uint64_t{tensor.rows} * 8 : 0;
  }
  return 0;
}

std::string_view name_of(Architecture value) {
  switch (value) {
    case Architecture::llama: return "llama";
    case Architecture::mistral: return "mistral";
    case Architecture::qwen2: return "qwen2";
    case Architecture::qwen3: return "qwen3";
  }
  return "?";
}

std::string_view name_of(Scheme value) {
  switch (value) {
    case Scheme::f32: return "f32";
    case Scheme::f16: return "f16";
    case Scheme::bf16: return "bf16";
    case Scheme::int8: return "int8";
    case Scheme::int4: return "int4";
  }
  return "?";
}

std::string_view name_of(Layout value) {
  switch (value) {
    case Layout::rows: return "rows";
    case Layout::tile16x16: return "tile16x16";
    case Layout::tile16x64: return "tile16x64";
  }
  return "?";
}

std::string_view name_of(PlaneKind value) {
  switch (value) {
    case PlaneKind::values: return "values";
    case PlaneKind::scales: return "scales";
    case PlaneKind::zeros: return "zeros";
    case PlaneKind::bias: return "bias";
    case PlaneKind::residual: return "residual";
    case PlaneKind::residual_scales: return "residual_scales";
    case PlaneKind::perm: return "perm";
    case PlaneKind::row_sums: return "row_sums";
  }
  return "?";
}

std::string_view name_of(Role value) {
  switch (value) {
    case Role::token_embedding: return "token_embedding";
    case Role::attn_norm: return "attn_norm";
    case Role::q: return "q";
    case Role::k: return "k";
    case Role::v: return "v";
    case Role::o: return "o";
    case Role::q_bias: return "q_bias";
    case Role::k_bias: return "k_bias";
    case Role::v_bias: return "v_bias";
    case Role::q_norm: return "q_norm";
    case Role::k_norm: return "k_norm";
    case Role::ffn_norm: return "ffn_norm";
    case Role::gate: return "gate";
    case Role::up: return "up";
    case Role::down: return "down";
    case Role::output_norm: return "output_norm";
    case Role::lm_head: return "lm_head";
  }
  return "?";
}

}  // namespace sluice::storage
