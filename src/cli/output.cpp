// SPDX-License-Identifier: Apache-2.0
#include "output.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace sluice::cli {
namespace {

constexpr const char* kEraseLine = "\r\033[K";

// Returns 0 or the errno that stopped it.
int write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    text.remove_prefix(static_cast<size_t>(written));
  }
  return 0;
}

Unexpected cannot_write(const std::string& path, int failure) {
  return fail(ErrorCode::io, fmt::format("{}: cannot be written: {}; name another file", path, std::strerror(failure)),
              failure);
}

bool stderr_is_terminal() { return ::isatty(STDERR_FILENO) == 1; }

// Whether a bar stands on the terminal's current line, so that a log line from any thread clears it first.
std::atomic<bool> bar_drawn{false};

}  // namespace

Status print(std::string_view text) {
  const int failure = write_all(STDOUT_FILENO, text);
  if (failure != 0) {
    return fail(ErrorCode::io, fmt::format("cannot write to standard output: {}", std::strerror(failure)), failure);
  }
  return {};
}

Status print_json(const nlohmann::json& value) {
  return print(value.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

Status check_writable(const std::string& path) {
  // Where nothing is, only making a file tells.
  const int made = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (made >= 0) {
    ::close(made);
    ::unlink(path.c_str());
    return {};
  }
  if (errno != EEXIST) return cannot_write(path, errno);
  // What is there is not opened: the reader of a pipe would take that for its end.
  struct stat info = {};
  if (::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) return cannot_write(path, EISDIR);
  return ::access(path.c_str(), W_OK) == 0 ? Status() : cannot_write(path, errno);
}

Status write_file(const std::string& path, std::string_view text) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return cannot_write(path, errno);
  int failure = write_all(fd, text);
  if (::close(fd) != 0 && failure == 0) failure = errno;
  return failure == 0 ? Status() : cannot_write(path, failure);
}

bool output_closed(const Error& error) { return error.code == ErrorCode::io && error.os_code == EPIPE; }

void note(std::string_view line) {
  std::string text;
  if (bar_drawn.exchange(false)) text = kEraseLine;
  text += line;
  text += '\n';
  (void)write_all(STDERR_FILENO, text);
}

LogHook log_to_stderr(bool quiet) {
  return [quiet](LogLevel level, std::string_view line) {
    if (level == LogLevel::warning) note(fmt::format("warning: {}", line));
    else if (!quiet) note(line);
  };
}

std::string bytes_text(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.{}f} {}", value, value < 100 ? 2 : 1, kUnits[unit]);
}

std::string rate_text(double bytes_per_second) {
  if (bytes_per_second >= 1e9) return fmt::format("{:.2f} GB/s", bytes_per_second / 1e9);
  return fmt::format("{:.1f} MB/s", bytes_per_second / 1e6);
}

std::string seconds_text(double seconds) {
  const double size = std::fabs(seconds);
  if (size >= 1) return fmt::format("{:.2f} s", seconds);
  if (size >= 1e-3) return fmt::format("{:.{}f} ms", seconds * 1e3, size < 0.1 ? 2 : 1);
  return fmt::format("{:.1f} us", seconds * 1e6);
}

Progress::Progress(std::string label, Unit unit)
    : label_(std::move(label)),
      unit_(unit),
      terminal_(stderr_is_terminal()),
      started_(Clock::now()),
      shown_(started_) {}

Progress::~Progress() {
  if (bar_drawn.exchange(false)) (void)write_all(STDERR_FILENO, kEraseLine);
}

std::string Progress::amounts(uint64_t done, uint64_t total) const {
  if (unit_ == Unit::items) return fmt::format("{} of {}", done, total);
  const double seconds = std::chrono::duration<double>(Clock::now() - started_).count();
  std::string text = fmt::format("{} of {}", bytes_text(done), bytes_text(total));
  if (seconds > 0.2) text += ", " + rate_text(static_cast<double>(done) / seconds);
  return text;
}

void Progress::update(uint64_t done, uint64_t total, std::string_view detail) {
  const auto now = Clock::now();
  if (now - shown_ < (terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(1000))) return;
  shown_ = now;
  const double share = total == 0 ? 1.0 : std::min(1.0, static_cast<double>(done) / static_cast<double>(total));
  const std::string tail = detail.empty() ? std::string() : fmt::format("  {}", detail);
  if (!terminal_) {
    note(fmt::format("{}: {:.0f}%, {}{}", label_, share * 100, amounts(done, total), tail));
    return;
  }
  constexpr size_t kWidth = 30;
  const size_t filled = static_cast<size_t>(share * kWidth);
  // One line of a terminal of 80 columns and more: a longer one would wrap and could not be redrawn.
  std::string line = fmt::format("{} [{}{}] {:3.0f}%  {}{}", label_, std::string(filled, '#'),
                                 std::string(kWidth - filled, '.'), share * 100, amounts(done, total), tail);
  line.resize(std::min<size_t>(line.size(), 79));
  (void)write_all(STDERR_FILENO, kEraseLine + line);
  bar_drawn = true;
}

}  // namespace sluice::cli
