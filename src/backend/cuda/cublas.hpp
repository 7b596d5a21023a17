// SPDX-License-Identifier: Apache-2.0
// cuBLAS, opened at run time where it is: the yardstick of `sluice bench --kernels`, and calibration's large products.
// Nothing links to it. A build without its header has none.
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

  // Opens the library and creates its handle for the current device; its work goes to `stream`. `workspace`, 64 MiB, is
  // what a captured graph needs; null: cuBLAS allocates its own. Error: not_found, with the reason.
  static Result<std::unique_ptr<Cublas>> open(cudaStream_t stream, void* workspace, uint64_t workspace_bytes);

  // All matrices are row-major. Each enqueues, and is false if cuBLAS refused.
  // out = x * weights^T with FP32 sums. FP16: x [rows][cols], weights [outputs][cols], out [rows][outputs].
  virtual bool multiply(const void* x, const void* weights, void* out, uint32_t rows, uint32_t outputs,
                        uint32_t cols) = 0;
  // sum += x^T x. x: [rows][ldx], of which `cols` count, FP16 or FP32; sum: FP32 [cols][cols].
  virtual bool add_gram(const void* x, bool is_half, uint32_t rows, uint32_t cols, uint32_t ldx, float* sum) = 0;
  // right = inverse(lower) * right. FP32 [n][n]; `right` is lower triangular, and stays so.
  virtual bool solve_lower(const float* lower, float* right, uint32_t n) = 0;
  virtual std::string version() const = 0;   // "13.1.0"
};

}  // namespace sluice::backend::cuda
