// SPDX-License-Identifier: Apache-2.0
// Whether the matrix instructions of a driver do what the shaders take them to do.
#pragma once

#include "backend/vulkan/kernels.hpp"

namespace sluice::backend::vulkan {

// Multiplies a small random INT4 matrix by matrix instructions and without, for few rows of X and for many, and
// compares every output. Leaves `kernels` without them. Milliseconds, most of them for two pipelines. False also where
// the driver cannot make the pipelines. Error: out_of_memory, device.
Result<bool> matrix_variant_agrees(Device& device, Queue& queue, Kernels& kernels);

}  // namespace sluice::backend::vulkan
