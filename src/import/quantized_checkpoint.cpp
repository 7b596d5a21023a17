// SPDX-License-Identifier: Apache-2.0
#include "import/quantized_checkpoint.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <utility>
#include <vector>

#include "base/units.hpp"
#include "import/settings.hpp"
#include "import/source_file.hpp"
#include "import/text.hpp"

namespace sluice::import {
namespace {

constexpr uint64_t kMaxConfigBytes = 16 * kMiB;
constexpr uint32_t kSmallestGroup = 32;
constexpr uint32_t kCodesPerWord = 8;

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

Unexpected unsupported(const std::string& path, const std::string& what) {
  return fail(
      ErrorCode::unsupported,
      fmt::format("{}: {}; read are 4-bit gptq, awq (gemm) and compressed-tensors (pack-quantized): import one of "
                  "those, or the F16 or BF16 original",
                  path, what));
}

// "group_size": -1 means the whole row.
Result<uint32_t> group_size(const Settings& config, const char* key) {
  SLUICE_TRY_ASSIGN(size, config.number(key, -1.0));
  if (size == -1) return 0u;
  if (!(size >= kSmallestGroup) || size > 1 << 24 || size != static_cast<uint32_t>(size) ||
      static_cast<uint32_t>(size) % kSmallestGroup != 0) {
    return unsupported(config.path(), fmt::format("\"{}\" is {}, where multiples of {} and -1 can be stored", key, size,
                                                  kSmallestGroup));
  }
  return static_cast<uint32_t>(size);
}

Status check_bits(const Settings& config, const char* key) {
  SLUICE_TRY_ASSIGN(bits, config.size(key));
  if (bits != 4) return unsupported(config.path(), fmt::format("the weights have {} bits", bits));
  return {};
}

Result<QuantizationConfig> read_gptq(const Settings& config) {
  SLUICE_TRY(check_bits(config, "bits"));
  SLUICE_TRY_ASSIGN(format, config.text("checkpoint_format", "gptq"));
  SLUICE_TRY_ASSIGN(is_marlin, config.flag("is_marlin_format", false));
  if ((format != "gptq" && format != "gptq_v2") || is_marlin) {
    return unsupported(config.path(),
                       fmt::format("GPTQ in checkpoint_format {}", in_quotes(is_marlin ? "marlin" : format)));
  }
  // GPTQModel: settings of single modules. "-:pattern" leaves modules as they are, which their tensors show.
  if (const Json* dynamic = config.find("dynamic"); dynamic != nullptr && dynamic->is_object()) {
    for (const auto& [pattern, overrides] : dynamic->items()) {
      if (!pattern.starts_with("-:") && !overrides.empty()) {
        return unsupported(config.path(), fmt::format("GPTQ with \"dynamic\" settings for {}", in_quotes(pattern)));
      }
    }
  }
  SLUICE_TRY_ASSIGN(group, group_size(config, "group_size"));
  SLUICE_TRY_ASSIGN(symmetric, config.flag("sym", true));
  SLUICE_TRY_ASSIGN(act_order, config.flag("desc_act", false));
  return QuantizationConfig{format == "gptq" ? Packing::gptq_v1 : Packing::gptq_v2, group, symmetric, config.path(),
                            act_order};
}

// Config.json says bits and group_size, AutoAWQ's own quant_config.json w_bit and q_group_size.
Result<QuantizationConfig> read_awq(const Settings& config) {
  const bool own = config.find("w_bit") != nullptr;
  SLUICE_TRY(check_bits(config, own ? "w_bit" : "bits"));
  SLUICE_TRY_ASSIGN(version, config.text("version", "gemm"));
  if (lower(version) != "gemm") return unsupported(config.path(), fmt::format("AWQ in version {}", in_quotes(version)));
  SLUICE_TRY_ASSIGN(group, group_size(config, own ? "q_group_size" : "group_size"));
  SLUICE_TRY_ASSIGN(zero_point, config.flag("zero_point", true));
  return QuantizationConfig{Packing::awq, group, !zero_point, config.path()};
}

// One group of modules; all groups of a checkpoint must agree, for one tensor does not say to which it belongs.
Result<QuantizationConfig> read_compressed_group(const Json& group, const std::string& path) {
  const Json* found = json_member(group, "weights");
  if (found == nullptr || !found->is_object()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: a group of \"config_groups\" has no \"weights\"", path));
  }
  if (json_member(group, "input_activations") != nullptr || json_member(group, "output_activations") != nullptr) {
    return unsupported(path, "the activations are quantized too");
  }
  const Settings weights(*found, path);
  SLUICE_TRY(check_bits(weights, "num_bits"));
  SLUICE_TRY_ASSIGN(type, weights.text("type", "int"));
  if (type != "int") return unsupported(path, fmt::format("weights of type {}", in_quotes(type)));
  SLUICE_TRY_ASSIGN(strategy, weights.text("strategy", "group"));
  if (strategy != "group" && strategy != "channel") {
    return unsupported(path, fmt::format("weights with the strategy {}", in_quotes(strategy)));
  }
  SLUICE_TRY_ASSIGN(symmetric, weights.flag("symmetric", true));
  QuantizationConfig config{Packing::compressed, 0, symmetric, path};
  if (strategy == "group") {
    SLUICE_TRY_ASSIGN(size, group_size(weights, "group_size"));
    config.group_elems = size;
    // "weight" (also "static") orders within the groups as they lie; true is older writers' "group".
    const Json* order = json_member(*found, "actorder");
    config.act_order = order != nullptr && (*order == "group" || *order == "dynamic" || *order == true);
  }
  return config;
}

Result<QuantizationConfig> read_compressed(const Settings& config, const LogHook& log) {
  SLUICE_TRY_ASSIGN(format, config.text("format"));
  if (format != "pack-quantized") {
    return unsupported(config.path(), fmt::format("compressed-tensors in format {}", in_quotes(format)));
  }
  const Json* sparsity = config.find("sparsity_config");
  if (sparsity != nullptr && sparsity->is_object() && !sparsity->empty()) {
    const Json* sparse = json_member(*sparsity, "format");
    if (sparse != nullptr && *sparse != "dense") {
      return unsupported(config.path(), fmt::format("weights in the sparse format {}", in_quotes(sparse->dump())));
    }
  }
  if (config.find("kv_cache_scheme") != nullptr) {
    log_warning(log,
                fmt::format("{}: the KV cache is not quantized as kv_cache_scheme says; it stays FP16", config.path()));
  }
  const Json* groups = config.find("config_groups");
  if (groups == nullptr || !groups->is_object() || groups->empty()) {
    return fail(ErrorCode::corrupt, fmt::format("{}: \"config_groups\" is missing or empty", config.path()));
  }
  std::optional<QuantizationConfig> all;
  for (const auto& entry : groups->items()) {
    SLUICE_TRY_ASSIGN(one, read_compressed_group(entry.value(), config.path()));
    if (all && (all->group_elems != one.group_elems || all->symmetric != one.symmetric)) {
      return unsupported(config.path(), "compressed-tensors with config_groups that differ");
    }
    all = one;
  }
  return *all;
}

Result<QuantizationConfig> read_method(const Settings& config, const char* otherwise, const LogHook& log) {
  SLUICE_TRY_ASSIGN(method, config.text("quant_method", otherwise));
  if (method == "gptq") return read_gptq(config);
  if (method == "awq") return read_awq(config);
  if (method == "compressed-tensors") return read_compressed(config, log);
  return unsupported(config.path(), fmt::format("the checkpoint is quantized by {}", in_quotes(method)));
}

// ---------------------------------------------------------------------------------------------------- tensors

std::string stem_of(const std::string& name) {
  constexpr std::string_view kSuffix = ".weight";
  return name.substr(0, name.size() - (name.ends_with(kSuffix) ? kSuffix.size() : 0));
}

struct PartNames {
  const char *codes, *scales, *zeros, *group_index;
};
PartNames part_names(Packing packing) {
  if (packing == Packing::compressed) return {".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx"};
  return {".qweight", ".scales", ".qzeros", ".g_idx"};
}

// Finds the parts of one matrix.
class Locator {
 public:
  Locator(const Shards& shards, const WantedTensor& wanted, const QuantizationConfig& config)
      : shards_(shards),
        wanted_(wanted),
        config_(config),
        stem_(stem_of(wanted.name)),
        names_(part_names(config.packing)) {}

  Result<std::optional<SourceTensor>> locate() {
    if (wanted_.vector || !shards_.where.contains(stem_ + names_.codes)) return std::optional<SourceTensor>();
    if (wanted_.role == storage::Role::token_embedding) {
      return fail(ErrorCode::unsupported,
                  fmt::format("{}: the embedding is packed in 4 bits, which no backend reads; import a checkpoint that "
                              "leaves it in F16 or BF16", label(names_.codes)));
    }
    PackedInt4 packed;
    packed.packing = config_.packing;
    packed.group_elems = config_.group_elems == 0 ? wanted_.cols : std::min(config_.group_elems, wanted_.cols);
    const uint64_t groups = ceil_div(wanted_.cols, packed.group_elems);
    const uint64_t rows = wanted_.rows, cols = wanted_.cols;
    const bool compressed = config_.packing == Packing::compressed;
    if (!compressed && (rows % kCodesPerWord != 0 || cols % kCodesPerWord != 0)) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: a matrix of {}x{} cannot be packed by eights", label(names_.codes), rows, cols));
    }
    const std::vector<uint64_t> code_shape = compressed ? std::vector<uint64_t>{rows, ceil_div(cols, kCodesPerWord)}
                                             : config_.packing == Packing::awq
                                                 ? std::vector<uint64_t>{cols, rows / kCodesPerWord}
                                                 : std::vector<uint64_t>{cols / kCodesPerWord, rows};
    SLUICE_TRY(require(names_.codes, {"I32"}, code_shape, packed.codes));
    const std::vector<uint64_t> scale_shape =
        compressed ? std::vector<uint64_t>{rows, groups} : std::vector<uint64_t>{groups, rows};
    SLUICE_TRY_ASSIGN(dtype, require(names_.scales, {"F16", "BF16", "F32"}, scale_shape, packed.scales));
    packed.scale_type = *source_type_of_dtype(dtype);
    const std::vector<uint64_t> zero_shape = compressed ? std::vector<uint64_t>{ceil_div(rows, kCodesPerWord), groups}
                                                        : std::vector<uint64_t>{groups, rows / kCodesPerWord};
    const bool needs_zeros =
        !config_.symmetric || packed.packing == Packing::gptq_v1 || packed.packing == Packing::gptq_v2;
    SLUICE_TRY(optional(names_.zeros, needs_zeros, zero_shape, packed.zeros));
    SLUICE_TRY(optional(names_.group_index, config_.act_order && groups > 1, {cols}, packed.group_index));
    if (compressed) SLUICE_TRY(check_weight_shape());

    SourceTensor source;
    source.role = wanted_.role;
    source.layer = wanted_.layer;
    source.rows = wanted_.rows;
    source.cols = wanted_.cols;
    source.name = wanted_.name;
    source.source_name = stem_ + names_.codes;
    source.type = compressed                        ? SourceType::compressed
                  : config_.packing == Packing::awq ? SourceType::awq
                                                    : SourceType::gptq;
    source.packed = packed;
    return std::optional<SourceTensor>(std::move(source));
  }

 private:
  std::string label(const char* part) const {
    const auto found = shards_.where.find(stem_ + part);
    const std::string& path = found == shards_.where.end() ? config_.path : shards_.files[found->second].path;
    return fmt::format("{}: tensor {}", path, in_quotes(stem_ + part));
  }

  // Its dtype.
  Result<std::string> require(const char* part, std::initializer_list<const char*> dtypes,
                              const std::vector<uint64_t>& shape, FilePart& out) const {
    const auto found = shards_.where.find(stem_ + part);
    if (found == shards_.where.end()) {
      return fail(ErrorCode::corrupt, fmt::format("{} is missing, although {} is there; download the folder again",
                                                  label(part), in_quotes(stem_ + names_.codes)));
    }
    const SafetensorsTensor& tensor = shards_.indices[found->second].find(found->first)->second;
    if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
      return fail(ErrorCode::unsupported, fmt::format("{}: is of dtype {}; supported is {}", label(part),
                                                      in_quotes(tensor.dtype), fmt::join(dtypes, ", ")));
    }
    if (tensor.shape != shape) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: has shape {}, a matrix of {}x{} in groups of {} needs {}", label(part),
                              fmt::join(tensor.shape, "x"), wanted_.rows, wanted_.cols,
                              config_.group_elems == 0 ? wanted_.cols : config_.group_elems, fmt::join(shape, "x")));
    }
    out = {found->second, tensor.offset, tensor.bytes};
    return tensor.dtype;
  }

  Status optional(const char* part, bool needed, const std::vector<uint64_t>& shape,
                  std::optional<FilePart>& out) const {
    if (!needed && !shards_.where.contains(stem_ + part)) return {};
    FilePart found;
    SLUICE_TRY(require(part, {"I32"}, shape, found));
    out = found;
    return {};
  }

  Status check_weight_shape() const {
    if (!shards_.where.contains(stem_ + ".weight_shape")) return {};
    FilePart part;
    SLUICE_TRY(require(".weight_shape", {"I64", "I32"}, {2}, part));
    std::array<std::byte, 16> bytes = {};
    SLUICE_TRY(read_exactly(shards_.files[part.file].fd.get(), std::span(bytes).first(part.bytes), part.offset,
                            shards_.files[part.file].path));
    std::array<int64_t, 2> shape = {};
    for (size_t i = 0; i < 2; ++i) std::memcpy(&shape[i], bytes.data() + i * part.bytes / 2, part.bytes / 2);
    if (shape[0] == wanted_.rows && shape[1] == wanted_.cols) return {};
    return fail(ErrorCode::corrupt, fmt::format("{}: says {}x{}, config.json makes it {}x{}", label(".weight_shape"),
                                                shape[0], shape[1], wanted_.rows, wanted_.cols));
  }

  const Shards& shards_;
  const WantedTensor& wanted_;
  const QuantizationConfig& config_;
  const std::string stem_;
  const PartNames names_;
};

}  // namespace

Result<std::optional<QuantizationConfig>> read_quantization_config(const Json& config, const std::string& folder,
                                                                   const LogHook& log) {
  const std::string config_path = in_folder(folder, "config.json");
  for (const char* key : {"quantization_config", "compression_config"}) {
    const Json* found = json_member(config, key);
    if (found == nullptr) continue;
    SLUICE_TRY_ASSIGN(read, read_method(Settings(*found, config_path), "", log));
    return std::optional(std::move(read));
  }
  const std::pair<const char*, const char*> older[] = {{"quantize_config.json", "gptq"}, {"quant_config.json", "awq"}};
  for (const auto& [name, method] : older) {
    const std::string path = in_folder(folder, name);
    if (!exists(path)) continue;
    SLUICE_TRY_ASSIGN(text, read_text_file(path, kMaxConfigBytes));
    SLUICE_TRY_ASSIGN(root, parse_json_object(text, path));
    SLUICE_TRY_ASSIGN(read, read_method(Settings(root, path), method, log));
    return std::optional(std::move(read));
  }
  return std::optional<QuantizationConfig>();
}

Result<std::optional<SourceTensor>> locate_packed(const Shards& shards, const WantedTensor& wanted,
                                                  const QuantizationConfig& config) {
  return Locator(shards, wanted, config).locate();
}

std::set<std::string> packed_part_names(const SourceTensor& tensor) {
  const std::string stem = stem_of(tensor.name);
  const PartNames names = part_names(tensor.packed->packing);
  return {stem + names.codes, stem + names.scales, stem + names.zeros, stem + names.group_index,
          stem + ".weight_shape"};
}

}  // namespace sluice::import
