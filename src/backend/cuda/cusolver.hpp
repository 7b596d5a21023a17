// SPDX-License-Identifier: Apache-2.0
// cuSOLVER's Cholesky factorization for calibration, opened at run time where it is; nothing links to it. A build
// without its header has none.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "sluice/result.hpp"

namespace sluice::backend::cuda {

class Cusolver {
 public:
  virtual ~Cusolver() = default;

  // Opens the library and creates its handle for the current device; its work goes to `stream`. Error: not_found, with
  // the reason.
  static Result<std::unique_ptr<Cusolver>> open(cudaStream_t stream);

  // Replaces the lower triangle of a symmetric FP32 matrix [n][n], row-major in device memory and of which it is all
  // that is read, by L with L L^T = matrix. Waits. False: it is not positive definite. Errors: out_of_memory, device.
  virtual Result<bool> factor(float* matrix, uint32_t n) = 0;
};

}  // namespace sluice::backend::cuda
