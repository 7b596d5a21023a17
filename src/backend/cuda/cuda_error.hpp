// SPDX-License-Identifier: Apache-2.0
// cudaError_t as Sluice's errors, mapped here and nowhere else.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "sluice/result.hpp"

namespace sluice::backend::cuda {

// What an error is to be understood by.
struct Surroundings {
  int driver = 0;                     // CUDA version that the driver supports, 13000 for 13.0; 0: there is none
  int runtime = 0;                    // ... that this build was made with
  std::string architecture;           // of the current device: "sm_90"

  static Surroundings of_this_process();
};

// `what` says what was being done: "copying 4.00 MiB to the device". Codes: out_of_memory, not_found (no driver, no
// device, no kernels for it), device (everything else).
Error error_of(cudaError_t code, const std::string& what);
Error error_of(cudaError_t code, const std::string& what, const Surroundings& around);

// False for refusals after which the context goes on working: out of memory, a pointer that cannot be registered.
bool is_sticky(cudaError_t code);

}  // namespace sluice::backend::cuda
