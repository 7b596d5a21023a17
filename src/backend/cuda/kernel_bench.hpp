// SPDX-License-Identifier: Apache-2.0
// Times the matmul kernels as a pass launches them, with weights that no cache holds, next to what the memory of the
// card delivers in the same minute and to cuBLAS with FP16 weights.
//
// A figure is the median of replays of a graph that holds launches back to back (with programmatic dependent launch
// where the device has it), each on another copy of the weights, the copies together several times the L2 cache.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::backend::cuda {

// The matrices of one call: same input, at most three.
struct BenchShape {
  struct Matrix {
    storage::Scheme scheme = storage::Scheme::int4;
    uint32_t rows = 0;                // outputs
    uint32_t group_elems = 0;
    bool has_zeros = false, has_bias = false;
    bool operator==(const Matrix&) const = default;
  };
  std::string name;                   // "q, k, v"
  uint32_t cols = 0;                  // inputs
  bool reads_norm = false;            // whose result a pass has several copies of while it decodes
  std::vector<Matrix> matrices;
  bool operator==(const BenchShape&) const = default;

  uint32_t outputs() const {
    uint32_t sum = 0;
    for (const Matrix& matrix : matrices) sum += matrix.rows;
    return sum;
  }
};

struct BenchTime {
  double seconds = 0;                 // of one call
  double cublas_seconds = 0;          // 0: no cuBLAS, or its weights do not fit
};

class KernelBench {
 public:
  virtual ~KernelBench() = default;

  // For calls of `shapes` with one of `row_counts` activations. Takes what the largest of them needs of GPU `device`'s
  // memory, FP16 weights included where a third of the free memory holds them. Errors: those of make_cuda_backend;
  // out_of_memory.
  static Result<std::unique_ptr<KernelBench>> open(int device, const std::vector<BenchShape>& shapes,
                                                   const std::vector<uint32_t>& row_counts);

  virtual std::string device_name() const = 0;
  virtual std::string cublas() const = 0;              // its version, or why there is none
  virtual Result<double> read_rate() = 0;              // of device memory, bytes a second
  // Errors: device.
  virtual Result<BenchTime> time(const BenchShape& shape, uint32_t rows) = 0;
};

}  // namespace sluice::backend::cuda
