// SPDX-License-Identifier: Apache-2.0
// Results to standard output or to a file, everything said beside them to standard error.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

#include "sluice/log.hpp"
#include "sluice/result.hpp"

namespace sluice::cli {

// Writes all of `text` to standard output at once, unbuffered. Error: io, with os_code EPIPE where the reader has gone.
Status print(std::string_view text);
// The same, as indented JSON and a newline; invalid UTF-8 becomes U+FFFD.
Status print_json(const nlohmann::json& value);

// Whether a file can be written at `path`: for a result that would be lost behind long work. Leaves everything as it
// was. Error: io.
Status check_writable(const std::string& path);
// Makes `text` the content of a file. Error: io.
Status write_file(const std::string& path, std::string_view text);

// Whether `error` is print()'s "the reader has gone": the end of the work, not a failure.
bool output_closed(const Error& error);

// Writes `line` and a newline to standard error; never fails.
void note(std::string_view line);

// Library log lines onto standard error: warnings as "warning: ...", or nothing but them where `quiet`.
LogHook log_to_stderr(bool quiet = false);

std::string bytes_text(uint64_t bytes);          // 1610612736 -> "1.50 GiB"
std::string rate_text(double bytes_per_second);  // 1.9e9 -> "1.90 GB/s"
std::string seconds_text(double seconds);        // 0.01234 -> "12.3 ms"

// How far a long job is: a bar that redraws itself where standard error is a terminal, else a plain line a second.
class Progress {
 public:
  enum class Unit { bytes, items };
  Progress(std::string label, Unit unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `detail`: what is in work, e.g. a tensor's name; may be empty.
  void update(uint64_t done, uint64_t total, std::string_view detail = {});

 private:
  using Clock = std::chrono::steady_clock;
  std::string amounts(uint64_t done, uint64_t total) const;

  std::string label_;
  Unit unit_;
  bool terminal_;
  Clock::time_point started_, shown_;
};

}  // namespace sluice::cli
