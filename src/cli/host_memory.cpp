// SPDX-License-Identifier: Apache-2.0
#include "host_memory.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

namespace sluice::cli {
namespace {

// Of /proc/self/status, in KiB there; nothing where that is not to be had.
std::optional<int64_t> status_bytes(std::string_view wanted) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(wanted)) return std::stoll(line.substr(wanted.size())) * 1024;
  }
  return std::nullopt;
}

int64_t resident_bytes() { return status_bytes("VmRSS:").value_or(0); }

int64_t most_resident_bytes() {
  if (const std::optional<int64_t> most = status_bytes("VmHWM:")) return *most;
  struct rusage usage = {};
  ::getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

// proc(5): 5 sets the peak back to what is resident now.
bool reset_peak() {
  const int fd = ::open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool done = ::write(fd, "5", 1) == 1;
  ::close(fd);
  return done;
}

}  // namespace

void HostMemory::begin() {
  if (!reset_peak()) bound_ = true;
  before_ = resident_bytes();
}

void HostMemory::end() {
  peak_ = std::max(peak_, static_cast<uint64_t>(std::max<int64_t>(0, held_ + most_resident_bytes() - before_)));
  held_ += resident_bytes() - before_;
}

}  // namespace sluice::cli
