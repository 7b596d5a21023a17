// SPDX-License-Identifier: Apache-2.0
#include "storage/manifest_check.hpp"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <optional>

#include "storage/container.hpp"

namespace sluice::storage {

namespace {

// Caps that keep every product below in 64 bits: rows * cols * 4 <= 2^58.
constexpr uint32_t kMaxLayers = 4096;
constexpr uint32_t kMaxHeads = 1u << 14;
constexpr uint32_t kMaxHeadDim = 1u << 12;
constexpr uint32_t kMaxWidth = 1u << 24;     // hidden, FFN
constexpr uint32_t kMaxVocab = 1u << 24;
constexpr uint32_t kMaxContext = 1u << 30;
constexpr int32_t kMaxScaleExponent = 126;   // 2^e is a normal float

constexpr size_t kRoles = static_cast<size_t>(Role::lm_head) + 1;

struct Shape {
  uint32_t rows = 0;
  uint32_t cols = 0;
};

bool is_layer_role(Role role) { return role >= Role::attn_norm && role <= Role::down; }

bool is_matrix_role(Role role) {
  switch (role) {
    case Role::token_embedding:
    case Role::q:
    case Role::k:
    case Role::v:
    case Role::o:
    case Role::gate:
    case Role::up:
    case Role::down:
    case Role::lm_head: return true;
    default: return false;
  }
}

// Whether a model of this architecture may, must or must not have the role.
enum class Presence { required, optional, forbidden };

Presence presence_of(Role role, Architecture architecture) {
  switch (role) {
    case Role::q_bias:
    case Role::k_bias:
    case Role::v_bias:
      if (architecture == Architecture::qwen2) return Presence::required;
      return architecture == Architecture::llama ? Presence::optional : Presence::forbidden;  // attention_bias
    case Role::q_norm:
    case Role::k_norm: return architecture == Architecture::qwen3 ? Presence::required : Presence::forbidden;
    default: return Presence::required;
  }
}

// The one shape a tensor of that role has in this model; hyperparameters are already within their caps.
Shape shape_of(Role role, const HyperParameters& hyper) {
  const uint32_t q_rows = hyper.heads * hyper.head_dim;
  const uint32_t kv_rows = hyper.kv_heads * hyper.head_dim;
  switch (role) {
    case Role::token_embedding:
    case Role::lm_head: return {hyper.vocab, hyper.hidden};
    case Role::q: return {q_rows, hyper.hidden};
    case Role::k:
    case Role::v: return {kv_rows, hyper.hidden};
    case Role::o: return {hyper.hidden, q_rows};
    case Role::q_bias: return {1, q_rows};
    case Role::k_bias:
    case Role::v_bias: return {1, kv_rows};
    case Role::q_norm:
    case Role::k_norm: return {1, hyper.head_dim};
    case Role::gate:
    case Role::up: return {hyper.ffn, hyper.hidden};
    case Role::down: return {hyper.hidden, hyper.ffn};
    case Role::attn_norm:
    case Role::ffn_norm:
    case Role::output_norm: return {1, hyper.hidden};
  }
  return {};
}

// One run of the checks; its methods share the manifest and the path for messages.
class Checker {
 public:
  Checker(const Manifest& manifest, uint64_t planes_end, const std::string& path)
      : manifest_(manifest), hyper_(manifest.hyper), planes_end_(planes_end), path_(path) {}

  Status run() {
    SLUICE_TRY(hyperparameters());
    SLUICE_TRY(rope());
    SLUICE_TRY(tokenizer());
    SLUICE_TRY(generation());
    uint64_t next_offset = kHeaderBytes;
    for (const Tensor& tensor : manifest_.tensors) {
      SLUICE_TRY(scheme(tensor));
      SLUICE_TRY(role(tensor));
      SLUICE_TRY(planes(tensor, next_offset));
    }
    if (next_offset != planes_end_) {
      return bad("planes end at offset {}, the manifest begins at {}", next_offset, planes_end_);
    }
    return completeness();
  }

 private:
  template <class... Args>
  Status bad(fmt::format_string<Args...> format, Args&&... args) const {
    return fail(ErrorCode::corrupt, path_ + ": " + fmt::format(format, std::forward<Args>(args)...));
  }
  template <class... Args>
  Status beyond(fmt::format_string<Args...> format, Args&&... args) const {
    return fail(ErrorCode::unsupported, path_ + ": " + fmt::format(format, std::forward<Args>(args)...) +
                                            "; update Sluice, or import the model again");
  }

  static std::string label(const Tensor& tensor) {
    if (!tensor.name.empty()) return "tensor '" + tensor.name + "'";
    return fmt::format("tensor of role {}, layer {}", name_of(tensor.role), tensor.layer);
  }

  Status within(std::string_view field, uint32_t value, uint32_t cap) const {
    if (value == 0 || value > cap) return bad("{} is {}; between 1 and {} are possible", field, value, cap);
    return {};
  }

  Status hyperparameters() const {
    SLUICE_TRY(within("layers", hyper_.layers, kMaxLayers));
    SLUICE_TRY(within("hidden", hyper_.hidden, kMaxWidth));
    SLUICE_TRY(within("heads", hyper_.heads, kMaxHeads));
    SLUICE_TRY(within("kv_heads", hyper_.kv_heads, hyper_.heads));
    SLUICE_TRY(within("head_dim", hyper_.head_dim, kMaxHeadDim));
    SLUICE_TRY(within("ffn", hyper_.ffn, kMaxWidth));
    SLUICE_TRY(within("vocab", hyper_.vocab, kMaxVocab));
    SLUICE_TRY(within("max_context", hyper_.max_context, kMaxContext));
    if (hyper_.heads % hyper_.kv_heads != 0) {
      return bad("{} heads cannot share {} KV heads evenly", hyper_.heads, hyper_.kv_heads);
    }
    if (hyper_.head_dim % 2 != 0) return bad("head_dim is {}, it must be even", hyper_.head_dim);
    if (uint64_t{hyper_.heads} * hyper_.head_dim > kMaxWidth) {
      return bad("{} heads of {} are wider than {}", hyper_.heads, hyper_.head_dim, kMaxWidth);
    }
    if (!std::isfinite(hyper_.norm_eps) || hyper_.norm_eps < 0 || hyper_.norm_eps > 1) {
      return bad("norm_eps is {}; between 0 and 1 is possible", hyper_.norm_eps);
    }
    return {};
  }

  Status rope() const {
    const Rope& rope = manifest_.rope;
    if (rope.rotary_dims % 2 != 0 || rope.rotary_dims > hyper_.head_dim) {
      return bad("rope.rotary_dims is {}; it must be even and at most head_dim = {}", rope.rotary_dims, hyper_.head_dim);
    }
    if (rope.inverse_frequencies.size() != rope.rotary_dims / 2) {
      return bad("rope has {} inverse frequencies, {} rotary dimensions need {}", rope.inverse_frequencies.size(),
                 rope.rotary_dims, rope.rotary_dims / 2);
    }
    for (float frequency : rope.inverse_frequencies) {
      if (!std::isfinite(frequency) || frequency < 0) return bad("a rope inverse frequency is {}", frequency);
    }
    if (!std::isfinite(rope.attention_factor) || rope.attention_factor <= 0) {
      return bad("rope.attention_factor is {}; it must be positive", rope.attention_factor);
    }
    if (!rope.halves) return beyond("rope pairs are interleaved; version 1 has halves only");
    return {};
  }

  Status tokenizer() const {
    const TokenizerSpec& tokenizer = manifest_.tokenizer;
    const size_t tokens = tokenizer.tokens.size();
    if ((tokenizer.model == TokenizerModel::none) != (tokens == 0)) {
      return bad("tokenizer model {} with {} tokens", static_cast<int>(tokenizer.model), tokens);
    }
    if (tokens > hyper_.vocab) return bad("tokenizer has {} tokens, the vocabulary {}", tokens, hyper_.vocab);
    if (tokenizer.kinds.size() != tokens) return bad("tokenizer has {} kinds for {} tokens", tokenizer.kinds.size(), tokens);
    if (!tokenizer.scores.empty() && tokenizer.scores.size() != tokens) {
      return bad("tokenizer has {} scores for {} tokens", tokenizer.scores.size(), tokens);
    }
    for (float score : tokenizer.scores) {
      if (std::isnan(score)) return bad("a tokenizer score is not a number");
    }
    // Without a tokenizer, ids can still be fed and stopped at; then the vocabulary bounds them.
    const int64_t id_end = static_cast<int64_t>(tokens != 0 ? tokens : hyper_.vocab);
    const struct { std::string_view name; int32_t id; } single_ids[] = {
        {"bos", tokenizer.bos}, {"eos", tokenizer.eos}, {"unknown", tokenizer.unknown}};
    for (const auto& [name, id] : single_ids) {
      if (id < -1 || id >= id_end) return bad("tokenizer {} is {}, ids end at {}", name, id, id_end);
    }
    const struct { std::string_view name; const std::vector<int32_t>& ids; } id_lists[] = {
        {"stop_ids", tokenizer.stop_ids}, {"rstrip_ids", tokenizer.rstrip_ids}, {"lstrip_ids", tokenizer.lstrip_ids}};
    for (const auto& [name, ids] : id_lists) {
      for (int32_t id : ids) {
        if (id < 0 || id >= id_end) return bad("tokenizer {} has {}, ids end at {}", name, id, id_end);
      }
    }
    return {};
  }

  Status generation() const {
    const GenerationDefaults& defaults = manifest_.generation;
    for (float value : {defaults.temperature, defaults.top_p, defaults.min_p, defaults.repetition_penalty}) {
      if (!std::isfinite(value)) return bad("a generation default is {}", value);
    }
    return {};
  }

  // Scheme, layout, group and scale exponent go together.
  Status scheme(const Tensor& tensor) const {
    const bool quantized = tensor.scheme == Scheme::int4 || tensor.scheme == Scheme::int8;
    const std::string what = label(tensor);
    if (quantized && tensor.group_elems != 32 && tensor.group_elems != 64 && tensor.group_elems != 128) {
      return bad("{}: group of {}; 32, 64 and 128 are possible", what, tensor.group_elems);
    }
    if (!quantized && tensor.group_elems != 0) {
      return bad("{}: {} with a group of {}", what, name_of(tensor.scheme), tensor.group_elems);
    }
    const uint32_t second = tensor.residual_group_elems;
    if (second != 0 && (tensor.scheme != Scheme::int4 || (second != 32 && second != 64 && second != 128))) {
      return bad("{}: {} with a residual's group of {}", what, name_of(tensor.scheme), second);
    }
    if (tensor.scale_exponent < -kMaxScaleExponent || tensor.scale_exponent > kMaxScaleExponent) {
      return bad("{}: scale exponent {} is beyond +-{}", what, tensor.scale_exponent, kMaxScaleExponent);
    }

    std::optional<Layout> expected;
    if (!is_matrix_role(tensor.role)) {
      if (tensor.scheme != Scheme::f32) return bad("{}: vectors are f32, this one is {}", what, name_of(tensor.scheme));
      // A vector is used as it lies; nothing multiplies it by a power of two.
      if (tensor.scale_exponent != 0) return bad("{}: a vector with scale exponent {}", what, tensor.scale_exponent);
      expected = Layout::rows;
    } else if (tensor.role == Role::token_embedding) {
      if (tensor.scheme == Scheme::int4) return bad("{}: an embedding cannot be int4", what);
      expected = Layout::rows;
    } else {
      switch (tensor.scheme) {
        case Scheme::f32: expected = Layout::rows; break;
        case Scheme::f16:
        case Scheme::bf16: expected = Layout::tile16x16; break;
        case Scheme::int8:
        case Scheme::int4: expected = Layout::tile16x64; break;
      }
    }
    if (tensor.layout != expected) {
      return bad("{}: {} in layout {}, expected {}", what, name_of(tensor.scheme), name_of(tensor.layout),
                 expected ? name_of(*expected) : "?");
    }
    return {};
  }

  // Role, layer and shape; counts what `completeness` needs. Order: embedding, layer 0, 1, ..., output_norm, lm_head.
  Status role(const Tensor& tensor) {
    const std::string what = label(tensor);
    const bool in_layer = is_layer_role(tensor.role);
    if (in_layer ? tensor.layer < 0 || static_cast<uint32_t>(tensor.layer) >= hyper_.layers : tensor.layer != -1) {
      return bad("{}: role {} in layer {} of {}", what, name_of(tensor.role), tensor.layer, hyper_.layers);
    }
    if (presence_of(tensor.role, hyper_.architecture) == Presence::forbidden) {
      return bad("{}: architecture {} has no {}", what, name_of(hyper_.architecture), name_of(tensor.role));
    }
    const Shape shape = shape_of(tensor.role, hyper_);
    if (tensor.rows != shape.rows || tensor.cols != shape.cols) {
      return bad("{}: shape {}x{}, expected {}x{}", what, tensor.rows, tensor.cols, shape.rows, shape.cols);
    }

    uint64_t position = 0;
    if (in_layer) position = 1 + static_cast<uint64_t>(tensor.layer);
    if (tensor.role == Role::output_norm) position = 1 + uint64_t{hyper_.layers};
    if (tensor.role == Role::lm_head) position = 2 + uint64_t{hyper_.layers};
    if (position < position_) return bad("{}: comes after a later part of the model; tensors are in execution order", what);
    if (position != position_) seen_ = {};
    position_ = position;
    if (seen_[static_cast<size_t>(tensor.role)]) {
      return bad("{}: a second {} in layer {}", what, name_of(tensor.role), tensor.layer);
    }
    seen_[static_cast<size_t>(tensor.role)] = true;
    ++role_counts_[static_cast<size_t>(tensor.role)];
    return {};
  }

  // `next_offset` is where the first plane must lie; it moves behind the last one.
  Status planes(const Tensor& tensor, uint64_t& next_offset) const {
    const std::string what = label(tensor);
    if (tensor.planes.empty() || tensor.planes.front().kind != PlaneKind::values) {
      return bad("{}: its first plane must be values", what);
    }
    std::array<bool, static_cast<size_t>(PlaneKind::row_sums) + 1> present = {};
    for (const Plane& plane : tensor.planes) {
      const std::string_view kind = name_of(plane.kind);
      if (present[static_cast<size_t>(plane.kind)]) return bad("{}: two planes of {}", what, kind);
      present[static_cast<size_t>(plane.kind)] = true;
      if (plane.part != 0) return beyond("{}: plane {} lies in part {}, version 1 has part 0 only", what, kind, plane.part);
      const uint64_t expected = expected_plane_bytes(tensor, plane.kind);
      if (expected == 0) return bad("{}: {} cannot have a plane of {}", what, name_of(tensor.scheme), kind);
      if (plane.bytes != expected) {
        return bad("{}: plane {} has {} bytes, its shape needs {}", what, kind, plane.bytes, expected);
      }
      if (plane.offset != next_offset) {
        return bad("{}: plane {} lies at offset {}, expected {}", what, kind, plane.offset, next_offset);
      }
      // next_offset <= planes_end_, both multiples of 4096, and bytes < 2^59: nothing here can wrap.
      if (plane.padded_bytes() > planes_end_ - next_offset) {
        return bad("{}: plane {} at offset {} ({} bytes) reaches beyond the planes, which end at {}", what, kind,
                   plane.offset, plane.bytes, planes_end_);
      }
      if (plane.block_sums.size() != ceil_div(plane.bytes, kBlockBytes)) {
        return bad("{}: plane {} has {} checksums for {} bytes, expected {}", what, kind, plane.block_sums.size(),
                   plane.bytes, ceil_div(plane.bytes, kBlockBytes));
      }
      next_offset += plane.padded_bytes();
    }

    const auto has = [&](PlaneKind kind) { return present[static_cast<size_t>(kind)]; };
    const bool quantized = tensor.scheme == Scheme::int4 || tensor.scheme == Scheme::int8;
    if (quantized && !has(PlaneKind::scales)) return bad("{}: {} without scales", what, name_of(tensor.scheme));
    if (tensor.role == Role::token_embedding && !has(PlaneKind::row_sums)) return bad("{}: no row_sums", what);
    if (has(PlaneKind::zeros) && has(PlaneKind::bias)) return bad("{}: both zeros and bias", what);
    if (has(PlaneKind::residual) != has(PlaneKind::residual_scales)) {
      return bad("{}: residual and residual_scales come together", what);
    }
    return {};
  }

  Status completeness() const {
    for (size_t i = 0; i < kRoles; ++i) {
      const Role role = static_cast<Role>(i);
      const uint32_t all = is_layer_role(role) ? hyper_.layers : 1;
      const Presence presence = presence_of(role, hyper_.architecture);
      if (role_counts_[i] == all || presence == Presence::forbidden) continue;
      if (role_counts_[i] == 0 && presence == Presence::optional) continue;
      return bad("{} of {} tensors of role {} are there", role_counts_[i], all, name_of(role));
    }
    const auto count = [&](Role role) { return role_counts_[static_cast<size_t>(role)]; };
    if (count(Role::q_bias) != count(Role::k_bias) || count(Role::q_bias) != count(Role::v_bias)) {
      return bad("q_bias, k_bias and v_bias come together");
    }
    return {};
  }

  const Manifest& manifest_;
  const HyperParameters& hyper_;
  const uint64_t planes_end_;
  const std::string& path_;
  uint64_t position_ = 0;                        // of the tensor before: 0 embedding, 1 + layer, ...
  std::array<bool, kRoles> seen_ = {};           // roles at this position
  std::array<uint32_t, kRoles> role_counts_ = {};
};

}  // namespace

Status check_manifest(const Manifest& manifest, uint64_t planes_end, const std::string& path) {
  return Checker(manifest, planes_end, path).run();
}

}  // namespace sluice::storage
