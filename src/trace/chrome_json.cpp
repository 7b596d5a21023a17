// SPDX-License-Identifier: Apache-2.0
// The Trace Event Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
#include <cmath>

#include <fmt/format.h>

#include "trace/export.hpp"

namespace sluice::trace {
namespace {

constexpr size_t kPiece = 1 << 16;

// Whole nanoseconds, in which what nests in ticks nests: a begin and a length that are rounded by themselves add up to
// an end that may lie behind that of the span around it.
double microseconds(const Trace& trace, uint64_t at_ticks) {
  return std::floor(trace.scale.steady_ns(at_ticks) - static_cast<double>(trace.started.steady_ns)) * 1e-3;
}

// Names come from files: as JSON text.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20 && static_cast<unsigned char>(c) < 0x7f) out += c;
  }
  return out + "\"";
}

std::string named(size_t thread, const std::string& name) {
  return fmt::format(R"({{"ph":"M","pid":1,"tid":{0},"name":"thread_name","args":{{"name":{1}}}}},
{{"ph":"M","pid":1,"tid":{0},"name":"thread_sort_index","args":{{"sort_index":{0}}}}})", thread, quoted(name));
}

std::string span(const Trace& trace, const Record& record, size_t thread) {
  std::string args;
  if (has_layer(record)) args += fmt::format(R"("layer":{},)", record.layer);
  if (record.bytes != 0) args += fmt::format(R"("bytes":{},)", record.bytes);
  args += fmt::format(R"("value":{})", record.value);
  const double begin = microseconds(trace, record.begin), end = microseconds(trace, record.end);
  return fmt::format(R"({{"ph":"X","pid":1,"tid":{},"ts":{:.3f},"dur":{:.3f},"name":"{}","args":{{{}}}}})", thread,
                     begin, end - begin, slice_name(record), args);
}

// Counters belong to the process there; the id tells those of two sessions apart.
std::string reading(const Trace& trace, const Record& record, size_t thread, const std::string& track) {
  return fmt::format(R"({{"ph":"C","pid":1,"tid":{},"ts":{:.3f},"name":"{}","id":{},"args":{{"value":{}}}}})", thread,
                     microseconds(trace, record.begin), name_of(static_cast<Counter>(record.layer)), quoted(track),
                     record.value);
}

}  // namespace

Status write_chrome_json(const Trace& trace, const Sink& sink) {
  std::string text = R"({"displayTimeUnit":"ms","traceEvents":[)";
  bool first = true;
  const auto add = [&](const std::string& event) -> Status {
    if (!first) text += ",\n";
    first = false;
    text += event;
    if (text.size() < kPiece) return {};
    SLUICE_TRY(sink(text));
    text.clear();
    return {};
  };
  size_t thread = 0;
  for (const TraceTrack& track : trace.tracks) {
    for (const Record& record : track.records) {
      if (record.kind == Kind::counter) SLUICE_TRY(add(reading(trace, record, thread, track.name)));
    }
    for (const Lane& lane : lanes_of(track)) {
      SLUICE_TRY(add(named(thread, lane.name)));
      for (const Record* record : lane.spans) SLUICE_TRY(add(span(trace, *record, thread)));
      ++thread;
    }
  }
  text += "]}\n";
  return sink(text);
}

}  // namespace sluice::trace
