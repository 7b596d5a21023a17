// SPDX-License-Identifier: Apache-2.0
// Counters of the operating system, read beside the spans: why a wait was long.
//
// What the process and the thread used is asked for once a token, by the thread that decodes; files, each 3 to 8 us
// where caches are cold, after slow tokens and otherwise so seldom that they take a four-thousandth of the time; those
// that take more, a few times a second by the collector. Files of /proc and /sys are opened once. One that is missing (a
// kernel without PSI, a container that hides it) leaves its counter out.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "base/handles.hpp"
#include "trace/recorder.hpp"

namespace sluice::trace {

// A small file of /proc or /sys, read again and again.
class StatFile {
 public:
  StatFile() = default;
  explicit StatFile(const std::string& path);
  // What it says now, at most kMostBytes; empty if it cannot be read. Valid until the next call.
  std::string_view read();
  // The same read by `buffer`'s owner, for files beyond kMostBytes.
  std::string_view read(std::span<char> buffer);
  explicit operator bool() const { return static_cast<bool>(fd_); }

 private:
  static constexpr size_t kMostBytes = 512;
  UniqueFd fd_;
  char text_[kMostBytes] = {};
};

// The number that begins behind `name` in `text`; false where there is none.
bool number_after(std::string_view text, std::string_view name, uint64_t& value);
// Word number `index` of the first line as a number.
bool number_at(std::string_view text, size_t index, uint64_t& value);

class TokenEvidence {
 public:
  // `weights`: the container, whose drive is watched; `streams`: from it in every pass, so that its counters are read
  // after every token.
  TokenEvidence(Track& track, const std::string& weights, bool streams);

  // After a token that took `token_ticks`. The thread that decodes; it may change between calls.
  void read(uint64_t token_ticks);

 private:
  bool is_slow(uint64_t token_ticks);
  void read_usage(uint64_t at);
  void read_files(uint64_t at);
  void read_seldom_used_files(uint64_t at);
  void read_drive(uint64_t at);
  void read_pressure(uint64_t at, StatFile& file, Counter counter);

  Track& track_;
  const bool streams_;
  double usual_ticks_ = 0;       // of a token
  double file_ticks_ = 0;        // of reading the files
  uint64_t files_read_at_ = 0;
  uint32_t ordinary_readings_ = 0;
  pid_t thread_ = 0;
  StatFile schedule_;            // of thread_
  StatFile memory_;
  StatFile cpu_pressure_, io_pressure_, memory_pressure_;
  StatFile drive_;
};

class MachineEvidence {
 public:
  explicit MachineEvidence(Track& track);
  void read();

 private:
  Track& track_;
  StatFile vmstat_, stat_;
  long ticks_per_second_;
};

}  // namespace sluice::trace
