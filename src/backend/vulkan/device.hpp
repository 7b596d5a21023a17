// SPDX-License-Identifier: Apache-2.0
// A Vulkan device of this machine: found, judged, opened; and the buffers in its memory.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "backend/vulkan/devices.hpp"
#include "backend/vulkan/functions.hpp"
#include "sluice/result.hpp"

namespace sluice::backend::vulkan {

enum class MemoryKind : uint8_t {
  device,                             // where kernels read fast; not visible to the host unless it happens to be
  upload,                             // host memory that the device reads
  readback,                           // host memory that the device writes and the host reads, cached
};

// A buffer with memory of its own. `mapped` is null in MemoryKind::device. Freed by Device::destroy.
struct Buffer {
  VkBuffer handle = VK_NULL_HANDLE;
  VkDeviceMemory memory = VK_NULL_HANDLE;
  VkDeviceAddress address = 0;
  uint64_t bytes = 0;
  std::byte* mapped = nullptr;
};

struct QueuePlace {
  uint32_t family = 0;
  uint32_t index = 0;
  bool operator==(const QueuePlace&) const = default;
};

class Device {
 public:
  // The first usable device by kind: discrete, integrated, virtual, software (if allowed). Errors: not_found (no
  // loader, no driver, no device, or what each lacks), out_of_memory, device.
  static Result<std::unique_ptr<Device>> open(const DeviceChoice& choice);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  VkDevice handle() const { return device_; }
  const std::string& name() const { return report_.name; }
  const std::string& pci_bus_id() const { return pci_bus_id_; }   // empty without VK_EXT_pci_bus_info
  const DeviceReport& report() const { return report_; }
  bool software() const { return report_.software; }
  const VkPhysicalDeviceLimits& limits() const { return limits_; }
  uint32_t subgroup_size() const { return subgroup_size_; }
  // True if the features were there to be enabled: FP16 matrices 16x16 by 16x8 with FP32 sums in subgroups of 32.
  // Whether the driver lays them out as the shaders need it is another question (kernels.hpp).
  bool has_matrices() const { return has_matrices_; }
  // Of one allocation and one buffer.
  uint64_t max_allocation_bytes() const { return max_allocation_bytes_; }
  uint64_t total_bytes() const { return report_.memory_bytes; }
  // By the driver's own count where it keeps one (VK_EXT_memory_budget), else all that this object did not take.
  uint64_t free_bytes() const;

  // Where copies and kernels are submitted: a family for copies alone where there is one, else a second queue, else the
  // same queue.
  QueuePlace compute_queue() const { return compute_; }
  QueuePlace copy_queue() const { return copy_; }
  // Of a timestamp on the compute queue; 0: it has none.
  uint32_t timestamp_bits() const { return timestamp_bits_; }
  // Held around every use of a VkQueue: two Queue objects may share one.
  std::mutex& submit_mutex() { return submit_mutex_; }

  // Error: out_of_memory naming `what`; device.
  Result<Buffer> create_buffer(uint64_t bytes, MemoryKind kind, const std::string& what);
  bool imports_host_memory() const { return import_alignment_ != 0; }
  // Host memory as a buffer that copies read from. Fails where the driver refuses it; nothing is lost then.
  Result<Buffer> import_host(std::span<std::byte> memory);
  void destroy(Buffer& buffer);

  // The driver's functions. Not const, so that tests can break them.
  Functions vk;

 private:
  Device() = default;
  Status create_instance(const DeviceChoice& choice);
  Result<std::vector<VkPhysicalDevice>> physical_devices() const;
  Status create_device(VkPhysicalDevice physical);
  void choose_queues(VkPhysicalDevice physical);
  Result<uint32_t> memory_type(uint32_t allowed, MemoryKind kind) const;
  Error refused(VkResult code, uint64_t bytes, const std::string& what) const;
  Result<VkBuffer> create_handle(uint64_t bytes, VkBufferUsageFlags usage, const void* next, const std::string& what);
  friend Result<std::vector<DeviceReport>> list_devices(const DeviceChoice& choice);

  Loader loader_;
  VkInstance instance_ = VK_NULL_HANDLE;
  VkPhysicalDevice physical_ = VK_NULL_HANDLE;
  VkDevice device_ = VK_NULL_HANDLE;
  DeviceReport report_;
  std::string pci_bus_id_;
  VkPhysicalDeviceLimits limits_{};
  VkPhysicalDeviceMemoryProperties memory_{};
  uint32_t subgroup_size_ = 0;
  uint64_t max_allocation_bytes_ = 0;
  uint64_t import_alignment_ = 0;     // 0: host memory cannot be imported
  bool has_memory_budget_ = false;
  bool has_matrices_ = false;
  uint32_t local_heap_ = 0;
  uint64_t allocated_bytes_ = 0;      // of the local heap
  QueuePlace compute_, copy_;
  uint32_t timestamp_bits_ = 0;
  std::mutex submit_mutex_;
};

}  // namespace sluice::backend::vulkan
