// SPDX-License-Identifier: Apache-2.0
// The timing summary: where the time of a session went, with the planner's prediction beside it.
#pragma once

#include <string>

#include <nlohmann/json_fwd.hpp>

#include "sluice/sluice.hpp"

namespace sluice::cli {

// Several lines for a person, without a newline at the end.
std::string timing_summary(const ModelInfo& model, const Timings& timings);

// The same figures: seconds and bytes.
nlohmann::json timing_json(const ModelInfo& model, const Timings& timings);

// The value below which the share `q` (0..1) of `values` lies, by the nearest-rank rule; 0 of none.
double percentile(std::vector<double> values, double q);

}  // namespace sluice::cli
