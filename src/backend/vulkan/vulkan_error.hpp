// SPDX-License-Identifier: Apache-2.0
// VkResult as Sluice's errors, mapped here and nowhere else.
#pragma once

#include <string>

#include "backend/vulkan/functions.hpp"
#include "sluice/result.hpp"

namespace sluice::backend::vulkan {

// `what` says what was being done: "NVIDIA H200: submitting a pass". Codes: out_of_memory, not_found (no driver, no
// device, features it lacks), device (everything else).
Error error_of(VkResult code, const std::string& what);

// False for refusals after which the device goes on working.
bool is_sticky(VkResult code);

}  // namespace sluice::backend::vulkan
