// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/cusolver.hpp"

#include <fmt/format.h>

#include "backend/cuda/cuda_error.hpp"
#include "backend/cuda/device_array.hpp"
#include "backend/cuda/loaded_library.hpp"

#if __has_include(<cusolverDn.h>)
#include <cusolverDn.h>
#endif

namespace sluice::backend::cuda {

#ifdef CUSOLVER_VER_MAJOR

namespace {

class LoadedCusolver final : public Cusolver {
 public:
  ~LoadedCusolver() override {
    if (handle_ != nullptr) destroy_(handle_);
  }

  Status load(cudaStream_t stream) {
    // 12 in CUDA 13: the library's own count.
    SLUICE_TRY_ASSIGN(library, LoadedLibrary::open(fmt::format("libcusolver.so.{}", CUSOLVER_VER_MAJOR)));
    library_ = std::move(library);
    decltype(&::cusolverDnCreate) create = nullptr;
    decltype(&::cusolverDnSetStream) set_stream = nullptr;
    SLUICE_TRY(library_.find(create, "cusolverDnCreate"));
    SLUICE_TRY(library_.find(destroy_, "cusolverDnDestroy"));
    SLUICE_TRY(library_.find(set_stream, "cusolverDnSetStream"));
    SLUICE_TRY(library_.find(workspace_elems_, "cusolverDnSpotrf_bufferSize"));
    SLUICE_TRY(library_.find(potrf_, "cusolverDnSpotrf"));
    if (create(&handle_) != CUSOLVER_STATUS_SUCCESS) {
      handle_ = nullptr;
      return fail(ErrorCode::not_found, "cuSOLVER does not start on this GPU");
    }
    if (set_stream(handle_, stream) != CUSOLVER_STATUS_SUCCESS) {
      return fail(ErrorCode::not_found, "cuSOLVER refuses a stream");
    }
    stream_ = stream;
    return {};
  }

  // Row-major lower is column-major upper, as cuSOLVER thinks.
  Result<bool> factor(float* matrix, uint32_t n) override {
    const int size = static_cast<int>(n);
    int elems = 0;
    if (workspace_elems_(handle_, CUBLAS_FILL_MODE_UPPER, size, matrix, size, &elems) != CUSOLVER_STATUS_SUCCESS) {
      return fail(ErrorCode::device, fmt::format("cuSOLVER refuses to factor a matrix of {} columns", n));
    }
    SLUICE_TRY_ASSIGN(workspace, DeviceArray<float>::create(static_cast<size_t>(elems)));
    SLUICE_TRY_ASSIGN(info, DeviceArray<int>::create(1));
    if (potrf_(handle_, CUBLAS_FILL_MODE_UPPER, size, matrix, size, workspace.data(), elems, info.data()) !=
        CUSOLVER_STATUS_SUCCESS) {
      return fail(ErrorCode::device, fmt::format("cuSOLVER cannot factor a matrix of {} columns", n));
    }
    int first_bad = 0;   // of a leading minor that is not positive definite
    cudaError_t code = cudaMemcpyAsync(&first_bad, info.data(), sizeof first_bad, cudaMemcpyDeviceToHost, stream_);
    if (code == cudaSuccess) code = cudaStreamSynchronize(stream_);
    if (code != cudaSuccess) return fail(error_of(code, "factoring a matrix"));
    return first_bad == 0;
  }

 private:
  LoadedLibrary library_;
  cusolverDnHandle_t handle_ = nullptr;
  cudaStream_t stream_ = nullptr;
  decltype(&::cusolverDnDestroy) destroy_ = nullptr;
  decltype(&::cusolverDnSpotrf_bufferSize) workspace_elems_ = nullptr;
  decltype(&::cusolverDnSpotrf) potrf_ = nullptr;
};

}  // namespace

Result<std::unique_ptr<Cusolver>> Cusolver::open(cudaStream_t stream) {
  auto cusolver = std::make_unique<LoadedCusolver>();
  SLUICE_TRY(cusolver->load(stream));
  return std::unique_ptr<Cusolver>(std::move(cusolver));
}

#else

Result<std::unique_ptr<Cusolver>> Cusolver::open(cudaStream_t) {
  return fail(ErrorCode::not_found, "this build has no cuSOLVER: its header (cusolverDn.h) was not there");
}

#endif

}  // namespace sluice::backend::cuda
