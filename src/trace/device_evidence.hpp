// SPDX-License-Identifier: Apache-2.0
// What a GPU and an NVMe drive say of themselves: clocks, heat, and whether they slow down. Optional: where a library or
// a right is missing, nothing is read.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/handles.hpp"
#include "trace/recorder.hpp"

namespace sluice::trace {

// NVIDIA's management library, opened at run time (NVML API reference; nothing of it is needed for building).
class GpuEvidence {
 public:
  // `pci_bus_id`: of the GPU that computes, as Backend::pci_bus_id() says it; the library numbers GPUs otherwise than CUDA
  // does. Null if that is empty, without the library, or where it does not know such a GPU: another vendor's, or none.
  // Takes tens of milliseconds.
  static std::unique_ptr<GpuEvidence> open(Track& track, const std::string& pci_bus_id,
                                           const char* library = "libnvidia-ml.so.1");
  ~GpuEvidence();
  GpuEvidence(const GpuEvidence&) = delete;
  GpuEvidence& operator=(const GpuEvidence&) = delete;

  void read();

 private:
  using Number = int (*)(void* device, unsigned* value);
  using Clock = int (*)(void* device, int type, unsigned* value);
  using Reasons = int (*)(void* device, unsigned long long* value);

  explicit GpuEvidence(Track& track) : track_(track) {}
  bool load(const std::string& pci_bus_id, const char* library);

  Track& track_;
  void* library_ = nullptr;
  void* device_ = nullptr;
  int (*shutdown_)() = nullptr;
  Clock clock_ = nullptr, temperature_ = nullptr;
  Number power_ = nullptr;
  Reasons reasons_ = nullptr;
};

// Reasons for a lower clock that are heat or power, not idleness or a setting: bits of Counter::gpu_throttle (nvml.h:
// SwPowerCap, HwSlowdown, SwThermalSlowdown, HwThermalSlowdown, HwPowerBrakeSlowdown).
inline constexpr uint64_t kGpuSlowed = 0x04 | 0x08 | 0x20 | 0x40 | 0x80;

// Of a SMART / Health Information log page (NVM Express base specification 2.0, figure 207).
struct DriveHealth {
  uint64_t celsius = 0;
  // Times that the drive slowed itself down for heat, and minutes above its warning and critical temperatures: it grows
  // when the drive is too hot.
  uint64_t throttles = 0;
};
inline constexpr size_t kHealthPageBytes = 512;
DriveHealth health_of(std::span<const uint8_t, kHealthPageBytes> page);

class DriveEvidence {
 public:
  // Null if `weights` does not lie on an NVMe drive, or this user may not ask it (root may).
  static std::unique_ptr<DriveEvidence> open(Track& track, const std::string& weights);
  void read();

 private:
  DriveEvidence(Track& track, UniqueFd controller) : track_(track), controller_(std::move(controller)) {}
  std::optional<DriveHealth> ask() const;

  Track& track_;
  UniqueFd controller_;
};

}  // namespace sluice::trace
