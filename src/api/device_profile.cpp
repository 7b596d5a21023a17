// SPDX-License-Identifier: Apache-2.0
#include "api/device_profile.hpp"

#include <fmt/format.h>

#include "api/state.hpp"
#include "base/units.hpp"
#include "import/toml_table.hpp"

namespace sluice::api {
namespace {

// A CUDA context with the kernels loaded: 0.5 GiB on an H200.
constexpr uint64_t kGpuOverhead = 512 * kMiB;
constexpr double kMostGib = 1 << 20;
constexpr double kMostGigabytesPerSecond = 1e6;

}  // namespace

uint64_t DeviceProfile::overhead_bytes() const { return backend == "cpu" ? 0 : kGpuOverhead; }

uint64_t DeviceProfile::device_budget_bytes() const {
  // Memory that the host lives in too is shared with whatever else runs there.
  if (host_memory_bytes == 0) return static_cast<uint64_t>(kShareOfFreeMemory * static_cast<double>(memory_bytes));
  return free_to_take(
      {.total_bytes = memory_bytes, .free_bytes = memory_bytes - overhead_bytes(), .overhead_bytes = overhead_bytes()});
}

uint64_t DeviceProfile::host_budget_bytes() const {
  return static_cast<uint64_t>(kShareOfFreeMemory * static_cast<double>(host_memory_bytes));
}

Result<DeviceProfile> read_device_profile(const std::string& path) {
  SLUICE_TRY_ASSIGN(root, import::read_toml(path));
  import::TomlTable keys(root, path);
  DeviceProfile profile;
  SLUICE_TRY_ASSIGN(name, keys.value<std::string>("name"));
  SLUICE_TRY_ASSIGN(backend, keys.value<std::string>("backend"));
  double memory_gib = 0, host_memory_gib = 0, memory = 0, bus = 0, disk = 0;
  const struct {
    const char* key;
    double* value;
    double least, most;
  } kNumbers[] = {{"memory_gib", &memory_gib, 1, kMostGib},
                  {"host_memory_gib", &host_memory_gib, 0, kMostGib},
                  {"memory_gb_s", &memory, 0.001, kMostGigabytesPerSecond},
                  {"bus_gb_s", &bus, 0.001, kMostGigabytesPerSecond},
                  {"disk_gb_s", &disk, 0.001, kMostGigabytesPerSecond}};
  for (const auto& [key, value, least, most] : kNumbers) {
    SLUICE_TRY_ASSIGN(number, keys.value<double>(key));
    if (!(number >= least && number <= most)) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: key \"{}\" is {}; it lies from {} to {}", path, key, number, least, most));
    }
    *value = number;
  }
  SLUICE_TRY(keys.refuse_others());
  if (backend != "cuda" && backend != "vulkan" && backend != "cpu") {
    return fail(ErrorCode::unsupported,
                fmt::format("{}: backend {}; there are cuda, vulkan and cpu", path, import::in_quotes(backend)));
  }
  profile.name = std::move(name);
  profile.backend = std::move(backend);
  profile.memory_bytes = static_cast<uint64_t>(memory_gib * static_cast<double>(kGiB));
  profile.host_memory_bytes = static_cast<uint64_t>(host_memory_gib * static_cast<double>(kGiB));
  profile.rates = {.disk = disk * 1e9, .bus = bus * 1e9, .cpu_memory = 0, .device_memory = memory * 1e9};
  return profile;
}

}  // namespace sluice::api
