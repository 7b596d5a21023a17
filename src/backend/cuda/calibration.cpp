// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/calibration.hpp"

#include <algorithm>
#include <utility>

#include "base/check.hpp"

namespace sluice::backend::cuda {

Result<std::unique_ptr<CudaCalibration>> CudaCalibration::open(Pass pass) {
  std::unique_ptr<CudaCalibration> self(new CudaCalibration(std::move(pass)));
  SLUICE_TRY_ASSIGN(cublas, Cublas::open(self->pass_.stream, nullptr, 0));
  SLUICE_TRY_ASSIGN(cusolver, Cusolver::open(self->pass_.stream));
  self->cublas_ = std::move(cublas);
  self->cusolver_ = std::move(cusolver);
  return self;
}

Result<uint32_t> CudaCalibration::create_sum(uint32_t cols) {
  SLUICE_TRY_ASSIGN(sum, DeviceArray<float>::create(size_t{cols} * cols));
  SLUICE_TRY(pass_.check(cudaMemsetAsync(sum.data(), 0, sum.bytes(), pass_.stream), "clearing second moments"));
  sums_.push_back(std::move(sum));
  return static_cast<uint32_t>(sums_.size() - 1);
}

Status CudaCalibration::add(uint32_t sum, Slot slot) {
  const MatmulInput in = pass_.input(slot);
  const uint32_t rows = pass_.rows();
  SLUICE_CHECK(in.x != nullptr && sum < sums_.size() && sums_[sum].size() == size_t{in.cols} * in.cols && rows > 0);
  SLUICE_TRY(pass_.flush());
  SLUICE_TRY_ASSIGN(scaled, has_scales(in, rows));
  if (scaled) return add_scaled(slot, in, rows, sums_[sum].data());
  if (cublas_->add_gram(in.x, true, rows, in.cols, in.ldx, sums_[sum].data())) return {};
  return fail(ErrorCode::device, "cuBLAS cannot multiply activations");
}

Result<bool> CudaCalibration::has_scales(const MatmulInput& in, uint32_t rows) {
  if (in.row_scale == nullptr) return false;
  std::vector<float> scales(rows);
  SLUICE_TRY(pass_.check(cudaMemcpyAsync(scales.data(), in.row_scale, rows * sizeof(float), cudaMemcpyDeviceToHost,
                                         pass_.stream), "reading activations"));
  SLUICE_TRY(pass_.check(cudaStreamSynchronize(pass_.stream), "reading activations"));
  return std::any_of(scales.begin(), scales.end(), [](float scale) { return scale != 1.0f; });
}

// Rows beyond FP16: rare, and large enough that they go as FP32, by way of the host.
Status CudaCalibration::add_scaled(Slot slot, const MatmulInput& in, uint32_t rows, float* sum) {
  std::vector<float> values(size_t{rows} * in.cols);
  SLUICE_TRY(pass_.read_slot(slot, values));
  SLUICE_TRY_ASSIGN(copy, DeviceArray<float>::create(values.size()));
  SLUICE_TRY(pass_.check(cudaMemcpyAsync(copy.data(), values.data(), copy.bytes(), cudaMemcpyHostToDevice, pass_.stream),
                         "writing activations"));
  if (!cublas_->add_gram(copy.data(), false, rows, in.cols, in.cols, sum)) {
    return fail(ErrorCode::device, "cuBLAS cannot multiply activations");
  }
  return pass_.check(cudaStreamSynchronize(pass_.stream), "multiplying activations");
}

Status CudaCalibration::take(uint32_t sum, std::span<float> out) {
  SLUICE_CHECK(sum < sums_.size() && out.size() == sums_[sum].size());
  SLUICE_TRY(pass_.check(cudaMemcpyAsync(out.data(), sums_[sum].data(), out.size_bytes(), cudaMemcpyDeviceToHost,
                                         pass_.stream), "reading second moments"));
  SLUICE_TRY(pass_.check(cudaStreamSynchronize(pass_.stream), "reading second moments"));
  sums_[sum] = {};
  return {};
}

Result<bool> CudaCalibration::invert_factor(std::span<float> matrix, uint32_t n) {
  SLUICE_CHECK(matrix.size() == size_t{n} * n);
  SLUICE_TRY_ASSIGN(factor, DeviceArray<float>::create(matrix.size()));
  SLUICE_TRY_ASSIGN(inverse, DeviceArray<float>::create(matrix.size()));
  SLUICE_TRY(pass_.check(cudaMemcpyAsync(factor.data(), matrix.data(), factor.bytes(), cudaMemcpyHostToDevice,
                                         pass_.stream), "writing second moments"));
  SLUICE_TRY_ASSIGN(positive, cusolver_->factor(factor.data(), n));
  if (!positive) return false;
  // The identity: a column of ones whose pitch is a row and an element.
  const std::vector<float> ones(n, 1.0f);
  const size_t elem = sizeof(float);
  SLUICE_TRY(pass_.check(cudaMemsetAsync(inverse.data(), 0, inverse.bytes(), pass_.stream), "clearing a matrix"));
  SLUICE_TRY(pass_.check(cudaMemcpy2DAsync(inverse.data(), (size_t{n} + 1) * elem, ones.data(), elem, elem, n,
                                           cudaMemcpyHostToDevice, pass_.stream), "writing an identity"));
  if (!cublas_->solve_lower(factor.data(), inverse.data(), n)) {
    return fail(ErrorCode::device, "cuBLAS cannot invert a factor");
  }
  SLUICE_TRY(pass_.check(cudaMemcpyAsync(matrix.data(), inverse.data(), matrix.size_bytes(), cudaMemcpyDeviceToHost,
                                         pass_.stream), "reading a factor"));
  SLUICE_TRY(pass_.check(cudaStreamSynchronize(pass_.stream), "inverting a factor"));
  return true;
}

}  // namespace sluice::backend::cuda
