// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/device.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <string_view>
#include <utility>

#include "backend/vulkan/vulkan_error.hpp"
#include "base/units.hpp"

namespace sluice::backend::vulkan {

namespace {

constexpr uint32_t kVersion = VK_API_VERSION_1_2;
// What the shaders are written for.
constexpr uint32_t kWorkgroup = 256;
constexpr uint32_t kSharedBytes = 16384;
constexpr uint32_t kPushBytes = 128;
constexpr const char* kUseCpu = "--backend cpu runs without a GPU";

// Everything that is asked of a physical device, in one chain. Not copied: the structs point at each other.
struct Description {
  VkPhysicalDeviceCooperativeMatrixFeaturesNV matrices{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_NV};
  VkPhysicalDeviceVulkan12Features features12{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES};
  VkPhysicalDeviceFeatures2 features{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, &features12};
  VkPhysicalDeviceExternalMemoryHostPropertiesEXT import{
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_EXTERNAL_MEMORY_HOST_PROPERTIES_EXT};
  VkPhysicalDevicePCIBusInfoPropertiesEXT bus{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PCI_BUS_INFO_PROPERTIES_EXT};
  VkPhysicalDeviceSubgroupProperties subgroup{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES, &import};
  VkPhysicalDeviceMaintenance3Properties maintenance3{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES, &subgroup};
  VkPhysicalDeviceDriverProperties driver{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES, &maintenance3};
  VkPhysicalDeviceProperties2 properties{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &driver};
  VkPhysicalDeviceMemoryProperties2 memory{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2};
  std::vector<VkQueueFamilyProperties> families;
  std::vector<VkExtensionProperties> extensions;
  bool has_matrices = false;          // of the kind that the shaders use

  Description() = default;
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  const VkPhysicalDeviceProperties& core() const { return properties.properties; }
  bool has(std::string_view extension) const {
    return std::any_of(extensions.begin(), extensions.end(), [&](const VkExtensionProperties& one) {
      return extension == one.extensionName;
    });
  }
};

// FP16 matrices 16x16 by 16x8 with FP32 sums, over a subgroup of 32.
bool has_matrices(const Functions& vk, VkPhysicalDevice physical, const Description& d) {
  const VkSubgroupFeatureFlags operations = VK_SUBGROUP_FEATURE_BASIC_BIT | VK_SUBGROUP_FEATURE_ARITHMETIC_BIT;
  if (!d.matrices.cooperativeMatrix || !d.features12.shaderFloat16 || !d.features12.vulkanMemoryModel ||
      d.subgroup.subgroupSize != 32 || (d.subgroup.supportedOperations & operations) != operations ||
      vk.vkGetPhysicalDeviceCooperativeMatrixPropertiesNV == nullptr) {
    return false;
  }
  uint32_t count = 0;
  if (vk.vkGetPhysicalDeviceCooperativeMatrixPropertiesNV(physical, &count, nullptr) != VK_SUCCESS) return false;
  std::vector<VkCooperativeMatrixPropertiesNV> kinds(count, {VK_STRUCTURE_TYPE_COOPERATIVE_MATRIX_PROPERTIES_NV});
  if (vk.vkGetPhysicalDeviceCooperativeMatrixPropertiesNV(physical, &count, kinds.data()) != VK_SUCCESS) return false;
  return std::any_of(kinds.begin(), kinds.end(), [](const VkCooperativeMatrixPropertiesNV& kind) {
    return kind.MSize == 16 && kind.NSize == 8 && kind.KSize == 16 && kind.AType == VK_COMPONENT_TYPE_FLOAT16_NV &&
           kind.BType == VK_COMPONENT_TYPE_FLOAT16_NV && kind.CType == VK_COMPONENT_TYPE_FLOAT32_NV &&
           kind.DType == VK_COMPONENT_TYPE_FLOAT32_NV && kind.scope == VK_SCOPE_SUBGROUP_NV;
  });
}

void describe(const Functions& vk, VkPhysicalDevice physical, Description& out) {
  uint32_t count = 0;
  if (vk.vkEnumerateDeviceExtensionProperties(physical, nullptr, &count, nullptr) == VK_SUCCESS) {
    out.extensions.resize(count);
    const VkResult code = vk.vkEnumerateDeviceExtensionProperties(physical, nullptr, &count, out.extensions.data());
    out.extensions.resize(code == VK_SUCCESS || code == VK_INCOMPLETE ? count : 0);
  }
  out.subgroup.pNext = out.has(VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME) ? &out.import : nullptr;
  if (out.has(VK_EXT_PCI_BUS_INFO_EXTENSION_NAME)) out.bus.pNext = std::exchange(out.subgroup.pNext, &out.bus);
  const bool matrices = out.has(VK_NV_COOPERATIVE_MATRIX_EXTENSION_NAME);
  if (matrices) out.features12.pNext = &out.matrices;
  vk.vkGetPhysicalDeviceProperties2(physical, &out.properties);
  vk.vkGetPhysicalDeviceFeatures2(physical, &out.features);
  vk.vkGetPhysicalDeviceMemoryProperties2(physical, &out.memory);
  vk.vkGetPhysicalDeviceQueueFamilyProperties(physical, &count, nullptr);
  out.families.resize(count);
  vk.vkGetPhysicalDeviceQueueFamilyProperties(physical, &count, out.families.data());
  out.has_matrices = matrices && has_matrices(vk, physical, out);
}

uint32_t largest_local_heap(const VkPhysicalDeviceMemoryProperties& memory) {
  uint32_t best = 0;
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < memory.memoryHeapCount; ++i) {
    const VkMemoryHeap& heap = memory.memoryHeaps[i];
    if ((heap.flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) == 0 || heap.size <= bytes) continue;
    best = i;
    bytes = heap.size;
  }
  return best;
}

std::string version_text(uint32_t version) {
  return fmt::format("{}.{}.{}", VK_API_VERSION_MAJOR(version), VK_API_VERSION_MINOR(version),
                     VK_API_VERSION_PATCH(version));
}

const char* kind_text(VkPhysicalDeviceType type) {
  switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU: return "discrete GPU";
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU: return "integrated GPU";
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU: return "virtual GPU";
    case VK_PHYSICAL_DEVICE_TYPE_CPU: return "software";
    default: return "other device";
  }
}

// Best first.
int rank(VkPhysicalDeviceType type) {
  switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU: return 0;
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU: return 1;
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU: return 2;
    case VK_PHYSICAL_DEVICE_TYPE_OTHER: return 3;
    default: return 4;
  }
}

// Such a queue runs beside kernels. Video queues copy as well, and are left alone.
bool copies_only(const VkQueueFamilyProperties& family) {
  constexpr VkQueueFlags kOther = VK_QUEUE_COMPUTE_BIT | VK_QUEUE_GRAPHICS_BIT | 0x20 | 0x40;
  return family.queueCount > 0 && (family.queueFlags & VK_QUEUE_TRANSFER_BIT) != 0 && (family.queueFlags & kOther) == 0;
}

std::string missing_text(const Description& d) {
  std::vector<std::string> missing;
  if (d.core().apiVersion < kVersion) missing.push_back(fmt::format("Vulkan 1.2 (it has {})", version_text(d.core().apiVersion)));
  if (!d.features12.bufferDeviceAddress) missing.emplace_back("bufferDeviceAddress");
  if (!d.features12.timelineSemaphore) missing.emplace_back("timelineSemaphore");
  const VkPhysicalDeviceLimits& limits = d.core().limits;
  if (limits.maxComputeWorkGroupInvocations < kWorkgroup || limits.maxComputeWorkGroupSize[0] < kWorkgroup) {
    missing.push_back(fmt::format("work groups of {}", kWorkgroup));
  }
  if (limits.maxComputeSharedMemorySize < kSharedBytes) missing.push_back(fmt::format("{} of shared memory", format_bytes(kSharedBytes)));
  if (limits.maxPushConstantsSize < kPushBytes) missing.push_back(fmt::format("{} bytes of push constants", kPushBytes));
  if (std::none_of(d.families.begin(), d.families.end(),
                   [](const auto& family) { return (family.queueFlags & VK_QUEUE_COMPUTE_BIT) != 0; })) {
    missing.emplace_back("a compute queue");
  }
  return fmt::format("{}", fmt::join(missing, ", "));
}

std::string features_text(const Description& d) {
  std::string text = fmt::format("subgroups of {}", d.subgroup.subgroupSize);
  if (d.has(VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME)) text += ", imports host memory";
  const bool copies = std::any_of(d.families.begin(), d.families.end(), copies_only);
  if (d.has_matrices) text += ", FP16 matrices (VK_NV_cooperative_matrix)";
  text += copies ? ", a queue for copies" : !d.families.empty() && d.families[0].queueCount > 1 ? ", several queues" : ", one queue";
  return text;
}

DeviceReport report_of(const Description& d) {
  const VkPhysicalDeviceMemoryProperties& memory = d.memory.memoryProperties;
  return {.name = d.core().deviceName,
          .driver = fmt::format("{} {}", d.driver.driverName, d.driver.driverInfo),
          .kind = kind_text(d.core().deviceType),
          .version = version_text(d.core().apiVersion),
          .features = features_text(d),
          .memory_bytes = memory.memoryHeapCount > 0 ? memory.memoryHeaps[largest_local_heap(memory)].size : 0,
          .software = d.core().deviceType == VK_PHYSICAL_DEVICE_TYPE_CPU,
          .missing = missing_text(d)};
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- opening

namespace {

// The loader unloads a driver with its last instance, and NVIDIA's (580.159) comes back only so often: after some dozen
// rounds of opening and closing a model no driver was found any more, until the process ended. So the first instance that
// could be made gets a sibling that stays, and the driver with it.
void keep_driver_loaded(const char* library, PFN_vkCreateInstance create, const VkInstanceCreateInfo& info) {
  static std::once_flag once;
  static VkInstance kept = VK_NULL_HANDLE;
  std::call_once(once, [&] {
    if (::dlopen(library, RTLD_NOW | RTLD_LOCAL) == nullptr) return;   // stays open
    if (create(&info, nullptr, &kept) != VK_SUCCESS) kept = VK_NULL_HANDLE;
  });
}

}  // namespace

Status Device::create_instance(const DeviceChoice& choice) {
  SLUICE_TRY_ASSIGN(loader, Loader::open(choice.library, vk));
  loader_ = std::move(loader);
  uint32_t version = 0;
  if (vk.vkEnumerateInstanceVersion(&version) != VK_SUCCESS || version < kVersion) {
    return fail(ErrorCode::not_found, fmt::format("the Vulkan loader is too old: it knows Vulkan {}, and 1.2 is needed; "
                                                  "update libvulkan1, or use --backend cpu", version_text(version)));
  }
  const VkApplicationInfo application{.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO,
                                      .pApplicationName = "sluice",
                                      .pEngineName = "sluice",
                                      .apiVersion = kVersion};
  const VkInstanceCreateInfo info{.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, .pApplicationInfo = &application};
  const VkResult code = vk.vkCreateInstance(&info, nullptr, &instance_);
  if (code != VK_SUCCESS) {
    instance_ = VK_NULL_HANDLE;
    return fail(error_of(code, "starting Vulkan"));
  }
  keep_driver_loaded(choice.library, vk.vkCreateInstance, info);
  return loader_.load_instance(instance_, vk);
}

Result<std::vector<VkPhysicalDevice>> Device::physical_devices() const {
  uint32_t count = 0;
  VkResult code = vk.vkEnumeratePhysicalDevices(instance_, &count, nullptr);
  std::vector<VkPhysicalDevice> devices(count);
  if (code == VK_SUCCESS && count > 0) code = vk.vkEnumeratePhysicalDevices(instance_, &count, devices.data());
  if (code != VK_SUCCESS && code != VK_INCOMPLETE) return fail(error_of(code, "looking for Vulkan devices"));
  devices.resize(count);
  return devices;
}

bool has_gpu_file(const std::string& folder) {
  const auto has = [&folder](const char* name) { return ::access((folder + "/" + name).c_str(), F_OK) == 0; };
  if (has("nvidiactl") || has("dxg") || has("kgsl-3d0") || has("mali0")) return true;
  for (int minor = 128; minor < 192; ++minor) {   // the kernel's range of render nodes
    if (has(fmt::format("dri/renderD{}", minor).c_str())) return true;
  }
  return false;
}

Result<std::vector<DeviceReport>> list_devices(const DeviceChoice& choice) {
  Device device;
  SLUICE_TRY(device.create_instance(choice));
  SLUICE_TRY_ASSIGN(physical, device.physical_devices());
  std::vector<DeviceReport> reports;
  for (const VkPhysicalDevice one : physical) {
    Description description;
    describe(device.vk, one, description);
    reports.push_back(report_of(description));
  }
  return reports;
}

Result<std::unique_ptr<Device>> Device::open(const DeviceChoice& choice) {
  std::unique_ptr<Device> self(new Device);
  SLUICE_TRY(self->create_instance(choice));
  SLUICE_TRY_ASSIGN(devices, self->physical_devices());
  std::optional<VkPhysicalDevice> best;
  int best_rank = 0;
  std::string rejected;
  for (const VkPhysicalDevice physical : devices) {
    Description d;
    describe(self->vk, physical, d);
    const bool software = d.core().deviceType == VK_PHYSICAL_DEVICE_TYPE_CPU;
    std::string why = missing_text(d);
    if (!why.empty()) why = "lacks " + why;
    else if (software && !choice.software) why = "computes on the CPU and is taken only by name (--backend vulkan)";
    if (!why.empty()) {
      rejected += fmt::format("{}{} {}", rejected.empty() ? "" : "; ", d.core().deviceName, why);
      continue;
    }
    if (best && best_rank <= rank(d.core().deviceType)) continue;
    best = physical;
    best_rank = rank(d.core().deviceType);
  }
  if (!best) {
    return fail(ErrorCode::not_found,
                rejected.empty() ? fmt::format("no Vulkan driver shows a device (see vulkaninfo); {}", kUseCpu)
                                 : fmt::format("no Vulkan device can be used: {}; {}", rejected, kUseCpu));
  }
  SLUICE_TRY(self->create_device(*best));
  return self;
}

void Device::choose_queues(VkPhysicalDevice physical) {
  Description d;
  describe(vk, physical, d);
  uint32_t compute = 0;
  while ((d.families[compute].queueFlags & VK_QUEUE_COMPUTE_BIT) == 0) ++compute;
  compute_ = {.family = compute, .index = 0};
  timestamp_bits_ = d.families[compute].timestampValidBits;
  copy_ = {.family = compute, .index = std::min(1u, d.families[compute].queueCount - 1)};
  const auto copies = std::find_if(d.families.begin(), d.families.end(), copies_only);
  if (copies != d.families.end()) copy_ = {.family = static_cast<uint32_t>(copies - d.families.begin()), .index = 0};
}

Status Device::create_device(VkPhysicalDevice physical) {
  Description d;
  describe(vk, physical, d);
  physical_ = physical;
  report_ = report_of(d);
  limits_ = d.core().limits;
  memory_ = d.memory.memoryProperties;
  subgroup_size_ = d.subgroup.subgroupSize;
  max_allocation_bytes_ = d.maintenance3.maxMemoryAllocationSize;
  local_heap_ = largest_local_heap(memory_);
  if (d.has(VK_EXT_PCI_BUS_INFO_EXTENSION_NAME)) {
    pci_bus_id_ = fmt::format("{:04X}:{:02X}:{:02X}.{:X}", d.bus.pciDomain, d.bus.pciBus, d.bus.pciDevice,
                              d.bus.pciFunction);
  }
  choose_queues(physical);

  std::vector<const char*> extensions;
  if (d.has(VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME)) {
    extensions.push_back(VK_EXT_EXTERNAL_MEMORY_HOST_EXTENSION_NAME);
    import_alignment_ = d.import.minImportedHostPointerAlignment;
  }
  has_memory_budget_ = d.has(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
  if (has_memory_budget_) extensions.push_back(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);

  constexpr float kPriorities[] = {1.0f, 1.0f};
  VkDeviceQueueCreateInfo queues[2] = {};
  uint32_t queue_infos = 0;
  for (const QueuePlace place : {compute_, copy_}) {
    if (queue_infos > 0 && place.family == compute_.family) {
      queues[0].queueCount = place.index + 1;
      continue;
    }
    queues[queue_infos++] = {.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, .queueFamilyIndex = place.family,
                             .queueCount = 1, .pQueuePriorities = kPriorities};
  }
  has_matrices_ = d.has_matrices;
  if (has_matrices_) extensions.push_back(VK_NV_COOPERATIVE_MATRIX_EXTENSION_NAME);
  VkPhysicalDeviceCooperativeMatrixFeaturesNV matrices{
      .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_COOPERATIVE_MATRIX_FEATURES_NV, .cooperativeMatrix = VK_TRUE};
  VkPhysicalDeviceVulkan12Features features{.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES,
                                            .pNext = has_matrices_ ? &matrices : nullptr,
                                            .shaderFloat16 = has_matrices_,
                                            .timelineSemaphore = VK_TRUE,
                                            .bufferDeviceAddress = VK_TRUE,
                                            .vulkanMemoryModel = has_matrices_};
  const VkDeviceCreateInfo info{.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
                                .pNext = &features,
                                .queueCreateInfoCount = queue_infos,
                                .pQueueCreateInfos = queues,
                                .enabledExtensionCount = static_cast<uint32_t>(extensions.size()),
                                .ppEnabledExtensionNames = extensions.data()};
  const VkResult code = vk.vkCreateDevice(physical, &info, nullptr, &device_);
  if (code != VK_SUCCESS) {
    device_ = VK_NULL_HANDLE;
    return fail(error_of(code, fmt::format("opening {}", report_.name)));
  }
  SLUICE_TRY(Loader::load_device(device_, vk));
  if (vk.vkGetMemoryHostPointerPropertiesEXT == nullptr) import_alignment_ = 0;
  return {};
}

Device::~Device() {
  if (device_ != VK_NULL_HANDLE && vk.vkDestroyDevice != nullptr) vk.vkDestroyDevice(device_, nullptr);
  if (instance_ != VK_NULL_HANDLE && vk.vkDestroyInstance != nullptr) vk.vkDestroyInstance(instance_, nullptr);
}

// -------------------------------------------------------------------------------------------------------- memory

uint64_t Device::free_bytes() const {
  if (!has_memory_budget_) return report_.memory_bytes - std::min(report_.memory_bytes, allocated_bytes_);
  VkPhysicalDeviceMemoryBudgetPropertiesEXT budget{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT};
  VkPhysicalDeviceMemoryProperties2 memory{VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2, &budget};
  vk.vkGetPhysicalDeviceMemoryProperties2(physical_, &memory);
  const uint64_t room = budget.heapBudget[local_heap_];
  return room - std::min(room, budget.heapUsage[local_heap_]);
}

// Properties that must be there, then those that are better: the first type with most of them.
Result<uint32_t> Device::memory_type(uint32_t allowed, MemoryKind kind) const {
  constexpr VkMemoryPropertyFlags kLocal = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT,
                                  kHost = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT,
                                  kCached = VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
  const VkMemoryPropertyFlags needed = kind == MemoryKind::device ? kLocal : kHost;
  int best = -1, best_score = -1;
  for (uint32_t i = 0; i < memory_.memoryTypeCount; ++i) {
    const VkMemoryPropertyFlags flags = memory_.memoryTypes[i].propertyFlags;
    if ((allowed & (1u << i)) == 0 || (flags & needed) != needed) continue;
    int score = 0;
    if (kind == MemoryKind::device) {
      score += memory_.memoryTypes[i].heapIndex == local_heap_ ? 2 : 0;
      score += (flags & VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT) == 0 ? 1 : 0;   // BAR space is scarce
    } else {
      score += (flags & kLocal) == 0 ? 2 : 0;
      score += ((flags & kCached) != 0) == (kind == MemoryKind::readback) ? 1 : 0;
    }
    if (score > best_score) best = static_cast<int>(i), best_score = score;
  }
  if (best < 0) return fail(ErrorCode::not_found, fmt::format("{}: no memory type for {} buffers; update its driver",
                                                              name(), kind == MemoryKind::device ? "device" : "host"));
  return static_cast<uint32_t>(best);
}

Error Device::refused(VkResult code, uint64_t bytes, const std::string& what) const {
  if (code != VK_ERROR_OUT_OF_DEVICE_MEMORY && code != VK_ERROR_OUT_OF_HOST_MEMORY) {
    return error_of(code, fmt::format("{}: allocating {} for {}", name(), format_bytes(bytes), what));
  }
  return {ErrorCode::out_of_memory,
          fmt::format("{}: {} for {} were refused, {} are free; lower --device-memory or --context, or end what else uses the "
                      "device", name(), format_bytes(bytes), what, format_bytes(free_bytes())),
          static_cast<int>(code)};
}

Result<VkBuffer> Device::create_handle(uint64_t bytes, VkBufferUsageFlags usage, const void* next, const std::string& what) {
  const uint32_t families[] = {compute_.family, copy_.family};
  const bool shared = compute_.family != copy_.family;
  const VkBufferCreateInfo info{.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
                                .pNext = next,
                                .size = bytes,
                                .usage = usage,
                                .sharingMode = shared ? VK_SHARING_MODE_CONCURRENT : VK_SHARING_MODE_EXCLUSIVE,
                                .queueFamilyIndexCount = shared ? 2u : 0u,
                                .pQueueFamilyIndices = shared ? families : nullptr};
  VkBuffer buffer = VK_NULL_HANDLE;
  const VkResult code = vk.vkCreateBuffer(device_, &info, nullptr, &buffer);
  if (code != VK_SUCCESS) return fail(refused(code, bytes, what));
  return buffer;
}

Result<Buffer> Device::create_buffer(uint64_t bytes, MemoryKind kind, const std::string& what) {
  Buffer buffer{.bytes = std::max<uint64_t>(bytes, 1)};
  if (buffer.bytes > max_allocation_bytes_) {
    return fail(ErrorCode::out_of_memory,
                fmt::format("{}: {} for {} are more than the {} that its driver allocates at once; lower --device-memory or "
                            "--context", name(), format_bytes(bytes), what, format_bytes(max_allocation_bytes_)));
  }
  constexpr VkBufferUsageFlags kCopies = VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT;
  constexpr VkBufferUsageFlags kUsage = kCopies | VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT;
  SLUICE_TRY_ASSIGN(handle, create_handle(buffer.bytes, kUsage, nullptr, what));
  buffer.handle = handle;
  VkMemoryRequirements needs{};
  vk.vkGetBufferMemoryRequirements(device_, handle, &needs);
  Result<uint32_t> type = memory_type(needs.memoryTypeBits, kind);
  if (!type) {
    destroy(buffer);
    return fail(std::move(type.error()));
  }
  const VkMemoryAllocateFlagsInfo flags{.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO,
                                        .flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT};
  const VkMemoryAllocateInfo info{.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, .pNext = &flags,
                                  .allocationSize = needs.size, .memoryTypeIndex = *type};
  VkResult code = vk.vkAllocateMemory(device_, &info, nullptr, &buffer.memory);
  if (code == VK_SUCCESS) {
    allocated_bytes_ += kind == MemoryKind::device ? buffer.bytes : 0;
    code = vk.vkBindBufferMemory(device_, handle, buffer.memory, 0);
  } else {
    buffer.memory = VK_NULL_HANDLE;
  }
  void* mapped = nullptr;
  if (code == VK_SUCCESS && kind != MemoryKind::device) {
    code = vk.vkMapMemory(device_, buffer.memory, 0, VK_WHOLE_SIZE, 0, &mapped);
  }
  if (code != VK_SUCCESS) {
    destroy(buffer);
    return fail(refused(code, bytes, what));
  }
  buffer.mapped = static_cast<std::byte*>(mapped);
  const VkBufferDeviceAddressInfo of{.sType = VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO, .buffer = handle};
  buffer.address = vk.vkGetBufferDeviceAddress(device_, &of);
  return buffer;
}

Result<Buffer> Device::import_host(std::span<std::byte> memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  if (import_alignment_ == 0 || address % import_alignment_ != 0 || memory.size() % import_alignment_ != 0) {
    return fail(ErrorCode::unsupported, fmt::format("{} cannot import host memory", name()));
  }
  constexpr VkExternalMemoryHandleTypeFlagBits kHost = VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT;
  VkMemoryHostPointerPropertiesEXT properties{VK_STRUCTURE_TYPE_MEMORY_HOST_POINTER_PROPERTIES_EXT};
  VkResult code = vk.vkGetMemoryHostPointerPropertiesEXT(device_, kHost, memory.data(), &properties);
  if (code != VK_SUCCESS) return fail(error_of(code, fmt::format("{}: importing host memory", name())));

  Buffer buffer{.bytes = memory.size()};
  const VkExternalMemoryBufferCreateInfo external{.sType = VK_STRUCTURE_TYPE_EXTERNAL_MEMORY_BUFFER_CREATE_INFO,
                                                  .handleTypes = kHost};
  SLUICE_TRY_ASSIGN(handle, create_handle(memory.size(), VK_BUFFER_USAGE_TRANSFER_SRC_BIT, &external, "host memory"));
  buffer.handle = handle;
  VkMemoryRequirements needs{};
  vk.vkGetBufferMemoryRequirements(device_, handle, &needs);
  const uint32_t allowed = needs.memoryTypeBits & properties.memoryTypeBits;
  if (allowed == 0 || needs.size > memory.size()) {
    destroy(buffer);
    return fail(ErrorCode::unsupported, fmt::format("{} has no memory type for imported host memory", name()));
  }
  uint32_t type = 0;
  while ((allowed & (1u << type)) == 0) ++type;
  const VkImportMemoryHostPointerInfoEXT import{.sType = VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT,
                                                .handleType = kHost, .pHostPointer = memory.data()};
  const VkMemoryAllocateInfo info{.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO, .pNext = &import,
                                  .allocationSize = memory.size(), .memoryTypeIndex = type};
  code = vk.vkAllocateMemory(device_, &info, nullptr, &buffer.memory);
  if (code == VK_SUCCESS) code = vk.vkBindBufferMemory(device_, handle, buffer.memory, 0);
  else buffer.memory = VK_NULL_HANDLE;
  if (code != VK_SUCCESS) {
    destroy(buffer);
    return fail(error_of(code, fmt::format("{}: importing {} of host memory", name(), format_bytes(memory.size()))));
  }
  return buffer;
}

void Device::destroy(Buffer& buffer) {
  if (buffer.handle != VK_NULL_HANDLE) vk.vkDestroyBuffer(device_, buffer.handle, nullptr);
  if (buffer.memory != VK_NULL_HANDLE) {
    vk.vkFreeMemory(device_, buffer.memory, nullptr);
    if (buffer.mapped == nullptr && buffer.address != 0) allocated_bytes_ -= buffer.bytes;
  }
  buffer = {};
}

}  // namespace sluice::backend::vulkan
