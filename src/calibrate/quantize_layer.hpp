// SPDX-License-Identifier: Apache-2.0
// One layer of a checkpoint: its inputs measured, its matrices rounded, the states behind it computed.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "calibrate/quantize.hpp"
#include "calibrate/recipe.hpp"
#include "calibrate/work_folder.hpp"
#include "import/checkpoint.hpp"
#include "sluice/result.hpp"

namespace sluice::calibrate {

// What is the same for all layers. Borrows.
struct LayerContext {
  const import::Checkpoint& checkpoint;
  const std::vector<std::optional<Choice>>& choices;  // by tensor of the checkpoint
  const Options& options;
  std::string backend;  // its name
  uint32_t windows = 0, window = 0;
  std::function<void(uint64_t steps, const std::string& detail)> advance;  // of kLayerSteps(windows) a layer

  uint64_t states_floats() const { return uint64_t{window} * checkpoint.manifest.hyper.hidden; }
};

// Steps that a layer reports: both walks over the windows, and rounding, which takes about as long.
constexpr uint64_t layer_steps(uint32_t windows) { return 3 * uint64_t{windows}; }

// Takes layer `layer` from the states before it to the finished file in `work`, the states behind it included.
// A matrix that the recipe keeps is not in the file. Errors: those of quantize_model.
Status quantize_layer(const LayerContext& context, uint32_t layer, WorkFolder& work);

// The report's entry of a matrix, with that of its residual where `loss` knows of one. `damp` is negative without GPTQ.
nlohmann::ordered_json matrix_notes(storage::Tensor tensor, const Choice& choice, const quant::RoundingLoss& loss,
                                    float damp);

}  // namespace sluice::calibrate
