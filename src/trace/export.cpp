// SPDX-License-Identifier: Apache-2.0
#include "trace/export.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>

#include "base/handles.hpp"
#include "trace/injection.hpp"

namespace sluice::trace {

// First fit: a lane that has room, counted from the first, so that the lower ones are full and the last ones show how
// many were in flight at most.
std::vector<Lane> lanes_of(const TraceTrack& track) {
  std::vector<const Record*> spans;
  for (const Record& record : track.records) {
    if (record.kind != Kind::counter) spans.push_back(&record);
  }
  std::stable_sort(spans.begin(), spans.end(), [](const Record* a, const Record* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end > b->end;
  });
  std::vector<Lane> lanes(1);
  std::vector<std::vector<uint64_t>> open(1);   // of each lane: ends of the spans around the next one
  for (const Record* span : spans) {
    size_t lane = 0;
    for (; lane < lanes.size(); ++lane) {
      std::vector<uint64_t>& ends = open[lane];
      while (!ends.empty() && ends.back() <= span->begin) ends.pop_back();
      if (ends.empty() || span->end <= ends.back()) break;
    }
    if (lane == lanes.size()) {
      lanes.emplace_back();
      open.emplace_back();
    }
    lanes[lane].spans.push_back(span);
    open[lane].push_back(span->end);
  }
  for (size_t i = 0; i < lanes.size(); ++i)
    lanes[i].name = lanes.size() == 1 ? track.name : fmt::format("{} {}", track.name, i);
  return lanes;
}

std::string slice_name(const Record& record) {
  if (record.kind == Kind::injected && record.layer < static_cast<uint16_t>(Fault::count))
    return fmt::format("injected {}", name_of(static_cast<Fault>(record.layer)));
  return std::string(name_of(record.kind));
}

bool has_layer(const Record& record) { return record.layer != Record::kNoLayer && record.kind != Kind::injected; }

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
