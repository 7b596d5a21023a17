// SPDX-License-Identifier: Apache-2.0
// In place of the Vulkan backend, where the build has none.
#include "backend/backend.hpp"
#include "backend/vulkan/devices.hpp"

namespace sluice::backend {

namespace {

constexpr const char* kAbsent = "this build has no Vulkan backend; configure it where glslc and the Vulkan headers are "
                                "installed (Debian: glslc, libvulkan-dev)";

}  // namespace

bool has_vulkan_backend() { return false; }

Result<std::unique_ptr<Backend>> make_vulkan_backend(const VulkanOptions&) { return fail(ErrorCode::not_found, kAbsent); }

Result<std::vector<vulkan::DeviceReport>> vulkan::list_devices(const DeviceChoice&) {
  return fail(ErrorCode::not_found, kAbsent);
}

Result<vulkan::Rates> vulkan::measure_rates(const DeviceChoice&) { return fail(ErrorCode::not_found, kAbsent); }

}  // namespace sluice::backend
