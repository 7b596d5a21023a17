// SPDX-License-Identifier: Apache-2.0
// In place of the CUDA backend, where the build has none.
#include "backend/backend.hpp"
#include "backend/cuda/rates.hpp"

namespace sluice::backend {

bool has_cuda_backend() { return false; }

Result<std::unique_ptr<Backend>> make_cuda_backend(const CudaOptions&) {
  return fail(ErrorCode::not_found, "this build has no CUDA backend; configure it with -Dcuda=enabled (needs nvcc)");
}

namespace cuda {

Result<Rates> measure_rates(int, RateDetail) {
  return fail(ErrorCode::not_found, "this build has no CUDA backend; configure it with -Dcuda=enabled (needs nvcc)");
}

}  // namespace cuda
}  // namespace sluice::backend
