// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/device.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>

#include "backend/cuda/cuda_error.hpp"
#include "base/units.hpp"
#include "cuda/elementwise.hpp"

namespace sluice::backend::cuda {

namespace {

// Kernels are loaded when they are first used, graphs upload their nodes, and cudaMalloc takes whole pages of 2 MiB: what
// the context grows by after it was measured. tests/api/cuda_memory_test.cpp holds it against the driver's own count.
constexpr uint64_t kLaterGrowth = 96 * kMiB;
// Of a context, where NVML cannot tell: above what was seen on sm_75 to sm_90.
constexpr uint64_t kAssumedContext = 640 * kMiB;

// Memory in use on a device as the driver's management library sees it, which needs no context: libnvidia-ml.so.1,
// opened here because it comes with the driver. Nothing where it does not (Jetson).
class Nvml {
 public:
  explicit Nvml(const char* pci_bus_id) {
    library_ = ::dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) return;
    const auto init = function<int()>("nvmlInit_v2");
    const auto by_bus = function<int(const char*, void**)>("nvmlDeviceGetHandleByPciBusId_v2");
    memory_ = function<int(void*, Memory*)>("nvmlDeviceGetMemoryInfo");
    if (init == nullptr || init() != 0) return;
    initialised_ = true;
    if (by_bus == nullptr || by_bus(pci_bus_id, &handle_) != 0) handle_ = nullptr;
  }
  ~Nvml() {
    const auto shutdown = initialised_ ? function<int()>("nvmlShutdown") : nullptr;
    if (shutdown != nullptr) shutdown();
    if (library_ != nullptr) ::dlclose(library_);
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  std::optional<uint64_t> used_bytes() const {
    Memory memory;
    if (handle_ == nullptr || memory_ == nullptr || memory_(handle_, &memory) != 0) return std::nullopt;
    return memory.used;
  }

 private:
  struct Memory {  // nvmlMemory_t
    unsigned long long total = 0, free = 0, used = 0;
  };
  template <class Signature>
  Signature* function(const char* symbol) const {
    return library_ == nullptr ? nullptr : reinterpret_cast<Signature*>(::dlsym(library_, symbol));
  }
  void* library_ = nullptr;
  bool initialised_ = false;
  void* handle_ = nullptr;
  int (*memory_)(void*, Memory*) = nullptr;
};

// A process has one context per device, which stays: what it took is measured when the first backend opens it, and holds
// for all later ones. So this is state of the process, as the context is.
uint64_t measured_context(int index, std::optional<uint64_t> before, std::optional<uint64_t> after) {
  static std::mutex mutex;
  static std::map<int, uint64_t> measured;
  const std::lock_guard lock(mutex);
  const auto found = measured.find(index);
  if (found != measured.end()) return found->second;
  // Nothing, where somebody else in this process had made the context before: it is not ours to count.
  const uint64_t bytes = before && after ? *after - std::min(*before, *after) : kAssumedContext;
  measured.emplace(index, bytes);
  return bytes;
}

}  // namespace

Result<Device> Device::open(int index) {
  const auto checked = [](cudaError_t code, const std::string& what) -> Status {
    if (code == cudaSuccess) return {};
    cudaGetLastError();
    return fail(error_of(code, what));
  };
  int count = 0;
  SLUICE_TRY(checked(cudaGetDeviceCount(&count), "looking for GPUs"));
  if (index < 0 || index >= count) {
    return fail(ErrorCode::not_found, fmt::format("there is no GPU {}; this machine has {}", index, count));
  }
  Device device;
  device.index = index;
  char bus_id[32] = {};
  SLUICE_TRY(checked(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, index), "asking for the GPU's bus address"));
  device.pci_bus_id = bus_id;
  const Nvml nvml(bus_id);
  const std::optional<uint64_t> before = nvml.used_bytes();

  SLUICE_TRY(checked(cudaSetDevice(index), fmt::format("starting GPU {}", index)));
  size_t free = 0, total = 0;
  SLUICE_TRY(checked(cudaMemGetInfo(&free, &total), fmt::format("starting GPU {}", index)));
  cudaDeviceProp properties{};
  SLUICE_TRY(checked(cudaGetDeviceProperties(&properties, index), "asking for the GPU's properties"));
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.total_bytes = total;
  device.programmatic_launch = properties.major >= 9;
  SLUICE_TRY(checked(cudaDriverGetVersion(&device.driver), "asking for the driver's version"));
  SLUICE_TRY(checked(sluice::cuda::probe_kernels(), "loading kernels"));

  device.context_bytes = measured_context(index, before, nvml.used_bytes());
  device.overhead_bytes = device.context_bytes + kLaterGrowth;
  return device;
}

uint64_t Device::free_bytes() const {
  make_current();
  size_t free = 0, total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}

}  // namespace sluice::backend::cuda
