// SPDX-License-Identifier: Apache-2.0
// What a trace says of its run, so that the same run can be made again.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "sluice/sluice.hpp"

namespace sluice::api {

struct Rerun {
  std::string path;                    // of the container, absolute
  ModelOptions options;                // without its hooks
  std::vector<int32_t> prompt;
  GenerateOptions generate;
};

nlohmann::json rerun_json(const Rerun& rerun);
// `run`: the note of the trace at `trace_path`. Errors: unsupported, if it does not say what was run; corrupt.
Result<Rerun> rerun_of(const nlohmann::json& run, const std::string& trace_path);

}  // namespace sluice::api
