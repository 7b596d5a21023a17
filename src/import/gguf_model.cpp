// SPDX-License-Identifier: Apache-2.0
// A GGUF file as a checkpoint: architecture keys into hyperparameters, tensor names into roles.
#include <fcntl.h>
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "import/gguf.hpp"
#include "import/gguf_tokenizer.hpp"
#include "import/rope.hpp"
#include "import/source_file.hpp"
#include "import/text.hpp"

namespace sluice::import {
namespace {

using storage::Architecture;
using storage::HyperParameters;
using storage::Role;

const char* gguf_suffix(Role role) {
  switch (role) {
    case Role::token_embedding: return "token_embd.weight";
    case Role::attn_norm: return "attn_norm.weight";
    case Role::q: return "attn_q.weight";
    case Role::k: return "attn_k.weight";
    case Role::v: return "attn_v.weight";
    case Role::o: return "attn_output.weight";
    case Role::q_bias: return "attn_q.bias";
    case Role::k_bias: return "attn_k.bias";
    case Role::v_bias: return "attn_v.bias";
    case Role::q_norm: return "attn_q_norm.weight";
    case Role::k_norm: return "attn_k_norm.weight";
    case Role::ffn_norm: return "ffn_norm.weight";
    case Role::gate: return "ffn_gate.weight";
    case Role::up: return "ffn_up.weight";
    case Role::down: return "ffn_down.weight";
    case Role::output_norm: return "output_norm.weight";
    case Role::lm_head: return "output.weight";
  }
  return "";
}

std::string gguf_name(Role role, int32_t layer) {
  return layer < 0 ? gguf_suffix(role) : fmt::format("blk.{}.{}", layer, gguf_suffix(role));
}

// The keys of one architecture: "llama.block_count" and the like.
class ArchitectureKeys {
 public:
  ArchitectureKeys(const Gguf& gguf, std::string architecture) : gguf_(gguf), architecture_(std::move(architecture)) {}

  std::string name(std::string_view key) const { return fmt::format("{}.{}", architecture_, key); }

  Result<uint32_t> size(std::string_view key, std::optional<uint32_t> otherwise = std::nullopt) const {
    SLUICE_TRY_ASSIGN(value, gguf_.unsigned_integer(name(key)));
    if (!value && otherwise) return *otherwise;
    if (!value) {
      return fail(ErrorCode::corrupt, fmt::format("{}: key {} is missing; convert the model again", gguf_.path(),
                                                  in_quotes(name(key))));
    }
    if (*value > std::numeric_limits<uint32_t>::max()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: key {} is {}", gguf_.path(), in_quotes(name(key)), *value));
    }
    return static_cast<uint32_t>(*value);
  }

  Result<double> number(std::string_view key, std::optional<double> otherwise = std::nullopt) const {
    SLUICE_TRY_ASSIGN(value, gguf_.number(name(key)));
    if (value) return *value;
    if (otherwise) return *otherwise;
    return fail(ErrorCode::corrupt, fmt::format("{}: key {} is missing; convert the model again", gguf_.path(),
                                                in_quotes(name(key))));
  }

 private:
  const Gguf& gguf_;
  std::string architecture_;
};

Result<HyperParameters> read_hyper_parameters(const Gguf& gguf, const ArchitectureKeys& keys,
                                              Architecture architecture, const LogHook& log) {
  HyperParameters hyper;
  hyper.architecture = architecture;
  SLUICE_TRY_ASSIGN(experts, keys.size("expert_count", 0));
  if (experts != 0) {
    return fail(ErrorCode::unsupported, fmt::format("{}: a mixture of {} experts; only dense models are supported",
                                                    gguf.path(), experts));
  }
  SLUICE_TRY_ASSIGN(layers, keys.size("block_count"));
  SLUICE_TRY_ASSIGN(hidden, keys.size("embedding_length"));
  SLUICE_TRY_ASSIGN(heads, keys.size("attention.head_count"));
  SLUICE_TRY_ASSIGN(kv_heads, keys.size("attention.head_count_kv", heads));
  SLUICE_TRY_ASSIGN(ffn, keys.size("feed_forward_length"));
  SLUICE_TRY_ASSIGN(context, keys.size("context_length"));
  SLUICE_TRY_ASSIGN(epsilon, keys.number("attention.layer_norm_rms_epsilon"));
  if (heads == 0) return fail(ErrorCode::corrupt, fmt::format("{}: the model has no attention heads", gguf.path()));
  SLUICE_TRY_ASSIGN(head_dim, keys.size("attention.key_length", hidden / heads));
  SLUICE_TRY_ASSIGN(value_dim, keys.size("attention.value_length", head_dim));
  if (value_dim != head_dim) {
    return fail(ErrorCode::unsupported, fmt::format("{}: keys of {} and values of {} dimensions; they must be alike",
                                                    gguf.path(), head_dim, value_dim));
  }
  SLUICE_TRY_ASSIGN(window, keys.size("attention.sliding_window", 0));
  if (window != 0 && window < context) {
    log_warning(log, fmt::format("{}: the model attends to the last {} positions only, which is not supported; the "
                                 "context length is set to {}, where both are the same", gguf.path(), window, window));
    context = window;
  }
  const GgufTensor* embedding = gguf.find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2 ||
      embedding->shape[1] > std::numeric_limits<uint32_t>::max()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: tensor \"token_embd.weight\" is missing or not a matrix",
                                                gguf.path()));
  }
  hyper.layers = layers;
  hyper.hidden = hidden;
  hyper.heads = heads;
  hyper.kv_heads = kv_heads;
  hyper.head_dim = head_dim;
  hyper.ffn = ffn;
  hyper.vocab = static_cast<uint32_t>(embedding->shape[1]);
  hyper.max_context = context;
  hyper.norm_eps = static_cast<float>(epsilon);
  hyper.tied_embeddings = gguf.find("output.weight") == nullptr;
  SLUICE_TRY(check_hyper_parameters(hyper, gguf.path()));
  return hyper;
}

// rope_freqs.weight holds Llama 3.1's scaling as one divisor per frequency.
Status apply_rope_factors(const Gguf& gguf, std::span<const std::byte> file, storage::Rope& rope) {
  const GgufTensor* tensor = gguf.find("rope_freqs.weight");
  if (tensor == nullptr) return {};
  const size_t count = rope.inverse_frequencies.size();
  if (tensor->ggml_type != 0 || tensor->shape.size() != 1 || tensor->shape[0] != count) {
    return fail(ErrorCode::corrupt, fmt::format("{}: tensor \"rope_freqs.weight\" is {} of {}, expected F32 of {}",
                                                gguf.path(), ggml_type_name(tensor->ggml_type),
                                                fmt::join(tensor->shape, "x"), count));
  }
  std::vector<float> factors(count);
  std::memcpy(factors.data(), file.data() + tensor->offset, count * sizeof(float));
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(factors[i]) || factors[i] <= 0) {
      return fail(ErrorCode::numeric, fmt::format("{}: tensor \"rope_freqs.weight\" holds {} at {}", gguf.path(),
                                                  factors[i], i));
    }
    rope.inverse_frequencies[i] /= factors[i];
  }
  return {};
}

Result<storage::Rope> read_rope(const Gguf& gguf, const ArchitectureKeys& keys, const HyperParameters& hyper,
                                std::span<const std::byte> file) {
  RopeParameters parameters;
  SLUICE_TRY_ASSIGN(theta, keys.number("rope.freq_base", 10000.0));
  SLUICE_TRY_ASSIGN(dims, keys.size("rope.dimension_count", hyper.head_dim));
  SLUICE_TRY_ASSIGN(old_linear, keys.number("rope.scale_linear", 1.0));
  SLUICE_TRY_ASSIGN(factor, keys.number("rope.scaling.factor", old_linear));
  parameters.theta = theta;
  parameters.factor = factor;
  SLUICE_TRY_ASSIGN(type, gguf.string(keys.name("rope.scaling.type"), factor != 1.0 ? "linear" : "none"));
  parameters.type = type;
  parameters.rotary_dims = dims;
  if (dims != hyper.head_dim) {
    return fail(ErrorCode::unsupported, fmt::format("{}: RoPE over {} of {} dimensions of a head; all are needed",
                                                    gguf.path(), dims, hyper.head_dim));
  }
  for (const char* name : {"rope_factors_long.weight", "rope_factors_short.weight"}) {
    if (gguf.find(name) != nullptr) {
      return fail(ErrorCode::unsupported, fmt::format("{}: RoPE scaling of type \"longrope\" (tensor \"{}\")",
                                                      gguf.path(), name));
    }
  }
  SLUICE_TRY_ASSIGN(rope, make_rope(parameters, gguf.path()));
  SLUICE_TRY(apply_rope_factors(gguf, file, rope));
  return rope;
}

// Where one wanted tensor lies. `vector` shapes come as [n], matrices as [cols, rows].
Result<SourceTensor> locate(const Gguf& gguf, const WantedTensor& wanted, const HyperParameters& hyper) {
  SourceTensor source;
  source.role = wanted.role;
  source.layer = wanted.layer;
  source.rows = wanted.rows;
  source.cols = wanted.cols;
  source.vector = wanted.vector;
  source.name = wanted.name;
  const bool tied_head = wanted.role == Role::lm_head && hyper.tied_embeddings;
  source.source_name = gguf_name(tied_head ? Role::token_embedding : wanted.role, wanted.layer);
  const GgufTensor* tensor = gguf.find(source.source_name);
  if (tensor == nullptr) {
    return fail(ErrorCode::corrupt, fmt::format("{}: tensor \"{}\" is missing; the file is incomplete, download or "
                                                "convert it again", gguf.path(), source.source_name));
  }
  const std::vector<uint64_t> shape = wanted.vector ? std::vector<uint64_t>{wanted.cols}
                                                    : std::vector<uint64_t>{wanted.cols, wanted.rows};
  if (tensor->shape != shape) {
    return fail(ErrorCode::corrupt, fmt::format("{}: tensor \"{}\" has shape {}, expected {}", gguf.path(),
                                                source.source_name, fmt::join(tensor->shape, "x"),
                                                fmt::join(shape, "x")));
  }
  const auto type = source_type_of_ggml(tensor->ggml_type);
  if (!type) {
    return fail(ErrorCode::unsupported,
                fmt::format("{}: tensor \"{}\" is of type {}; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, "
                            "Q5_1 and Q2_K to Q6_K", gguf.path(), source.source_name,
                            ggml_type_name(tensor->ggml_type)));
  }
  source.type = *type;
  source.offset = tensor->offset;
  const bool q_or_k = wanted.role == Role::q || wanted.role == Role::k || wanted.role == Role::q_bias ||
                      wanted.role == Role::k_bias;
  // Files of architecture "llama" (Mistral among them) hold these rows for interleaved pairs; Qwen's do not.
  if (q_or_k && hyper.architecture == Architecture::llama) source.permuted_head_dim = hyper.head_dim;
  return source;
}

void warn_of_unused(const Gguf& gguf, const std::vector<SourceTensor>& used, const LogHook& log) {
  std::set<std::string> names = {"rope_freqs.weight"};
  for (const SourceTensor& tensor : used) names.insert(tensor.source_name);
  std::string first;
  size_t unused = 0;
  for (const GgufTensor& tensor : gguf.tensors()) {
    if (names.contains(tensor.name)) continue;
    if (unused++ == 0) first = tensor.name;
  }
  if (unused != 0) {
    log_warning(log, fmt::format("{}: {} tensors are not part of the model and were left out, the first is {}",
                                 gguf.path(), unused, in_quotes(first)));
  }
}

// Adding a nonzero bias to attention's output is nothing the executor knows.
Status refuse_output_bias(const Gguf& gguf, const HyperParameters& hyper) {
  for (uint32_t layer = 0; layer < hyper.layers; ++layer) {
    for (const char* suffix : {"attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias", "attn_qkv.weight"}) {
      const std::string name = fmt::format("blk.{}.{}", layer, suffix);
      if (gguf.find(name) == nullptr) continue;
      return fail(ErrorCode::unsupported, fmt::format("{}: tensor \"{}\": models that have it are not supported",
                                                      gguf.path(), name));
    }
  }
  return {};
}

}  // namespace

Result<Checkpoint> open_gguf(const std::string& path, const LogHook& log) {
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY | O_NONBLOCK));
  SLUICE_TRY_ASSIGN(file_bytes, regular_file_bytes(fd, path));
  if (file_bytes == 0) return fail(ErrorCode::corrupt, fmt::format("{}: the file is empty", path));
  SLUICE_TRY_ASSIGN(mapping, Mapping::file(fd.get(), file_bytes, path));
  SLUICE_TRY_ASSIGN(gguf, Gguf::parse(mapping.bytes(), path));

  SLUICE_TRY_ASSIGN(architecture_name, gguf.string("general.architecture"));
  if (architecture_name.empty()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: key \"general.architecture\" is missing", path));
  }
  Architecture architecture = Architecture::llama;
  if (architecture_name == "qwen2") {
    architecture = Architecture::qwen2;
  } else if (architecture_name == "qwen3") {
    architecture = Architecture::qwen3;
  } else if (architecture_name != "llama") {
    return fail(ErrorCode::unsupported, fmt::format("{}: architecture {}; supported are llama (Mistral among them), "
                                                    "qwen2 and qwen3", path, in_quotes(architecture_name)));
  }

  const ArchitectureKeys keys(gguf, architecture_name);
  Checkpoint checkpoint;
  SLUICE_TRY_ASSIGN(hyper, read_hyper_parameters(gguf, keys, architecture, log));
  SLUICE_TRY_ASSIGN(rope, read_rope(gguf, keys, hyper, mapping.bytes()));
  SLUICE_TRY(refuse_output_bias(gguf, hyper));
  const bool bias = architecture == Architecture::qwen2 ||
                    (architecture == Architecture::llama && gguf.find("blk.0.attn_q.bias") != nullptr);
  for (const WantedTensor& wanted : wanted_tensors(hyper, bias)) {
    SLUICE_TRY_ASSIGN(source, locate(gguf, wanted, hyper));
    checkpoint.tensors.push_back(std::move(source));
  }
  warn_of_unused(gguf, checkpoint.tensors, log);

  SLUICE_TRY_ASSIGN(name, gguf.string("general.name", path.substr(path.find_last_of('/') + 1)));
  SLUICE_TRY_ASSIGN(tokenizer, read_gguf_tokenizer(gguf, hyper.vocab, log));
  checkpoint.manifest.model_name = std::move(name);
  checkpoint.manifest.source = fmt::format("gguf {}", import::name_of(most_common_type(checkpoint.tensors)));
  checkpoint.manifest.hyper = hyper;
  checkpoint.manifest.rope = std::move(rope);
  checkpoint.manifest.tokenizer = std::move(tokenizer);
  checkpoint.files.push_back({path, std::move(fd)});
  return checkpoint;
}

}  // namespace sluice::import
