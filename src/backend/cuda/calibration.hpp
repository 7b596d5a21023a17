// SPDX-License-Identifier: Apache-2.0
// Calibration on the GPU by cuBLAS and cuSOLVER: sums stay in device memory, and activations are added from where a pass
// leaves them.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda/cublas.hpp"
#include "backend/cuda/cusolver.hpp"
#include "backend/cuda/device_array.hpp"

namespace sluice::backend::cuda {

// What a matrix product reads: X of cuda/elementwise.hpp.
struct MatmulInput {
  const __half* x = nullptr;            // [rows][ldx]
  const float* row_scale = nullptr;     // [rows], or null: all 1
  uint32_t cols = 0, ldx = 0, copies = 1;   // copies: see RmsNorm
};

class CudaCalibration final : public Calibration {
 public:
  // The backend, as far as it is needed here.
  struct Pass {
    cudaStream_t stream = nullptr;      // its compute queue
    std::function<Status(cudaError_t, const char* what)> check;
    std::function<Status()> flush;
    std::function<MatmulInput(Slot)> input;
    std::function<Status(Slot, std::span<float>)> read_slot;
    std::function<uint32_t()> rows;     // of the pass
  };
  // Error: not_found, if a library is missing.
  static Result<std::unique_ptr<CudaCalibration>> open(Pass pass);

  Result<uint32_t> create_sum(uint32_t cols) override;
  Status add(uint32_t sum, Slot slot) override;
  Status take(uint32_t sum, std::span<float> out) override;
  Result<bool> invert_factor(std::span<float> matrix, uint32_t n) override;

 private:
  explicit CudaCalibration(Pass pass) : pass_(std::move(pass)) {}
  Result<bool> has_scales(const MatmulInput& in, uint32_t rows);
  Status add_scaled(Slot slot, const MatmulInput& in, uint32_t rows, float* sum);

  Pass pass_;
  std::unique_ptr<Cublas> cublas_;
  std::unique_ptr<Cusolver> cusolver_;
  std::vector<DeviceArray<float>> sums_;
};

}  // namespace sluice::backend::cuda
