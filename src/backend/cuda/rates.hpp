// SPDX-License-Identifier: Apache-2.0
// What a GPU's memory and bus can do, measured: the ceilings that plans and benchmarks are held against.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/result.hpp"

namespace sluice::backend::cuda {

struct Rates {
  std::string device;                 // "NVIDIA H200"
  int major = 0, minor = 0;           // compute capability
  int driver = 0;                     // CUDA version the driver supports, 13000 for 13.0
  uint64_t total_bytes = 0, free_bytes = 0;
  double read = 0;                    // device memory read by a kernel, bytes a second
  struct Copy {
    uint64_t chunk_bytes = 0;
    double rate = 0;                  // pinned host memory to the device, bytes a second
  };
  std::vector<Copy> copies;           // by chunk size, ascending
  double copy_beside_read = 0;        // the largest chunk's rate while a kernel reads all the time
  double read_beside_copy = 0;        // ... and the kernel's

  double bus() const { return copies.empty() ? 0 : copies.back().rate; }
};

enum class RateDetail { bandwidths, all };   // `bandwidths`: `read` and the largest chunk only

// Opens GPU `index` for a second or so. Errors: those of make_cuda_backend; out_of_memory.
Result<Rates> measure_rates(int index, RateDetail detail);

}  // namespace sluice::backend::cuda
