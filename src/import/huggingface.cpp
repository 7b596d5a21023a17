// SPDX-License-Identifier: Apache-2.0
// A folder as Hugging Face publishes it: config.json, safetensors in one file or in shards, tokenizer and defaults.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>

#include "base/units.hpp"
#include "import/checkpoint.hpp"
#include "import/ggml_blocks.hpp"
#include "import/json_text.hpp"
#include "import/rope.hpp"
#include "import/quantized_checkpoint.hpp"
#include "import/settings.hpp"
#include "import/shards.hpp"
#include "import/source_file.hpp"
#include "import/text.hpp"
#include "import/tokenizer_json.hpp"

namespace sluice::import {
namespace {

using storage::Architecture;
using storage::HyperParameters;
using storage::Role;
using storage::TokenizerSpec;

constexpr uint64_t kMaxConfigBytes = 16 * kMiB;

Result<Architecture> read_architecture(const Settings& config) {
  SLUICE_TRY_ASSIGN(type, config.text("model_type"));
  for (const Architecture known : {Architecture::llama, Architecture::mistral, Architecture::qwen2, Architecture::qwen3}) {
    if (type == storage::name_of(known)) return known;
  }
  if (type.empty()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: \"model_type\" is missing; is this the folder of a language model?",
                                                config.path()));
  }
  return fail(ErrorCode::unsupported, fmt::format("{}: model_type {}; supported are llama, mistral, qwen2 and qwen3",
                                                  config.path(), in_quotes(type)));
}

// What the graph of a supported model has no place for.
Status refuse_variants(const Settings& config, Architecture architecture) {
  SLUICE_TRY_ASSIGN(activation, config.text("hidden_act", "silu"));
  if (activation != "silu") {
    return fail(ErrorCode::unsupported, fmt::format("{}: hidden_act {}; supported is silu", config.path(),
                                                    in_quotes(activation)));
  }
  SLUICE_TRY_ASSIGN(mlp_bias, config.flag("mlp_bias", false));
  SLUICE_TRY_ASSIGN(attention_bias, config.flag("attention_bias", false));
  if (mlp_bias) return fail(ErrorCode::unsupported, fmt::format("{}: mlp_bias is true", config.path()));
  if (attention_bias && (architecture == Architecture::mistral || architecture == Architecture::qwen3)) {
    return fail(ErrorCode::unsupported, fmt::format("{}: attention_bias is true, which {} models do not have here",
                                                    config.path(), storage::name_of(architecture)));
  }
  SLUICE_TRY_ASSIGN(rotary_share, config.number("partial_rotary_factor", 1.0));
  if (rotary_share != 1.0) {
    return fail(ErrorCode::unsupported, fmt::format("{}: partial_rotary_factor is {}; RoPE must cover the whole head",
                                                    config.path(), rotary_share));
  }
  return {};
}

// How many positions the layer that sees least attends to; 0: all of them. Each architecture says it its own way.
Result<uint32_t> sliding_window(const Settings& config, Architecture architecture, uint32_t layers) {
  if (architecture == Architecture::llama) return 0u;
  SLUICE_TRY_ASSIGN(window, config.size("sliding_window", 0));
  if (architecture == Architecture::mistral) return window;
  SLUICE_TRY_ASSIGN(used, config.flag("use_sliding_window", false));
  if (!used) return 0u;
  if (const Json* types = config.find("layer_types"); types != nullptr && types->is_array()) {
    const bool slides = std::any_of(types->begin(), types->end(), [](const Json& type) { return type != "full_attention"; });
    return slides ? window : 0u;
  }
  SLUICE_TRY_ASSIGN(full_layers, config.size("max_window_layers", 28));
  return full_layers < layers ? window : 0u;
}

Result<HyperParameters> read_hyper_parameters(const Settings& config, Architecture architecture, const LogHook& log) {
  HyperParameters hyper;
  hyper.architecture = architecture;
  SLUICE_TRY_ASSIGN(layers, config.size("num_hidden_layers"));
  SLUICE_TRY_ASSIGN(hidden, config.size("hidden_size"));
  SLUICE_TRY_ASSIGN(heads, config.size("num_attention_heads"));
  SLUICE_TRY_ASSIGN(kv_heads, config.size("num_key_value_heads", heads));
  SLUICE_TRY_ASSIGN(ffn, config.size("intermediate_size"));
  SLUICE_TRY_ASSIGN(vocab, config.size("vocab_size"));
  SLUICE_TRY_ASSIGN(context, config.size("max_position_embeddings"));
  SLUICE_TRY_ASSIGN(epsilon, config.number("rms_norm_eps", 1e-6));
  SLUICE_TRY_ASSIGN(tied, config.flag("tie_word_embeddings", false));
  if (heads == 0) return fail(ErrorCode::corrupt, fmt::format("{}: \"num_attention_heads\" is 0", config.path()));
  // Qwen3's own default; the others divide.
  SLUICE_TRY_ASSIGN(head_dim, config.size("head_dim", architecture == Architecture::qwen3 ? 128 : hidden / heads));
  SLUICE_TRY_ASSIGN(window, sliding_window(config, architecture, layers));
  if (window != 0 && window < context) {
    log_warning(log, fmt::format("{}: the model attends to the last {} positions only, which is not supported; the "
                                 "context length is set to {}, where both are the same", config.path(), window, window));
    context = window;
  }
  hyper.layers = layers;
  hyper.hidden = hidden;
  hyper.heads = heads;
  hyper.kv_heads = kv_heads;
  hyper.head_dim = head_dim;
  hyper.ffn = ffn;
  hyper.vocab = vocab;
  hyper.max_context = context;
  hyper.norm_eps = static_cast<float>(epsilon);
  hyper.tied_embeddings = tied;
  SLUICE_TRY(check_hyper_parameters(hyper, config.path()));
  return hyper;
}

// rope_scaling and rope_theta, or rope_parameters with both (transformers 5).
Result<storage::Rope> read_rope(const Settings& config, const HyperParameters& hyper) {
  RopeParameters parameters;
  parameters.rotary_dims = hyper.head_dim;
  SLUICE_TRY_ASSIGN(theta, config.number("rope_theta", 10000.0));
  parameters.theta = theta;
  const Json* found = config.find("rope_parameters");
  if (found == nullptr) found = config.find("rope_scaling");
  if (found == nullptr) return make_rope(parameters, config.path());
  if (!found->is_object()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the RoPE parameters are {}, expected an object", config.path(),
                                                in_quotes(found->dump())));
  }
  const Settings rope(*found, config.path());
  SLUICE_TRY_ASSIGN(old_type, rope.text("type", "default"));
  SLUICE_TRY_ASSIGN(type, rope.text("rope_type", old_type));
  SLUICE_TRY_ASSIGN(own_theta, rope.number("rope_theta", theta));
  SLUICE_TRY_ASSIGN(share, rope.number("partial_rotary_factor", 1.0));
  if (share != 1.0 || std::any_of(found->begin(), found->end(), [](const Json& value) { return value.is_object(); })) {
    return fail(ErrorCode::unsupported, fmt::format("{}: RoPE over a part of the head, or by kind of layer: {}",
                                                    config.path(), in_quotes(found->dump())));
  }
  parameters.type = type;
  parameters.theta = own_theta;
  if (type == "linear" || type == "llama3") {
    SLUICE_TRY_ASSIGN(factor, rope.number("factor"));
    parameters.factor = factor;
  }
  if (type == "llama3") {
    SLUICE_TRY_ASSIGN(low, rope.number("low_freq_factor"));
    SLUICE_TRY_ASSIGN(high, rope.number("high_freq_factor"));
    SLUICE_TRY_ASSIGN(original, rope.number("original_max_position_embeddings"));
    parameters.low_freq_factor = low;
    parameters.high_freq_factor = high;
    parameters.original_context = original;
  }
  return make_rope(parameters, config.path());
}

Result<SourceTensor> locate(const Shards& weights, const WantedTensor& wanted, bool tied, const std::string& folder) {
  SourceTensor source;
  source.role = wanted.role;
  source.layer = wanted.layer;
  source.rows = wanted.rows;
  source.cols = wanted.cols;
  source.vector = wanted.vector;
  source.name = wanted.name;
  source.source_name = wanted.role == Role::lm_head && tied ? "model.embed_tokens.weight" : wanted.name;
  const auto found = weights.where.find(source.source_name);
  if (found == weights.where.end()) {
    const bool head = wanted.role == Role::lm_head;
    return fail(ErrorCode::corrupt,
                fmt::format("{}: tensor \"{}\" is missing{}; download the folder again", folder, source.source_name,
                            head ? ", and config.json does not say tie_word_embeddings" : ""));
  }
  source.file = found->second;
  const std::string& path = weights.files[source.file].path;
  const SafetensorsTensor& tensor = weights.indices[source.file].find(source.source_name)->second;
  const auto type = source_type_of_dtype(tensor.dtype);
  if (!type) {
    return fail(ErrorCode::unsupported, fmt::format("{}: tensor \"{}\" is of dtype {}; supported are F32, F16 and BF16",
                                                    path, source.source_name, in_quotes(tensor.dtype)));
  }
  const std::vector<uint64_t> shape = wanted.vector ? std::vector<uint64_t>{wanted.cols}
                                                    : std::vector<uint64_t>{wanted.rows, wanted.cols};
  if (tensor.shape != shape) {
    return fail(ErrorCode::corrupt, fmt::format("{}: tensor \"{}\" has shape {}, config.json makes it {}", path,
                                                source.source_name, fmt::join(tensor.shape, "x"),
                                                fmt::join(shape, "x")));
  }
  source.type = *type;
  source.offset = tensor.offset;
  return source;
}

// An embedding may have more rows than config.json's vocabulary: padding for the hardware it was trained on.
void take_padded_vocabulary(const Shards& weights, HyperParameters& hyper) {
  const auto found = weights.where.find("model.embed_tokens.weight");
  if (found == weights.where.end()) return;
  const auto& shape = weights.indices[found->second].find(found->first)->second.shape;
  if (shape.size() == 2 && shape[0] > hyper.vocab && shape[0] <= std::numeric_limits<uint32_t>::max()) {
    hyper.vocab = static_cast<uint32_t>(shape[0]);
  }
}

// True if every value of a small tensor is zero.
Result<bool> all_zero(const Shards& weights, uint32_t file, const SafetensorsTensor& tensor) {
  const auto type = source_type_of_dtype(tensor.dtype);
  if (!type || tensor.bytes > 16 * kMiB) return false;
  std::vector<std::byte> bytes(tensor.bytes);
  SLUICE_TRY(read_exactly(weights.files[file].fd.get(), bytes, tensor.offset, weights.files[file].path));
  std::vector<float> values(tensor.bytes / block_bytes(*type));
  decode_to_float(*type, bytes, values);
  return std::all_of(values.begin(), values.end(), [](float value) { return value == 0; });
}

// A bias or norm inside a layer changes what the model computes; leaving it out would give wrong tokens in silence.
bool changes_the_model(const std::string& name, uint32_t layers) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!name.starts_with(kPrefix)) return name == "lm_head.bias" || name == "model.norm.bias";
  const std::string_view rest = std::string_view(name).substr(kPrefix.size());
  uint64_t layer = 0;
  size_t digits = 0;
  while (digits < rest.size() && digits < 9 && rest[digits] >= '0' && rest[digits] <= '9') {
    layer = layer * 10 + static_cast<uint64_t>(rest[digits++] - '0');
  }
  return digits != 0 && layer < layers && (rest.ends_with(".bias") || rest.ends_with("norm.weight"));
}

Status account_for_unused(const Shards& weights, const Checkpoint& checkpoint, const std::string& folder,
                          const LogHook& log) {
  std::set<std::string> used = {"lm_head.weight"};  // there twice in many tied checkpoints
  for (const SourceTensor& tensor : checkpoint.tensors) {
    used.insert(tensor.source_name);
    if (tensor.packed) used.merge(packed_part_names(tensor));
  }
  std::string first;
  size_t unused = 0;
  for (const auto& [name, file] : weights.where) {
    if (used.contains(name)) continue;
    if (changes_the_model(name, checkpoint.manifest.hyper.layers)) {
      SLUICE_TRY_ASSIGN(harmless, all_zero(weights, file, weights.indices[file].find(name)->second));
      if (!harmless || !name.ends_with(".bias")) {
        return fail(ErrorCode::unsupported, fmt::format("{}: tensor {}: models that have it are not supported",
                                                        weights.files[file].path, in_quotes(name)));
      }
    }
    if (unused++ == 0) first = name;
  }
  if (unused != 0) {
    log_warning(log, fmt::format("{}: {} tensors are not part of the model and were left out, the first is {}", folder,
                                 unused, in_quotes(first)));
  }
  return {};
}

// Tokens without a row in the embedding cannot be fed; drops them and what refers to them.
void limit_vocabulary(TokenizerSpec& spec, uint32_t vocab, const std::string& path, const LogHook& log) {
  if (spec.tokens.size() <= vocab) return;
  log_warning(log, fmt::format("{}: the tokenizer has {} tokens, the embedding {} rows; the tokens from {} on are dropped",
                               path, spec.tokens.size(), vocab, vocab));
  spec.tokens.resize(vocab);
  spec.kinds.resize(vocab);
  if (!spec.scores.empty()) spec.scores.resize(vocab);
  const auto beyond = [&](int32_t id) { return id >= 0 && static_cast<uint32_t>(id) >= vocab; };
  for (int32_t* id : {&spec.bos, &spec.eos, &spec.unknown}) {
    if (beyond(*id)) *id = -1;
  }
  for (auto* ids : {&spec.stop_ids, &spec.lstrip_ids, &spec.rstrip_ids}) std::erase_if(*ids, beyond);
  spec.add_bos = spec.add_bos && spec.bos >= 0;
  spec.add_eos = spec.add_eos && spec.eos >= 0;
}

Result<TokenizerSpec> read_tokenizer(const std::string& folder, const Settings& config, uint32_t vocab,
                                     const LogHook& log) {
  const std::string path = in_folder(folder, "tokenizer.json");
  if (!exists(path)) {
    log_warning(log, fmt::format("{}: no tokenizer.json{}; the container takes token ids only", folder,
                                 exists(in_folder(folder, "tokenizer.model")) ? " (tokenizer.model alone is not read)" : ""));
    return TokenizerSpec();
  }
  const auto if_there = [&](const char* name) {
    const std::string neighbour = in_folder(folder, name);
    return exists(neighbour) ? neighbour : std::string();
  };
  SLUICE_TRY_ASSIGN(spec, read_tokenizer_json(path, if_there("tokenizer_config.json"), if_there("generation_config.json")));
  limit_vocabulary(spec, vocab, path, log);
  // Folders of before generation_config.json say it here.
  const Json* eos = config.find("eos_token_id");
  if (spec.stop_ids.empty() && eos != nullptr && eos->is_number_unsigned() && eos->get<uint64_t>() < spec.tokens.size()) {
    spec.eos = eos->get<int32_t>();
    spec.stop_ids.push_back(spec.eos);
  }
  return spec;
}

Result<storage::GenerationDefaults> read_generation_defaults(const std::string& folder) {
  storage::GenerationDefaults defaults;
  const std::string path = in_folder(folder, "generation_config.json");
  if (!exists(path)) return defaults;
  SLUICE_TRY_ASSIGN(text, read_text_file(path, kMaxConfigBytes));
  SLUICE_TRY_ASSIGN(root, parse_json_object(text, path));
  const Settings config(root, path);
  const struct {
    const char* key;
    float* value;
    double most;
  } kNumbers[] = {{"temperature", &defaults.temperature, 100},
                  {"top_p", &defaults.top_p, 1},
                  {"min_p", &defaults.min_p, 1},
                  {"repetition_penalty", &defaults.repetition_penalty, 100}};
  for (const auto& [key, value, most] : kNumbers) {
    if (config.find(key) == nullptr) continue;
    SLUICE_TRY_ASSIGN(number, config.number(key));
    if (!(number >= 0) || number > most) {
      return fail(ErrorCode::corrupt, fmt::format("{}: \"{}\" is {}, expected 0 to {}", path, key, number, most));
    }
    *value = static_cast<float>(number);
  }
  SLUICE_TRY_ASSIGN(top_k, config.number("top_k", -1.0));  // some writers give -1 for "off"
  if (top_k >= 0 && top_k <= 1 << 24) defaults.top_k = static_cast<int32_t>(top_k);
  SLUICE_TRY_ASSIGN(sampled, config.flag("do_sample", true));
  if (!sampled) defaults.temperature = 0;
  return defaults;
}

std::string folder_name(const std::string& folder) {
  std::error_code ignored;
  const auto path = std::filesystem::weakly_canonical(folder, ignored);
  return path.empty() ? folder : path.filename().string();
}

}  // namespace

Result<Checkpoint> open_huggingface(const std::string& folder, const LogHook& log) {
  const std::string config_path = in_folder(folder, "config.json");
  if (!exists(config_path)) {
    return fail(ErrorCode::not_found, fmt::format("{}: there is no config.json; give a GGUF file, or a folder with "
                                                  "config.json and *.safetensors", folder));
  }
  SLUICE_TRY_ASSIGN(text, read_text_file(config_path, kMaxConfigBytes));
  SLUICE_TRY_ASSIGN(root, parse_json_object(text, config_path));
  const Settings config(root, config_path);
  SLUICE_TRY_ASSIGN(architecture, read_architecture(config));
  SLUICE_TRY(refuse_variants(config, architecture));
  SLUICE_TRY_ASSIGN(quantization, read_quantization_config(root, folder, log));
  SLUICE_TRY_ASSIGN(hyper, read_hyper_parameters(config, architecture, log));
  SLUICE_TRY_ASSIGN(rope, read_rope(config, hyper));
  SLUICE_TRY_ASSIGN(attention_bias, config.flag("attention_bias", false));

  SLUICE_TRY_ASSIGN(weights, open_shards(folder));
  take_padded_vocabulary(weights, hyper);
  Checkpoint checkpoint;
  checkpoint.manifest.hyper = hyper;
  for (const WantedTensor& wanted : wanted_tensors(hyper, attention_bias || architecture == Architecture::qwen2)) {
    std::optional<SourceTensor> source;
    if (quantization) {
      SLUICE_TRY_ASSIGN(packed, locate_packed(weights, wanted, *quantization));
      source = std::move(packed);
    }
    if (!source) {
      SLUICE_TRY_ASSIGN(plain, locate(weights, wanted, hyper.tied_embeddings, folder));
      source = std::move(plain);
    }
    checkpoint.tensors.push_back(std::move(*source));
  }
  SLUICE_TRY(account_for_unused(weights, checkpoint, folder, log));

  SLUICE_TRY_ASSIGN(tokenizer, read_tokenizer(folder, config, hyper.vocab, log));
  SLUICE_TRY_ASSIGN(generation, read_generation_defaults(folder));
  checkpoint.manifest.model_name = folder_name(folder);
  checkpoint.manifest.source = fmt::format("safetensors {}", import::name_of(most_common_type(checkpoint.tensors)));
  checkpoint.manifest.rope = std::move(rope);
  checkpoint.manifest.tokenizer = std::move(tokenizer);
  checkpoint.manifest.generation = generation;
  checkpoint.files = std::move(weights.files);
  return checkpoint;
}

}  // namespace sluice::import
