// SPDX-License-Identifier: Apache-2.0
// configs/models/*.toml: a model's hyperparameters without its weights.
#pragma once

#include <string>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

struct ModelShape {
  std::string name;
  storage::HyperParameters hyper;
  storage::Rope rope;
};

// Reads such a file. Every key but `name` and those of [rope] must be there; unknown ones are refused, so that a
// misspelt key does not go unnoticed.
// Errors: not_found, io, corrupt (with the line, where TOML itself is broken), unsupported.
Result<ModelShape> read_model_toml(const std::string& path);

}  // namespace sluice::import
