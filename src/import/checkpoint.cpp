// SPDX-License-Identifier: Apache-2.0
#include "import/checkpoint.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <system_error>

#include "import/ggml_blocks.hpp"

namespace sluice::import {

using storage::Architecture;
using storage::HyperParameters;
using storage::Role;

const char* name_of(SourceType type) {
  switch (type) {
    case SourceType::f32: return "F32";
    case SourceType::f16: return "F16";
    case SourceType::bf16: return "BF16";
    case SourceType::q4_0: return "Q4_0";
    case SourceType::q4_1: return "Q4_1";
    case SourceType::q5_0: return "Q5_0";
    case SourceType::q5_1: return "Q5_1";
    case SourceType::q8_0: return "Q8_0";
    case SourceType::q2_k: return "Q2_K";
    case SourceType::q3_k: return "Q3_K";
    case SourceType::q4_k: return "Q4_K";
    case SourceType::q5_k: return "Q5_K";
    case SourceType::q6_k: return "Q6_K";
    case SourceType::gptq: return "GPTQ INT4";
    case SourceType::awq: return "AWQ INT4";
    case SourceType::compressed: return "compressed-tensors INT4";
  }
  return "?";
}

uint32_t block_elems(SourceType type) {
  if (is_plain(type) || type >= SourceType::gptq) return 1;
  return type >= SourceType::q2_k ? kSuperBlockElems : kBlockElems;
}

uint32_t block_bytes(SourceType type) {
  switch (type) {
    case SourceType::f32: return 4;
    case SourceType::f16:
    case SourceType::bf16: return 2;
    case SourceType::q4_0: return 18;
    case SourceType::q4_1: return 20;
    case SourceType::q5_0: return 22;
    case SourceType::q5_1: return 24;
    case SourceType::q8_0: return 34;
    case SourceType::q2_k: return 84;
    case SourceType::q3_k: return 110;
    case SourceType::q4_k: return 144;
    case SourceType::q5_k: return 176;
    case SourceType::q6_k: return 210;
    case SourceType::gptq:
    case SourceType::awq:
    case SourceType::compressed: return 0;  // in parts
  }
  return 0;
}

SourceType most_common_type(const std::vector<SourceTensor>& tensors) {
  std::array<uint64_t, static_cast<size_t>(SourceType::compressed) + 1> weights = {};
  for (const SourceTensor& tensor : tensors) {
    weights[static_cast<size_t>(tensor.type)] += uint64_t{tensor.rows} * tensor.cols;
  }
  return static_cast<SourceType>(std::max_element(weights.begin(), weights.end()) - weights.begin());
}

std::vector<WantedTensor> wanted_tensors(const HyperParameters& hyper, bool attention_bias) {
  std::vector<WantedTensor> wanted;
  const auto matrix = [&](Role role, int32_t layer, uint32_t rows, uint32_t cols, std::string name) {
    wanted.push_back({role, layer, rows, cols, false, std::move(name)});
  };
  const auto vector = [&](Role role, int32_t layer, uint32_t length, std::string name) {
    wanted.push_back({role, layer, 1, length, true, std::move(name)});
  };
  const uint32_t q_width = hyper.heads * hyper.head_dim;
  const uint32_t kv_width = hyper.kv_heads * hyper.head_dim;
  matrix(Role::token_embedding, -1, hyper.vocab, hyper.hidden, "model.embed_tokens.weight");
  for (int32_t layer = 0; layer < static_cast<int32_t>(hyper.layers); ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    const std::string attention = prefix + "self_attn.";
    vector(Role::attn_norm, layer, hyper.hidden, prefix + "input_layernorm.weight");
    matrix(Role::q, layer, q_width, hyper.hidden, attention + "q_proj.weight");
    matrix(Role::k, layer, kv_width, hyper.hidden, attention + "k_proj.weight");
    matrix(Role::v, layer, kv_width, hyper.hidden, attention + "v_proj.weight");
    if (attention_bias) {
      vector(Role::q_bias, layer, q_width, attention + "q_proj.bias");
      vector(Role::k_bias, layer, kv_width, attention + "k_proj.bias");
      vector(Role::v_bias, layer, kv_width, attention + "v_proj.bias");
    }
    if (hyper.architecture == Architecture::qwen3) {
      vector(Role::q_norm, layer, hyper.head_dim, attention + "q_norm.weight");
      vector(Role::k_norm, layer, hyper.head_dim, attention + "k_norm.weight");
    }
    matrix(Role::o, layer, hyper.hidden, q_width, attention + "o_proj.weight");
    vector(Role::ffn_norm, layer, hyper.hidden, prefix + "post_attention_layernorm.weight");
    matrix(Role::gate, layer, hyper.ffn, hyper.hidden, prefix + "mlp.gate_proj.weight");
    matrix(Role::up, layer, hyper.ffn, hyper.hidden, prefix + "mlp.up_proj.weight");
    matrix(Role::down, layer, hyper.hidden, hyper.ffn, prefix + "mlp.down_proj.weight");
  }
  vector(Role::output_norm, -1, hyper.hidden, "model.norm.weight");
  matrix(Role::lm_head, -1, hyper.vocab, hyper.hidden, "lm_head.weight");
  return wanted;
}

Status check_hyper_parameters(const HyperParameters& hyper, const std::string& where) {
  const struct {
    const char* name;
    uint64_t value, most;
  } sizes[] = {
      {"number of layers", hyper.layers, 4096},        {"hidden size", hyper.hidden, 1u << 20},
      {"number of heads", hyper.heads, 4096},          {"number of KV heads", hyper.kv_heads, 4096},
      {"head dimension", hyper.head_dim, 4096},        {"feed-forward size", hyper.ffn, 1u << 22},
      {"vocabulary size", hyper.vocab, 1u << 24},      {"context length", hyper.max_context, 1u << 30},
      {"width of all heads", uint64_t{hyper.heads} * hyper.head_dim, 1u << 20},
  };
  for (const auto& size : sizes) {
    if (size.value == 0 || size.value > size.most) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: the {} is {}, expected 1 to {}", where, size.name, size.value, size.most));
    }
  }
  if (hyper.heads % hyper.kv_heads != 0) {
    return fail(ErrorCode::corrupt, fmt::format("{}: {} heads cannot share {} KV heads evenly", where, hyper.heads,
                                                hyper.kv_heads));
  }
  if (hyper.head_dim % 2 != 0) {
    return fail(ErrorCode::unsupported, fmt::format("{}: the head dimension {} is odd; RoPE turns pairs", where,
                                                    hyper.head_dim));
  }
  if (!(hyper.norm_eps > 0) || !(hyper.norm_eps < 1)) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the RMSNorm epsilon is {}, expected between 0 and 1", where,
                                                hyper.norm_eps));
  }
  return {};
}

Result<Checkpoint> open_checkpoint(const std::string& source, const LogHook& log) {
  std::error_code error;
  const auto status = std::filesystem::status(source, error);
  if (status.type() == std::filesystem::file_type::not_found) {
    return fail(ErrorCode::not_found, fmt::format("{}: no such file or folder", source));
  }
  if (error) {
    return fail(ErrorCode::io, fmt::format("{}: {}", source, error.message()), error.value());
  }
  if (std::filesystem::is_directory(status)) return open_huggingface(source, log);
  if (source.ends_with(".safetensors") || source.ends_with(".json")) {
    return fail(ErrorCode::usage, fmt::format("{}: give the folder that holds config.json and the *.safetensors files, "
                                              "not one of its files", source));
  }
  return open_gguf(source, log);
}

}  // namespace sluice::import
