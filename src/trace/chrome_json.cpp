// SPDX-License-Identifier: Apache-2.0
// The Trace Event Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include <fmt/format.h>

#include "base/handles.hpp"
#include "trace/export.hpp"

namespace sluice::trace {
namespace {

constexpr size_t kPiece = 1 << 16;

std::string event_of(const Trace& trace, const Record& record, size_t track) {
  const double at = trace.seconds(record.begin) * 1e6;
  if (record.kind == Kind::counter) {
    return fmt::format(R"({{"ph":"C","pid":1,"tid":{},"ts":{:.3f},"name":"{}","args":{{"value":{}}}}})", track, at,
                       name_of(static_cast<Counter>(record.layer)), record.value);
  }
  std::string args;
  if (record.layer != Record::kNoLayer) args += fmt::format(R"("layer":{},)", record.layer);
  if (record.bytes != 0) args += fmt::format(R"("bytes":{},)", record.bytes);
  args += fmt::format(R"("value":{})", record.value);
  return fmt::format(R"({{"ph":"X","pid":1,"tid":{},"ts":{:.3f},"dur":{:.3f},"name":"{}","args":{{{}}}}})", track, at,
                     (trace.seconds(record.end) - trace.seconds(record.begin)) * 1e6, name_of(record.kind), args);
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
  for (size_t i = 0; i < trace.tracks.size(); ++i) {
    SLUICE_TRY(add(fmt::format(R"({{"ph":"M","pid":1,"tid":{},"name":"thread_name","args":{{"name":{}}}}})", i,
                               quoted(trace.tracks[i].name))));
    for (const Record& record : trace.tracks[i].records) SLUICE_TRY(add(event_of(trace, record, i)));
  }
  text += "]}\n";
  return sink(text);
}

Status write_to_file(const std::string& path, const std::function<Status(const Sink&)>& write) {
  const auto failure = [&]() {
    const int code = errno;
    return fail(code == ENOENT ? ErrorCode::not_found : ErrorCode::io,
                fmt::format("{}: cannot write: {}", path, std::strerror(code)), code);
  };
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!fd) return failure();
  return write([&](std::string_view text) -> Status {
    while (!text.empty()) {
      const ssize_t written = ::write(fd.get(), text.data(), text.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return failure();
      text.remove_prefix(static_cast<size_t>(written));
    }
    return {};
  });
}

}  // namespace sluice::trace
