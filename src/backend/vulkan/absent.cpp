// SPDX-License-Identifier: Apache-2.0
// In place of the Vulkan backend, where the build has none.
#include "backend/backend.hpp"

namespace sluice::backend {

bool has_vulkan_backend() { return false; }

Result<std::unique_ptr<Backend>> make_vulkan_backend(const VulkanOptions&) {
  return fail(ErrorCode::not_found, "this build has no Vulkan backend; configure it where glslc and the Vulkan headers are "
                                    "installed (Debian: glslc, libvulkan-dev)");
}

}  // namespace sluice::backend
