// SPDX-License-Identifier: Apache-2.0
// A trace on the terminal: where the time of a token went, and what stood out.
#pragma once

#include <string>

#include <nlohmann/json_fwd.hpp>

#include "sluice/sluice.hpp"

namespace sluice::cli {

// Lines for people, without a newline at the end, of what analyze_trace() gave.
std::string trace_summary(const nlohmann::json& report);

// Stops the model's trace and analyses it. Returns the summary; a run too short for one gives a line that says so.
// Errors: those of stop_trace and analyze_trace.
Result<std::string> finish_trace(Model& model, const std::string& path);

}  // namespace sluice::cli
