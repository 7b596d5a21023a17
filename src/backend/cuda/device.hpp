// SPDX-License-Identifier: Apache-2.0
// A GPU of this machine: chosen, its context created, and what that took measured.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "backend/backend.hpp"
#include "sluice/result.hpp"

namespace sluice::backend::cuda {

struct Device {
  int index = 0;
  std::string name;                   // "NVIDIA H200"
  std::string pci_bus_id;             // "0000:3B:00.0"
  int major = 0, minor = 0;           // compute capability
  int driver = 0;                     // CUDA version the driver supports, 13000 for 13.0
  uint64_t total_bytes = 0;
  uint64_t context_bytes = 0;         // of device memory that the context took
  uint64_t overhead_bytes = 0;        // ... and room for what it grows by: kernels, graphs, whole pages
  bool programmatic_launch = false;   // sm_90 and newer

  // Creates the context. Errors: not_found (no driver, one too old, no such device, no kernels for it), out_of_memory,
  // device.
  static Result<Device> open(int index);

  // Makes the device current in the calling thread.
  void make_current() const { cudaSetDevice(index); }
  uint64_t free_bytes() const;
};

}  // namespace sluice::backend::cuda
