// SPDX-License-Identifier: Apache-2.0
// configs/devices/*.toml: a machine that is not this one.
#pragma once

#include <cstdint>
#include <string>

#include "sluice/result.hpp"
#include "sluice/sluice.hpp"

namespace sluice::api {

struct DeviceProfile {
  std::string name;
  std::string backend;             // "cuda", "vulkan", "cpu"
  uint64_t memory_bytes = 0;       // of the device
  uint64_t host_memory_bytes = 0;  // 0: the device's memory is the host's
  Bandwidths rates;

  // What a model may take of them by itself: a GPU's memory but a margin, a share of the host's.
  uint64_t device_budget_bytes() const;
  uint64_t host_budget_bytes() const;
  uint64_t overhead_bytes() const;  // of the device's memory, taken by using it at all
};

// Reads such a file. Every key must be there; unknown ones are refused. Rates are what a kernel or a copy reaches.
// Errors: not_found, io, corrupt (with the key), unsupported (the backend).
Result<DeviceProfile> read_device_profile(const std::string& path);

}  // namespace sluice::api
