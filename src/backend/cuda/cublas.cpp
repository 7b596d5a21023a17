// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/cublas.hpp"

#include <fmt/format.h>

#include "backend/cuda/loaded_library.hpp"

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
  }

  Status load(cudaStream_t stream, void* workspace, uint64_t workspace_bytes) {
    SLUICE_TRY_ASSIGN(library, LoadedLibrary::open(fmt::format("libcublas.so.{}", CUBLAS_VER_MAJOR)));
    library_ = std::move(library);
    decltype(&::cublasCreate_v2) create = nullptr;
    decltype(&::cublasSetStream_v2) set_stream = nullptr;
    decltype(&::cublasSetWorkspace_v2) set_workspace = nullptr;
    decltype(&::cublasGetVersion_v2) get_version = nullptr;
    SLUICE_TRY(library_.find(create, "cublasCreate_v2"));
    SLUICE_TRY(library_.find(destroy_, "cublasDestroy_v2"));
    SLUICE_TRY(library_.find(gemm_, "cublasGemmEx"));
    SLUICE_TRY(library_.find(strsm_, "cublasStrsm_v2"));
    SLUICE_TRY(library_.find(set_stream, "cublasSetStream_v2"));
    SLUICE_TRY(library_.find(set_workspace, "cublasSetWorkspace_v2"));
    SLUICE_TRY(library_.find(get_version, "cublasGetVersion_v2"));
    if (create(&handle_) != CUBLAS_STATUS_SUCCESS) {
      handle_ = nullptr;
      return fail(ErrorCode::not_found, "cuBLAS does not start on this GPU");
    }
    if (set_stream(handle_, stream) != CUBLAS_STATUS_SUCCESS ||
        (workspace != nullptr && set_workspace(handle_, workspace, workspace_bytes) != CUBLAS_STATUS_SUCCESS) ||
        get_version(handle_, &version_) != CUBLAS_STATUS_SUCCESS) {
      return fail(ErrorCode::not_found, "cuBLAS refuses a stream or workspace");
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

  // x^T [ldx][rows], column-major.
  bool add_gram(const void* x, bool is_half, uint32_t rows, uint32_t cols, uint32_t ldx, float* sum) override {
    const float one = 1;
    const int n = static_cast<int>(cols), k = static_cast<int>(rows), ld = static_cast<int>(ldx);
    const cudaDataType type = is_half ? CUDA_R_16F : CUDA_R_32F;
    return gemm_(handle_, CUBLAS_OP_N, CUBLAS_OP_T, n, n, k, &one, x, type, ld, x, type, ld, &one, sum, CUDA_R_32F, n,
                 CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
  }

  // Row-major, A X = B; column-major, X^T A^T = B^T with A^T upper triangular.
  bool solve_lower(const float* lower, float* right, uint32_t n) override {
    const float one = 1;
    const int size = static_cast<int>(n);
    return strsm_(handle_, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, size, size,
                  &one, lower, size, right, size) == CUBLAS_STATUS_SUCCESS;
  }

  std::string version() const override {
    return fmt::format("{}.{}.{}", version_ / 10000, version_ / 100 % 100, version_ % 100);
  }

 private:
  // Written out: the header has a second, inline cublasGemmEx for C++.
  using Gemm = cublasStatus_t(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void* alpha,
                              const void* a, cudaDataType, int lda, const void* b, cudaDataType, int ldb,
                              const void* beta, void* c, cudaDataType, int ldc, cublasComputeType_t, cublasGemmAlgo_t);
  LoadedLibrary library_;
  cublasHandle_t handle_ = nullptr;
  decltype(&::cublasDestroy_v2) destroy_ = nullptr;
  Gemm* gemm_ = nullptr;
  decltype(&::cublasStrsm_v2) strsm_ = nullptr;
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
