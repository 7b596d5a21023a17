// SPDX-License-Identifier: Apache-2.0
#include "trace/device_evidence.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/nvme_ioctl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <filesystem>

#include <fmt/format.h>

namespace sluice::trace {
namespace {

// nvml.h.
constexpr int kNvmlSuccess = 0, kNvmlClockSm = 1, kNvmlTemperatureGpu = 0;

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  return function != nullptr;
}

}  // namespace

std::unique_ptr<GpuEvidence> GpuEvidence::open(Track& track, const std::string& pci_bus_id, const char* library) {
  if (pci_bus_id.empty()) return nullptr;
  std::unique_ptr<GpuEvidence> self(new GpuEvidence(track));
  return self->load(pci_bus_id, library) ? std::move(self) : nullptr;
}

GpuEvidence::~GpuEvidence() {
  if (shutdown_ != nullptr) shutdown_();
  if (library_ != nullptr) ::dlclose(library_);
}

bool GpuEvidence::load(const std::string& pci_bus_id, const char* library) {
  library_ = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) return false;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*by_bus)(const char*, void**) = nullptr;
  if (!find(library_, "nvmlInit_v2", init) || !find(library_, "nvmlShutdown", shutdown) ||
      !find(library_, "nvmlDeviceGetHandleByPciBusId_v2", by_bus) ||
      !find(library_, "nvmlDeviceGetClockInfo", clock_) || !find(library_, "nvmlDeviceGetTemperature", temperature_) ||
      !find(library_, "nvmlDeviceGetPowerUsage", power_) ||
      !find(library_, "nvmlDeviceGetCurrentClocksThrottleReasons", reasons_)) {
    return false;
  }
  if (init() != kNvmlSuccess) return false;
  shutdown_ = shutdown;
  return by_bus(pci_bus_id.c_str(), &device_) == kNvmlSuccess;
}

void GpuEvidence::read() {
  const uint64_t at = ticks();
  unsigned value = 0;
  unsigned long long reasons = 0;
  if (clock_(device_, kNvmlClockSm, &value) == kNvmlSuccess) track_.count(Counter::gpu_clock_mhz, at, value);
  if (temperature_(device_, kNvmlTemperatureGpu, &value) == kNvmlSuccess) track_.count(Counter::gpu_celsius, at, value);
  if (power_(device_, &value) == kNvmlSuccess) track_.count(Counter::gpu_milliwatts, at, value);
  if (reasons_(device_, &reasons) == kNvmlSuccess) track_.count(Counter::gpu_throttle, at, reasons);
}

// ---------------------------------------------------------------------------------------------------------- drive

DriveHealth health_of(std::span<const uint8_t, kHealthPageBytes> page) {
  const auto number = [&](size_t at, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; ++i) value |= uint64_t{page[at + i]} << (8 * i);
    return value;
  };
  constexpr uint64_t kZeroCelsius = 273;
  const uint64_t kelvin = number(1, 2);
  // Bytes 192, 196: minutes above the warning and the critical temperature; 216, 220: transitions of thermal management.
  return {.celsius = kelvin > kZeroCelsius ? kelvin - kZeroCelsius : 0,
          .throttles = number(192, 4) + number(196, 4) + number(216, 4) + number(220, 4)};
}

std::unique_ptr<DriveEvidence> DriveEvidence::open(Track& track, const std::string& weights) {
  struct stat info = {};
  if (::stat(weights.c_str(), &info) != 0) return nullptr;
  // .../nvme/nvme0/nvme0n1[/nvme0n1p2]: the controller is what lies behind "nvme".
  std::error_code missing;
  const auto place =
      std::filesystem::canonical(fmt::format("/sys/dev/block/{}:{}", major(info.st_dev), minor(info.st_dev)), missing);
  if (missing) return nullptr;
  for (auto part = place.begin(); part != place.end(); ++part) {
    if (*part != "nvme" || std::next(part) == place.end()) continue;
    UniqueFd controller(::open(fmt::format("/dev/{}", std::next(part)->string()).c_str(), O_RDONLY | O_CLOEXEC));
    if (!controller) return nullptr;
    std::unique_ptr<DriveEvidence> self(new DriveEvidence(track, std::move(controller)));
    return self->ask() ? std::move(self) : nullptr;
  }
  return nullptr;
}

std::optional<DriveHealth> DriveEvidence::ask() const {
  alignas(4096) std::array<uint8_t, kHealthPageBytes> page{};
  nvme_admin_cmd command = {};
  command.opcode = 0x02;                                      // Get Log Page
  command.nsid = 0xffffffff;
  command.addr = reinterpret_cast<uintptr_t>(page.data());
  command.data_len = kHealthPageBytes;
  command.cdw10 = 0x02 | (kHealthPageBytes / 4 - 1) << 16;    // SMART / Health Information; dwords, less one
  if (::ioctl(controller_.get(), NVME_IOCTL_ADMIN_CMD, &command) != 0) return std::nullopt;
  return health_of(page);
}

void DriveEvidence::read() {
  const uint64_t at = ticks();
  const std::optional<DriveHealth> health = ask();
  if (!health) return;
  track_.count(Counter::drive_celsius, at, health->celsius);
  track_.count(Counter::drive_throttles, at, health->throttles);
}

}  // namespace sluice::trace
