// SPDX-License-Identifier: Apache-2.0
// What a trace says, as one JSON object: `sluice trace --json`, and what the terminal and the HTML report show.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "trace/tokens.hpp"
#include "trace/trace_file.hpp"
#include "trace/trains.hpp"

namespace sluice::trace {

// Where each decoded token stands on the clocks that trains are looked for on. Bytes are those read for all tokens
// before it, prompts included.
Clocks clocks_of(const Tokens& tokens);

// Times in seconds. docs/tracing.md explains every field.
nlohmann::json report_of(const Trace& trace, const Tokens& tokens);

}  // namespace sluice::trace
