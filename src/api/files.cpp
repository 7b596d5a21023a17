// SPDX-License-Identifier: Apache-2.0
// The calls of sluice.hpp that work on files without running a model: import, synth, inspect, verify, text codec.
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "api/version.hpp"  // generated
#include "base/handles.hpp"
#include "import/import.hpp"
#include "import/tokenizer_json.hpp"
#include "model/tokenizer.hpp"
#include "model/utf8.hpp"
#include "sluice/sluice.hpp"
#include "storage/container.hpp"
#include "storage/sigbus_guard.hpp"

namespace sluice {
namespace {

// Keeps the order in which things are told.
using Json = nlohmann::ordered_json;

import::Weights weights_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::keep: return import::Weights::keep;
    case WeightFormat::f16: return import::Weights::f16;
    case WeightFormat::int8: return import::Weights::int8;
    case WeightFormat::int4: return import::Weights::int4;
  }
  return import::Weights::int4;
}

std::optional<import::Weights> weights_of(const std::optional<WeightFormat>& format) {
  if (!format) return std::nullopt;
  return weights_of(*format);
}

ImportReport report_of(const import::Report& report) {
  std::vector<RequantizationLoss> losses;
  for (const import::RequantizationLoss& loss : report.losses) {
    losses.push_back({.type = import::name_of(loss.type),
                      .scheme = std::string(storage::name_of(loss.scheme)),
                      .group = loss.group_elems,
                      .tensors = loss.tensors,
                      .relative_error = loss.relative_error});
  }
  return {.tensors = report.tensors,
          .bytes = report.bytes,
          .requantized = report.requantized,
          .losses = std::move(losses),
          .seconds = report.seconds};
}

const char* name_of(storage::TokenizerModel model) {
  switch (model) {
    case storage::TokenizerModel::none: return "none";
    case storage::TokenizerModel::byte_level_bpe: return "byte-level BPE";
    case storage::TokenizerModel::sentencepiece_bpe: return "SentencePiece BPE";
  }
  return "unknown";
}

Json hyper_json(const storage::Manifest& manifest) {
  const storage::HyperParameters& hyper = manifest.hyper;
  return {{"architecture", storage::name_of(hyper.architecture)},
          {"layers", hyper.layers},
          {"hidden", hyper.hidden},
          {"heads", hyper.heads},
          {"kv_heads", hyper.kv_heads},
          {"head_dim", hyper.head_dim},
          {"ffn", hyper.ffn},
          {"vocab", hyper.vocab},
          {"max_context", hyper.max_context},
          {"norm_eps", hyper.norm_eps},
          {"tied_embeddings", hyper.tied_embeddings}};
}

Json rope_json(const storage::Rope& rope) {
  return {{"rotary_dims", rope.rotary_dims},
          {"attention_factor", rope.attention_factor},
          {"inverse_frequencies", rope.inverse_frequencies}};
}

// Everything but the vocabulary itself, which `tokenize` shows better.
Json tokenizer_json(const storage::TokenizerSpec& spec) {
  Json splits = Json::array();
  for (const storage::SplitStep& step : spec.splits) splits.push_back(step.pattern);
  return {{"model", name_of(spec.model)},
          {"tokens", spec.tokens.size()},
          {"merges", spec.merges.size()},
          {"splits", splits},
          {"nfc", spec.nfc},
          {"byte_fallback", spec.byte_fallback},
          {"add_bos", spec.add_bos},
          {"add_eos", spec.add_eos},
          {"bos", spec.bos},
          {"eos", spec.eos},
          {"stop_ids", spec.stop_ids},
          {"chat_template", spec.chat_template}};
}

// Negative: not given by the checkpoint.
Json generation_json(const storage::GenerationDefaults& defaults) {
  Json json = Json::object();
  const auto put = [&json](const char* name, auto value) {
    if (value >= 0) json[name] = value;
  };
  put("temperature", defaults.temperature);
  put("top_k", defaults.top_k);
  put("top_p", defaults.top_p);
  put("min_p", defaults.min_p);
  put("repetition_penalty", defaults.repetition_penalty);
  return json;
}

Json tensor_json(const storage::Tensor& tensor) {
  Json planes = Json::array();
  for (const storage::Plane& plane : tensor.planes) {
    planes.push_back({{"kind", storage::name_of(plane.kind)},
                      {"offset", plane.offset},
                      {"bytes", plane.bytes},
                      {"checksums", plane.block_sums.size()}});
  }
  Json json = {{"name", tensor.name},
               {"role", storage::name_of(tensor.role)},
               {"layer", tensor.layer},
               {"rows", tensor.rows},
               {"cols", tensor.cols},
               {"scheme", storage::name_of(tensor.scheme)},
               {"layout", storage::name_of(tensor.layout)}};
  if (tensor.group_elems != 0) json["group"] = tensor.group_elems;
  if (tensor.scale_exponent != 0) json["scale_exponent"] = tensor.scale_exponent;
  json["planes"] = std::move(planes);
  return json;
}

// How many bytes each scheme takes: what a user wants to know before choosing budgets.
Json scheme_bytes(const storage::Manifest& manifest) {
  Json json = Json::object();
  for (const storage::Tensor& tensor : manifest.tensors) {
    const std::string scheme(storage::name_of(tensor.scheme));
    json[scheme] = json.value(scheme, uint64_t{0}) + tensor.padded_bytes();
  }
  return json;
}

bool is_file(const std::string& path) {
  struct stat status = {};
  return ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

bool is_folder(const std::string& path) {
  struct stat status = {};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

// Whether the file begins as JSON does. What is neither JSON nor a container gets the container's message.
Result<bool> looks_like_json(const std::string& path) {
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY | O_NONBLOCK));
  std::array<char, 64> start = {};
  const ssize_t got = ::pread(fd.get(), start.data(), start.size(), 0);
  const auto end = start.begin() + std::max<ssize_t>(got, 0);
  const auto first = std::find_if(start.begin(), end, [](unsigned char c) { return std::isspace(c) == 0; });
  return first != end && *first == '{';
}

Result<storage::TokenizerSpec> spec_of_tokenizer_json(const std::string& path) {
  const std::string folder = path.substr(0, path.rfind('/') + 1);  // "" where there is no slash
  const auto beside = [&folder](const char* name) { return is_file(folder + name) ? folder + name : std::string(); };
  return import::read_tokenizer_json(path, beside("tokenizer_config.json"), beside("generation_config.json"));
}

Result<storage::TokenizerSpec> spec_of(const std::string& path) {
  if (is_folder(path)) return spec_of_tokenizer_json(path + "/tokenizer.json");
  SLUICE_TRY_ASSIGN(json, looks_like_json(path));
  if (json) return spec_of_tokenizer_json(path);
  SLUICE_TRY_ASSIGN(container, storage::Container::open(path));
  if (container.manifest().tokenizer.model == storage::TokenizerModel::none) {
    return fail(ErrorCode::unsupported, fmt::format("{}: has no tokenizer; it takes and gives token ids only", path));
  }
  return container.manifest().tokenizer;
}

}  // namespace

Result<ImportReport> import_model(const ImportOptions& options) {
  import::Options inner;
  inner.source = options.source;
  inner.output = options.output;
  inner.weights = weights_of(options.weights);
  inner.group_elems = options.group;
  inner.embeddings = weights_of(options.embeddings);
  inner.lm_head = weights_of(options.lm_head);
  inner.log = options.log;
  inner.progress = options.progress;
  SLUICE_TRY_ASSIGN(report, import::import_model(inner));
  return report_of(report);
}

Result<ImportReport> synth_model(const SynthOptions& options) {
  if (options.weights == WeightFormat::keep) {
    return fail(ErrorCode::usage, "random weights have no format to keep; choose f16, int8 or int4");
  }
  import::SynthOptions inner;
  inner.model_toml = options.model_toml;
  inner.output = options.output;
  inner.layers = options.layers;
  inner.weights = weights_of(options.weights);
  inner.group_elems = options.group;
  inner.seed = options.seed;
  inner.progress = options.progress;
  SLUICE_TRY_ASSIGN(report, import::synth_model(inner));
  return report_of(report);
}

Status check_utf8(std::string_view text, const std::string& name) { return model::check_utf8(text, name); }

Result<std::string> inspect_json(const std::string& path) {
  SLUICE_TRY_ASSIGN(container, storage::Container::open(path));
  const storage::Manifest& manifest = container.manifest();
  uint64_t weight_bytes = 0;
  Json tensors = Json::array();
  for (const storage::Tensor& tensor : manifest.tensors) {
    weight_bytes += tensor.padded_bytes();
    tensors.push_back(tensor_json(tensor));
  }
  const Json json = {{"file", path},
                     {"format_version", storage::kFormatVersion},
                     {"uuid", container.uuid()},
                     {"name", manifest.model_name},
                     {"source", manifest.source},
                     {"file_bytes", container.file_bytes()},
                     {"weight_bytes", weight_bytes},
                     {"bytes_by_scheme", scheme_bytes(manifest)},
                     {"hyperparameters", hyper_json(manifest)},
                     {"rope", rope_json(manifest.rope)},
                     {"tokenizer", tokenizer_json(manifest.tokenizer)},
                     {"generation", generation_json(manifest.generation)},
                     {"tensors", std::move(tensors)}};
  // Names come from checkpoints and need not be UTF-8.
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

Status verify_file(const std::string& path, const std::function<void(uint64_t done, uint64_t total)>& progress) {
  SLUICE_TRY_ASSIGN(container, storage::Container::open(path));
  return container.verify(progress);
}

struct TextCodec::State {
  model::Tokenizer tokenizer;
};

TextCodec::TextCodec(std::unique_ptr<State> state) : state_(std::move(state)) {}
TextCodec::TextCodec(TextCodec&&) noexcept = default;
TextCodec& TextCodec::operator=(TextCodec&&) noexcept = default;
TextCodec::~TextCodec() = default;

Result<TextCodec> TextCodec::open(const std::string& container_or_tokenizer_json) {
  SLUICE_TRY_ASSIGN(spec, spec_of(container_or_tokenizer_json));
  spec.add_eos = false;  // `bos` asks for the beginning alone
  SLUICE_TRY_ASSIGN(tokenizer, model::Tokenizer::create(spec));
  return TextCodec(std::make_unique<State>(State{std::move(tokenizer)}));
}

std::vector<int32_t> TextCodec::encode(std::string_view text, bool special, bool bos) const {
  return state_->tokenizer.encode(text, {.special = special, .bos_eos = bos});
}

std::string TextCodec::decode(std::span<const int32_t> tokens) const { return state_->tokenizer.decode(tokens); }

bool install_sigbus_handler() { return storage::SigbusGuard::install(); }

const char* version() { return SLUICE_VERSION; }

}  // namespace sluice
