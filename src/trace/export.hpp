// SPDX-License-Identifier: Apache-2.0
// Traces for other programs, and for people without one.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "sluice/result.hpp"
#include "trace/tokens.hpp"
#include "trace/trace_file.hpp"

namespace sluice::trace {

// Takes pieces of an output in order.
using Sink = std::function<Status(std::string_view)>;

// Viewers draw a track as a stack: what ends there is what began last. Spans that overlap without nesting, such as
// reads in flight together, have a lane of their own each.
struct Lane {
  std::string name;                    // the track's, with a number where it has several lanes: "drive 0"
  std::vector<const Record*> spans;    // by begin, of those that begin together the longest first; they nest
};
// The spans of `track`, which must outlive them; one lane, perhaps an empty one, where all of them nest.
std::vector<Lane> lanes_of(const TraceTrack& track);

// What a span is called: "disk_read"; of a fault made on purpose "injected read".
std::string slice_name(const Record& record);
// Whether `layer` is the number of one: that of a fault says which fault.
bool has_layer(const Record& record);

// The Trace Event Format of Chrome (chrome://tracing, Perfetto): complete events, counters, names of threads, of which
// each lane is one. Microseconds since the trace began.
Status write_chrome_json(const Trace& trace, const Sink& sink);

// Perfetto's own protobuf (ui.perfetto.dev, trace_processor): a track per lane, a counter track below a track's first
// lane per counter. One packet a slice begin, a slice end, or a reading.
Status write_perfetto(const Trace& trace, const Sink& sink);

// One self-contained page: no script, no network. `report`: of report_of().
std::string html_report(const nlohmann::json& report, const Tokens& tokens);

// A file that takes what a sink is given. Errors: not_found (the folder), io.
Status write_to_file(const std::string& path, const std::function<Status(const Sink&)>& write);

}  // namespace sluice::trace
