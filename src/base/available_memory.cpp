// SPDX-License-Identifier: Apache-2.0
#include "base/available_memory.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace sluice {

namespace {

constexpr uint64_t kUnknown = std::numeric_limits<uint64_t>::max();

// The number at the beginning of a file; nothing for "max" or an absent file.
std::optional<uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

uint64_t machine_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  uint64_t kib = 0;
  while (file >> key >> kib) {
    if (key == "MemAvailable:") return kib * 1024;
    std::getline(file, unit);
  }
  return kUnknown;
}

// What is left below memory.max in this cgroup and all above it. Memory of clean file pages counts as free: the kernel
// takes it back before it refuses an allocation.
uint64_t cgroup_memory() {
  std::ifstream self("/proc/self/cgroup");
  std::string line;
  while (std::getline(self, line) && !line.starts_with("0::")) {
  }
  if (!line.starts_with("0::")) return kUnknown;
  uint64_t left = kUnknown;
  for (std::string path = line.substr(3);; path.erase(path.find_last_of('/'))) {
    const std::string folder = "/sys/fs/cgroup" + path;
    const std::optional<uint64_t> most = read_number(folder + "/memory.max");
    const std::optional<uint64_t> used = read_number(folder + "/memory.current");
    if (most && used) {
      uint64_t file_bytes = 0;
      std::ifstream stat(folder + "/memory.stat");
      std::string key;
      uint64_t value = 0;
      while (stat >> key >> value) {
        if (key == "inactive_file" || key == "active_file") file_bytes += value;
      }
      const uint64_t taken = *used - std::min(*used, file_bytes);
      left = std::min(left, *most - std::min(*most, taken));
    }
    if (path.find_last_of('/') == std::string::npos) break;
  }
  return left;
}

}  // namespace

uint64_t available_memory() { return std::min(machine_memory(), cgroup_memory()); }

}  // namespace sluice
