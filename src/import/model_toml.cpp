// SPDX-License-Identifier: Apache-2.0
#include "import/model_toml.hpp"

#include <fmt/format.h>

#include <filesystem>

#include "import/checkpoint.hpp"
#include "import/rope.hpp"
#include "import/text.hpp"
#include "import/toml_table.hpp"

namespace sluice::import {
namespace {

Result<storage::Rope> read_rope(const toml::table* table, uint32_t head_dim, const std::string& path) {
  RopeParameters parameters;
  parameters.rotary_dims = head_dim;
  if (table == nullptr) return make_rope(parameters, path);
  TomlTable rope(*table, path + ": [rope]");
  SLUICE_TRY_ASSIGN(type, rope.value<std::string>("type", parameters.type));
  SLUICE_TRY_ASSIGN(theta, rope.value<double>("theta", parameters.theta));
  SLUICE_TRY_ASSIGN(factor, rope.value<double>("factor", parameters.factor));
  SLUICE_TRY_ASSIGN(low, rope.value<double>("low_freq_factor", parameters.low_freq_factor));
  SLUICE_TRY_ASSIGN(high, rope.value<double>("high_freq_factor", parameters.high_freq_factor));
  SLUICE_TRY_ASSIGN(original, rope.value<double>("original_context", parameters.original_context));
  SLUICE_TRY(rope.refuse_others());
  parameters.type = type;
  parameters.theta = theta;
  parameters.factor = factor;
  parameters.low_freq_factor = low;
  parameters.high_freq_factor = high;
  parameters.original_context = original;
  return make_rope(parameters, path);
}

}  // namespace

Result<ModelShape> read_model_toml(const std::string& path) {
  SLUICE_TRY_ASSIGN(root, read_toml(path));
  TomlTable model(root, path);
  SLUICE_TRY_ASSIGN(name, model.value<std::string>("name", std::filesystem::path(path).stem().string()));
  SLUICE_TRY_ASSIGN(architecture, model.value<std::string>("architecture"));
  ModelShape shape;
  storage::HyperParameters& hyper = shape.hyper;
  bool known = false;
  using storage::Architecture;
  for (const Architecture one : {Architecture::llama, Architecture::mistral, Architecture::qwen2, Architecture::qwen3}) {
    if (architecture != storage::name_of(one)) continue;
    hyper.architecture = one;
    known = true;
  }
  if (!known) {
    return fail(ErrorCode::unsupported, fmt::format("{}: architecture {}; supported are llama, mistral, qwen2 and qwen3",
                                                    path, in_quotes(architecture)));
  }
  const struct {
    const char* key;
    uint32_t* value;
  } kSizes[] = {{"layers", &hyper.layers},     {"hidden", &hyper.hidden}, {"heads", &hyper.heads},
                {"kv_heads", &hyper.kv_heads}, {"head_dim", &hyper.head_dim}, {"ffn", &hyper.ffn},
                {"vocab", &hyper.vocab},       {"max_context", &hyper.max_context}};
  for (const auto& [key, value] : kSizes) {
    SLUICE_TRY_ASSIGN(size, model.size(key));
    *value = size;
  }
  SLUICE_TRY_ASSIGN(epsilon, model.value<double>("norm_eps"));
  SLUICE_TRY_ASSIGN(tied, model.value<bool>("tied_embeddings"));
  const toml::table* rope_table = model.table("rope");
  SLUICE_TRY(model.refuse_others());
  hyper.norm_eps = static_cast<float>(epsilon);
  hyper.tied_embeddings = tied;
  SLUICE_TRY(check_hyper_parameters(hyper, path));
  SLUICE_TRY_ASSIGN(rope, read_rope(rope_table, hyper.head_dim, path));
  shape.name = std::move(name);
  shape.rope = std::move(rope);
  return shape;
}

}  // namespace sluice::import
