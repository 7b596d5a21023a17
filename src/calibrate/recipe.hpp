// SPDX-License-Identifier: Apache-2.0
// Recipes (configs/recipes/*.toml): which matrix becomes what.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "import/checkpoint.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::calibrate {

enum class Method : uint8_t { rtn, gptq };

// What a matrix becomes.
struct Choice {
  std::optional<storage::Scheme> scheme;  // nothing: as the checkpoint has it
  uint32_t group_elems = 128;             // of int4 and int8
  Method method = Method::rtn;            // of int4 inside the layers
  bool symmetric = true;                  // of int4 by gptq
};

using LayerRange = std::pair<int32_t, int32_t>;  // inclusive

// One [[rule]]: shell patterns over tensor names (*, ?, [...]), and layers.
struct Rule {
  std::vector<std::string> patterns;
  std::vector<LayerRange> layers;  // empty: all, and what is outside the layers
  Choice choice;
  uint32_t line = 0;
};

// What a recipe was seen to cost: `sluice eval` on the model named. Mean KL divergence, nats; `kl_fine` with --residual
// and --precision fine.
struct Measured {
  std::string model;
  double kl = 0;
  std::optional<double> kl_fine;
};

struct Recipe {
  std::string path, description;
  std::vector<Rule> rules;
  std::optional<Measured> measured;
};

// Errors: not_found, io, corrupt (an unknown key, scheme, method or group, with its line).
Result<Recipe> read_recipe(const std::string& path);

// The choice for every tensor, by the first rule that matches; vectors get none. `method` overrides that of all int4
// rules. Errors: usage (a pattern or a range of layers that no matrix of this model matches; a rule whose matrices
// rules before it take; a matrix without a rule; an int4 embedding).
Result<std::vector<std::optional<Choice>>> apply_recipe(const Recipe& recipe,
                                                        const std::vector<import::SourceTensor>& tensors,
                                                        std::optional<Method> method);

}  // namespace sluice::calibrate
