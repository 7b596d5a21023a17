// SPDX-License-Identifier: Apache-2.0
// Traces for other programs, and for people without one.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

#include "sluice/result.hpp"
#include "trace/tokens.hpp"
#include "trace/trace_file.hpp"

namespace sluice::trace {

// Takes pieces of an output in order.
using Sink = std::function<Status(std::string_view)>;

// The Trace Event Format of Chrome (chrome://tracing, Perfetto): complete events, counters, names of threads.
// Microseconds.
Status write_chrome_json(const Trace& trace, const Sink& sink);

// Perfetto's own protobuf (ui.perfetto.dev, trace_processor): a track per track, a counter track per counter. One
// packet a slice begin, a slice end, or a reading.
Status write_perfetto(const Trace& trace, const Sink& sink);

// One self-contained page: no script, no network. `report`: of report_of().
std::string html_report(const nlohmann::json& report, const Tokens& tokens);

// A file that takes what a sink is given. Errors: not_found (the folder), io.
Status write_to_file(const std::string& path, const std::function<Status(const Sink&)>& write);

}  // namespace sluice::trace
