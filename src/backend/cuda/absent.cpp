// SPDX-License-Identifier: Apache-2.0
// In place of the CUDA backend, where the build has none.
#include "backend/backend.hpp"
#include "backend/cuda/kernel_bench.hpp"
#include "backend/cuda/rates.hpp"

namespace sluice::backend {

namespace {

Unexpected absent() {
  return fail(ErrorCode::not_found, "this build has no CUDA backend; configure it with -Dcuda=enabled (needs nvcc)");
}

}  // namespace

bool has_cuda_backend() { return false; }

Result<std::unique_ptr<Backend>> make_cuda_backend(const CudaOptions&) { return absent(); }

namespace cuda {

Result<Rates> measure_rates(int, RateDetail) { return absent(); }

Result<std::unique_ptr<KernelBench>> KernelBench::open(int, const std::vector<BenchShape>&,
                                                       const std::vector<uint32_t>&) {
  return absent();
}

}  // namespace cuda
}  // namespace sluice::backend
