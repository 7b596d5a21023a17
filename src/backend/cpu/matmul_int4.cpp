// SPDX-License-Identifier: Apache-2.0
// INT4 weights (tile16x64) times INT8 or FP32 activations.
//
//   argument      shape                              type            layout
//   values        [ceil(N/16)][ceil(K/64)] tiles     u4, 512 B       storage/tile.hpp
//   scales, bias  [ceil(N/16)][ceil(K/group)][16]    FP16
//   zeros         the same                           u8
//   acts          [ceil(K/64)][M]                    QuantizedBlock or 128 floats (kernels.hpp)
//   out           [M][N]                             FP32
//
// Value: (q - 8) * s, (q - z) * s or q * s + b. How a tile is unpacked: tile64-inl.hpp.
#include "backend/cpu/simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/matmul_int4.cpp"
#include <hwy/foreach_target.h>

#include "backend/cpu/tile64-inl.hpp"

HWY_BEFORE_NAMESPACE();
#if SLUICE_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")
#endif
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {

void Int4Int8(const Matrix& m, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
              const MatmulOut& out, float* accumulators) {
  if (m.zeros != nullptr) {
    matmul_int8_acts<Int4, Decode::zeros>(m, acts, rows, first_tile, last_tile, out, accumulators);
  } else if (m.bias != nullptr) {
    matmul_int8_acts<Int4, Decode::bias>(m, acts, rows, first_tile, last_tile, out, accumulators);
  } else {
    matmul_int8_acts<Int4, Decode::offset8>(m, acts, rows, first_tile, last_tile, out, accumulators);
  }
}

void Int4F32(const Matrix& m, const float* acts, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
             const MatmulOut& out, float* accumulators) {
  if (m.zeros != nullptr) {
    matmul_f32_acts<Int4, Decode::zeros>(m, acts, rows, first_tile, last_tile, out, accumulators);
  } else if (m.bias != nullptr) {
    matmul_f32_acts<Int4, Decode::bias>(m, acts, rows, first_tile, last_tile, out, accumulators);
  } else {
    matmul_f32_acts<Int4, Decode::offset8>(m, acts, rows, first_tile, last_tile, out, accumulators);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::backend::cpu {
HWY_EXPORT(Int4Int8);
HWY_EXPORT(Int4F32);

void matmul_int4_int8(const Matrix& matrix, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile,
                      uint32_t last_tile, const MatmulOut& out, float* accumulators) {
  HWY_DYNAMIC_DISPATCH(Int4Int8)(matrix, acts, rows, first_tile, last_tile, out, accumulators);
}
void matmul_int4_f32(const Matrix& matrix, const float* spread64, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
                     const MatmulOut& out, float* accumulators) {
  HWY_DYNAMIC_DISPATCH(Int4F32)(matrix, spread64, rows, first_tile, last_tile, out, accumulators);
}
}  // namespace sluice::backend::cpu
#endif
