// SPDX-License-Identifier: Apache-2.0
// Which Vulkan devices this machine has, and what they can do. No Vulkan header is needed, and builds without the
// backend have it too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/result.hpp"

namespace sluice::backend::vulkan {

struct DeviceChoice {
  const char* library = "libvulkan.so.1";   // the loader
  bool software = true;                     // a driver that computes on the CPU (lavapipe) will do where there is no GPU
};

// A device as the driver describes it.
struct DeviceReport {
  std::string name;                   // "NVIDIA H200"
  std::string driver;                 // "NVIDIA 580.95"
  std::string kind;                   // "discrete GPU", "integrated GPU", "virtual GPU", "software"
  std::string version;                // of Vulkan, "1.4.312"
  std::string features;               // what kernels and copies make use of where it is there
  uint64_t memory_bytes = 0;          // of its largest device-local heap
  bool software = false;
  std::string missing;                // why Sluice cannot use it; empty: it can
};

// Every device that the machine's drivers show. Error: not_found (a build without Vulkan, no loader, no driver).
Result<std::vector<DeviceReport>> list_devices(const DeviceChoice& choice);

// Whether a GPU shows among the device files in `folder` (/dev): a render node, or NVIDIA's, WSL's, Adreno's or Mali's
// file. Looking takes microseconds; asking the Vulkan drivers loads every one of them, and Mesa's software driver with its
// compiler costs a cold start 0.1 to 0.25 s.
bool has_gpu_file(const std::string& folder);

struct Rates {
  std::string device;
  double read = 0;                    // its memory read by a kernel, bytes a second
  double bus = 0;                     // host memory, imported where that is possible, copied into it, bytes a second
};

// Opens the device that `choice` comes to for a second or so; takes 1 GiB of its memory. Errors: those of
// make_vulkan_backend.
Result<Rates> measure_rates(const DeviceChoice& choice);

}  // namespace sluice::backend::vulkan
