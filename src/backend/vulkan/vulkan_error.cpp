// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/vulkan_error.hpp"

#include <fmt/format.h>

namespace sluice::backend::vulkan {

namespace {

constexpr const char* kOrCpu = "; --backend cpu runs without a GPU";

}  // namespace

bool is_sticky(VkResult code) {
  return code != VK_ERROR_OUT_OF_DEVICE_MEMORY && code != VK_ERROR_OUT_OF_HOST_MEMORY &&
         code != VK_ERROR_TOO_MANY_OBJECTS && code != VK_ERROR_INVALID_EXTERNAL_HANDLE;
}

Error error_of(VkResult code, const std::string& what) {
  const int number = static_cast<int>(code);
  switch (code) {
    case VK_ERROR_OUT_OF_DEVICE_MEMORY:
      return {ErrorCode::out_of_memory,
              fmt::format("{}: the device has not enough free memory; lower --device-memory or --context, or end what else "
                          "uses it", what), number};
    case VK_ERROR_OUT_OF_HOST_MEMORY:
      return {ErrorCode::out_of_memory, fmt::format("{}: the machine has not enough free memory", what), number};
    case VK_ERROR_TOO_MANY_OBJECTS:
      return {ErrorCode::out_of_memory, fmt::format("{}: the driver allows no more allocations", what), number};
    case VK_ERROR_INCOMPATIBLE_DRIVER:
      return {ErrorCode::not_found,
              fmt::format("{}: the Vulkan loader finds no driver that works; install the GPU's (see vulkaninfo){}", what,
                          kOrCpu), number};
    case VK_ERROR_INITIALIZATION_FAILED:
      return {ErrorCode::not_found,
              fmt::format("{}: the Vulkan driver does not start; reinstall it, and see vulkaninfo for what it says{}", what,
                          kOrCpu), number};
    case VK_ERROR_LAYER_NOT_PRESENT:
      return {ErrorCode::not_found, fmt::format("{}: a Vulkan layer that VK_INSTANCE_LAYERS names is not installed", what),
              number};
    case VK_ERROR_EXTENSION_NOT_PRESENT:
    case VK_ERROR_FEATURE_NOT_PRESENT:
      return {ErrorCode::not_found, fmt::format("{}: the driver lacks what it said it has; update it{}", what, kOrCpu),
              number};
    case VK_ERROR_DEVICE_LOST:
      return {ErrorCode::device,
              fmt::format("{}: the device was lost: its driver reset it, a kernel ran too long, or it left the bus; open the "
                          "model again, and see dmesg if that fails", what), number};
    default:
      return {ErrorCode::device,
              fmt::format("{}: Vulkan error {}; open the model again, and update the driver if it comes back", what, number),
              number};
  }
}

}  // namespace sluice::backend::vulkan
