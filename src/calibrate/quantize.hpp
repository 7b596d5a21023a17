// SPDX-License-Identifier: Apache-2.0
// Checkpoints into quantized containers by a recipe. Where a recipe asks for GPTQ, the model is walked layer by layer
// over calibration text: the inputs of every matrix are what the layers before it, as they were quantized, really give.
//
//   states before layer N --the layer as in the checkpoint--> second moments of each matrix's inputs --> rounding
//   states before layer N --the layer as it was rounded-----> states before layer N + 1
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "calibrate/recipe.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"

namespace sluice::calibrate {

struct Options {
  std::string source;  // as of import
  std::string output;  // replaced only when everything succeeded
  std::string recipe;  // a TOML file
  std::vector<std::string> calibration;
  std::optional<Method> method;  // instead of the recipe's
  uint32_t windows = 128;
  uint32_t window = 2048;  // tokens
  float damp = 0.01f;
  bool residual = false;  // a second nibble for every int4 matrix
  bool restart = false;   // throws away what an interrupted run left
  uint32_t threads = 1;
  std::string backend = "auto";
  // Makes one by name; called once a layer.
  std::function<Result<std::unique_ptr<backend::Backend>>(const std::string& name, const LogHook& log)> make_backend;
  LogHook log;
  std::function<void(uint64_t done, uint64_t total, const std::string& detail)> progress;
};

struct Report {
  uint64_t tensors = 0;
  uint64_t bytes = 0;           // of the file
  uint32_t resumed_layers = 0;  // that an earlier run had finished
  double bits_per_weight = 0;   // of the matrices in the layers, scales included
  double residual_bits_per_weight = 0;  // ... of their residuals, besides
  double seconds = 0;
  double weights_per_second = 0;  // of the matrices that this run rounded
  std::string json;  // everything, with an entry for each matrix (docs/quantization.md)
};

// Memory with GPTQ: one layer as in the checkpoint and as it was rounded, one sequence of states, and for the widest
// matrix of K inputs 2 K^2 floats; without, as import. Resumes by itself: finished layers lie in OUTPUT.work until the
// end, and a result does not depend on where it was interrupted or on the number of threads. Errors: those of import,
// recipe, calibration and work folder; usage, unsupported (a checkpoint that is INT4 already), numeric, out_of_memory.
Result<Report> quantize_model(const Options& options);

}  // namespace sluice::calibrate
