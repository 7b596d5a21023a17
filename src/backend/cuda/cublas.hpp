// SPDX-License-Identifier: Apache-2.0
// cuBLAS as a yardstick for `sluice bench --kernels`, opened at run time where it is: nothing else uses it, and nothing
// links to it. A build without its header has none.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "sluice/result.hpp"

namespace sluice::backend::cuda {

class Cublas {
 public:
  virtual ~Cublas() = default;

  // Opens the library and creates its handle for the current device; its work goes to `stream`, its workspace (64
  // MiB) is `workspace`, which a captured graph needs. Error: not_found, with the reason.
  static Result<std::unique_ptr<Cublas>> open(cudaStream_t stream, void* workspace, uint64_t workspace_bytes);

  // out = x * weights^T with FP32 sums. All FP16, row-major: x [rows][cols], weights [outputs][cols], out
  // [rows][outputs]. Enqueues; false if cuBLAS refused.
  virtual bool multiply(const void* x, const void* weights, void* out, uint32_t rows, uint32_t outputs,
                        uint32_t cols) = 0;
  virtual std::string version() const = 0;   // "13.1.0"
};

}  // namespace sluice::backend::cuda
