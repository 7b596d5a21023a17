// SPDX-License-Identifier: Apache-2.0
// The read ceiling of a device: a kernel that does nothing but read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sluice::cuda {

// Reads `bytes` (a multiple of 16) at `memory` (16-byte aligned) once, on `stream`, and may add up what it read into
// one of `sink[0..1023]`, so that no compiler leaves the reads away. Errors: those of a launch.
cudaError_t read_memory(const void* memory, uint64_t bytes, uint32_t* sink, cudaStream_t stream);

}  // namespace sluice::cuda
