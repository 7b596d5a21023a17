// SPDX-License-Identifier: Apache-2.0
// FP32 weights, row-major, times FP32 activations: checkpoints that come in FP32 and were imported as they are.
//
//   argument   shape           type    layout
//   values     [N][K]          FP32    row-major
//   in         [M][in_stride]  FP32    row-major, K used
//   out        [M][N]          FP32
//
// Four rows of activations share the loads of a row of weights; a dot product is two vectors of partial sums, then the
// columns that fill no vector.
#include "backend/cpu/simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/matmul_f32.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>

#include "backend/cpu/kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

// The columns [first, cols) that fill no vector, and the result to its place.
HWY_NOINLINE void finish_dot(float sum, const float* w, const float* x, size_t first, const Matrix& m, uint32_t n,
                             uint32_t row, const MatmulOut& out) {
  for (size_t k = first; k < m.cols; ++k) sum += w[k] * x[k];
  sum *= m.scale;
  if (out.vector != nullptr) sum += out.vector[n];
  float& to = out.out[row * out.stride + n];
  to = out.accumulate ? to + sum : sum;
}

template <size_t MR>
HWY_INLINE void dot(const Matrix& m, uint32_t n, const float* in, size_t in_stride, uint32_t row,
                    const MatmulOut& out) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  const float* w = reinterpret_cast<const float*>(m.values) + uint64_t{n} * m.cols;
  const float* x = in + row * in_stride;
  hn::Vec<decltype(d)> even[MR], odd[MR];
  for (size_t r = 0; r < MR; ++r) even[r] = odd[r] = hn::Zero(d);
  size_t k = 0;
  for (; k + 2 * lanes <= m.cols; k += 2 * lanes) {
    const auto w0 = hn::LoadU(d, w + k), w1 = hn::LoadU(d, w + k + lanes);
    for (size_t r = 0; r < MR; ++r) {
      even[r] = hn::MulAdd(w0, hn::LoadU(d, x + r * in_stride + k), even[r]);
      odd[r] = hn::MulAdd(w1, hn::LoadU(d, x + r * in_stride + k + lanes), odd[r]);
    }
  }
  for (size_t r = 0; r < MR; ++r) {
    const float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(even[r], odd[r])));
    finish_dot(sum, w, x + r * in_stride, k, m, n, static_cast<uint32_t>(row + r), out);
  }
}

}  // namespace

void F32F32(const Matrix& m, const float* in, size_t in_stride, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
            const MatmulOut& out) {
  const uint32_t last = std::min(m.rows, last_tile * kTileRows);
  for (uint32_t n = first_tile * kTileRows; n < last; ++n) {
    uint32_t r = 0;
    for (; r + 4 <= rows; r += 4) dot<4>(m, n, in, in_stride, r, out);
    for (; r < rows; ++r) dot<1>(m, n, in, in_stride, r, out);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::backend::cpu {
HWY_EXPORT(F32F32);

void matmul_f32_f32(const Matrix& matrix, const float* in, size_t in_stride, uint32_t rows, uint32_t first_tile,
                    uint32_t last_tile, const MatmulOut& out) {
  HWY_DYNAMIC_DISPATCH(F32F32)(matrix, in, in_stride, rows, first_tile, last_tile, out);
}
}  // namespace sluice::backend::cpu
#endif
