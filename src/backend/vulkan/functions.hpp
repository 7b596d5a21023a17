// SPDX-License-Identifier: Apache-2.0
// Vulkan's functions, found at run time: nothing of Sluice is linked to libvulkan, and a machine without it runs.
//
// Plain pointers in a struct, so that a test can put a function that fails in the place of one.
#pragma once

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan_core.h>

#include <string>

#include "sluice/result.hpp"

// Before there is an instance.
#define SLUICE_VULKAN_GLOBAL(X) \
  X(vkCreateInstance)           \
  X(vkEnumerateInstanceVersion) \
  X(vkEnumerateInstanceLayerProperties)

#define SLUICE_VULKAN_INSTANCE(X)             \
  X(vkDestroyInstance)                        \
  X(vkEnumeratePhysicalDevices)               \
  X(vkEnumerateDeviceExtensionProperties)     \
  X(vkGetPhysicalDeviceProperties2)           \
  X(vkGetPhysicalDeviceFeatures2)             \
  X(vkGetPhysicalDeviceMemoryProperties2)     \
  X(vkGetPhysicalDeviceQueueFamilyProperties) \
  X(vkCreateDevice)                           \
  X(vkGetDeviceProcAddr)

#define SLUICE_VULKAN_DEVICE(X)   \
  X(vkDestroyDevice)              \
  X(vkDeviceWaitIdle)             \
  X(vkGetDeviceQueue)             \
  X(vkQueueSubmit)                \
  X(vkCreateSemaphore)            \
  X(vkDestroySemaphore)           \
  X(vkWaitSemaphores)             \
  X(vkGetSemaphoreCounterValue)   \
  X(vkCreateCommandPool)          \
  X(vkDestroyCommandPool)         \
  X(vkAllocateCommandBuffers)     \
  X(vkFreeCommandBuffers)         \
  X(vkBeginCommandBuffer)         \
  X(vkEndCommandBuffer)           \
  X(vkCmdBindPipeline)            \
  X(vkCmdPushConstants)           \
  X(vkCmdDispatch)                \
  X(vkCmdPipelineBarrier)         \
  X(vkCmdCopyBuffer)              \
  X(vkCmdFillBuffer)              \
  X(vkCmdResetQueryPool)          \
  X(vkCmdWriteTimestamp)          \
  X(vkCreateQueryPool)            \
  X(vkDestroyQueryPool)           \
  X(vkGetQueryPoolResults)        \
  X(vkCreateBuffer)               \
  X(vkDestroyBuffer)              \
  X(vkGetBufferMemoryRequirements) \
  X(vkGetBufferDeviceAddress)     \
  X(vkAllocateMemory)             \
  X(vkFreeMemory)                 \
  X(vkBindBufferMemory)           \
  X(vkMapMemory)                  \
  X(vkCreateShaderModule)         \
  X(vkDestroyShaderModule)        \
  X(vkCreatePipelineLayout)       \
  X(vkDestroyPipelineLayout)      \
  X(vkCreateComputePipelines)     \
  X(vkDestroyPipeline)

// Of extensions that a device may lack: null then. The second list is asked of the instance.
#define SLUICE_VULKAN_OPTIONAL(X) X(vkGetMemoryHostPointerPropertiesEXT)
#define SLUICE_VULKAN_OPTIONAL_INSTANCE(X) X(vkGetPhysicalDeviceCooperativeMatrixPropertiesNV)

namespace sluice::backend::vulkan {

struct Functions {
#define SLUICE_VULKAN_MEMBER(name) PFN_##name name = nullptr;
  SLUICE_VULKAN_GLOBAL(SLUICE_VULKAN_MEMBER)
  SLUICE_VULKAN_INSTANCE(SLUICE_VULKAN_MEMBER)
  SLUICE_VULKAN_DEVICE(SLUICE_VULKAN_MEMBER)
  SLUICE_VULKAN_OPTIONAL(SLUICE_VULKAN_MEMBER)
  SLUICE_VULKAN_OPTIONAL_INSTANCE(SLUICE_VULKAN_MEMBER)
#undef SLUICE_VULKAN_MEMBER
};

// The loader library and what comes out of it, step by step. Closed with the object.
class Loader {
 public:
  // Opens the library and finds the global functions. Error: not_found, naming the package.
  static Result<Loader> open(const char* library, Functions& functions);
  // After vkCreateInstance and vkCreateDevice. Error: not_found, naming the function that the driver lacks.
  Status load_instance(VkInstance instance, Functions& functions) const;
  static Status load_device(VkDevice device, Functions& functions);

  Loader() = default;
  Loader(Loader&& other) noexcept;
  Loader& operator=(Loader&& other) noexcept;
  ~Loader();

 private:
  void* library_ = nullptr;
  PFN_vkGetInstanceProcAddr get_ = nullptr;
};

}  // namespace sluice::backend::vulkan
