// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/cublas.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#if __has_include(<cublas_v2.h>)
#include <cublas_v2.h>
#endif

namespace sluice::backend::cuda {

#ifdef CUBLAS_VER_MAJOR

namespace {

class LoadedCublas final : public Cublas {
 public:
  ~LoadedCublas() override {
    if (handle_ != nullptr) destroy_(handle_);
    if (library_ != nullptr) ::dlclose(library_);
  }

  Status load(cudaStream_t stream, void* workspace, uint64_t workspace_bytes) {
    const std::string name = fmt::format("libcublas.so.{}", CUBLAS_VER_MAJOR);
    library_ = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) {
      return fail(ErrorCode::not_found, fmt::format("cuBLAS cannot be opened: {}; LD_LIBRARY_PATH says where it is",
                                                    ::dlerror()));
    }
    decltype(&::cublasCreate_v2) create = nullptr;
    decltype(&::cublasSetStream_v2) set_stream = nullptr;
    decltype(&::cublasSetWorkspace_v2) set_workspace = nullptr;
    decltype(&::cublasGetVersion_v2) get_version = nullptr;
    if (!find(create, "cublasCreate_v2") || !find(destroy_, "cublasDestroy_v2") || !find(gemm_, "cublasGemmEx") ||
        !find(set_stream, "cublasSetStream_v2") || !find(set_workspace, "cublasSetWorkspace_v2") ||
        !find(get_version, "cublasGetVersion_v2")) {
      return fail(ErrorCode::not_found, fmt::format("{} lacks what its header declares: {}", name, ::dlerror()));
    }
    if (create(&handle_) != CUBLAS_STATUS_SUCCESS) {
      handle_ = nullptr;
      return fail(ErrorCode::not_found, fmt::format("{} does not start on this GPU", name));
    }
    if (set_stream(handle_, stream) != CUBLAS_STATUS_SUCCESS ||
        set_workspace(handle_, workspace, workspace_bytes) != CUBLAS_STATUS_SUCCESS ||
        get_version(handle_, &version_) != CUBLAS_STATUS_SUCCESS) {
      return fail(ErrorCode::not_found, fmt::format("{} refuses a stream or workspace", name));
    }
    return {};
  }

  // Column-major, as cuBLAS thinks: out^T [outputs][rows] = weights [outputs][cols] * x^T [cols][rows].
  bool multiply(const void* x, const void* weights, void* out, uint32_t rows, uint32_t outputs,
                uint32_t cols) override {
    const float one = 1, zero = 0;
    const int m = static_cast<int>(outputs), n = static_cast<int>(rows), k = static_cast<int>(cols);
    return gemm_(handle_, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &one, weights, CUDA_R_16F, k, x, CUDA_R_16F, k, &zero, out,
                 CUDA_R_16F, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
  }

  std::string version() const override {
    return fmt::format("{}.{}.{}", version_ / 10000, version_ / 100 % 100, version_ % 100);
  }

 private:
  template <class Function>
  bool find(Function*& function, const char* symbol) const {
    function = reinterpret_cast<Function*>(::dlsym(library_, symbol));
    return function != nullptr;
  }

  // Written out: the header has a second, inline cublasGemmEx for C++.
  using Gemm = cublasStatus_t(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void* alpha,
                              const void* a, cudaDataType, int lda, const void* b, cudaDataType, int ldb,
                              const void* beta, void* c, cudaDataType, int ldc, cublasComputeType_t, cublasGemmAlgo_t);
  void* library_ = nullptr;
  cublasHandle_t handle_ = nullptr;
  decltype(&::cublasDestroy_v2) destroy_ = nullptr;
  Gemm* gemm_ = nullptr;
  int version_ = 0;
};

}  // namespace

Result<std::unique_ptr<Cublas>> Cublas::open(cudaStream_t stream, void* workspace, uint64_t workspace_bytes) {
  auto cublas = std::make_unique<LoadedCublas>();
  SLUICE_TRY(cublas->load(stream, workspace, workspace_bytes));
  return std::unique_ptr<Cublas>(std::move(cublas));
}

#else

Result<std::unique_ptr<Cublas>> Cublas::open(cudaStream_t, void*, uint64_t) {
  return fail(ErrorCode::not_found, "this build has no cuBLAS: its header (cublas_v2.h) was not there");
}

#endif

}  // namespace sluice::backend::cuda
