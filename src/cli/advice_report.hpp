// SPDX-License-Identifier: Apache-2.0
// What `sluice plan --advise` prints.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "sluice/sluice.hpp"

namespace sluice::cli {

std::string advice_text(const AdviceReport& report, const AdviceOptions& options);
nlohmann::json advice_json(const AdviceReport& report, const AdviceOptions& options);

}  // namespace sluice::cli
