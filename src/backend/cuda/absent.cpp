// SPDX-License-Identifier: Apache-2.0
// In place of the CUDA backend, where the build has none.
#include "backend/backend.hpp"
#include "backend/cuda/rates.hpp"

namespace sluice::backend {

Result<std::unique_ptr<Backend>> make_cuda_backend(const CudaOptions&) {
  return fail(ErrorCode::not_found, "this build has no CUDA backend: nvcc was not there (-Dcuda=enabled says why)");
}

namespace cuda {

Result<Rates> measure_rates(int, RateDetail) {
  return fail(ErrorCode::not_found, "this build has no CUDA backend: nvcc was not there (-Dcuda=enabled says why)");
}

}  // namespace cuda
}  // namespace sluice::backend
