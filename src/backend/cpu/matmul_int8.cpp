// SPDX-License-Identifier: Apache-2.0
// INT8 weights (tile16x64, 1024 B a tile) times INT8 or FP32 activations. Arguments as in matmul_int4.cpp, value q * s.
#include "backend/cpu/simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/matmul_int8.cpp"
#include <hwy/foreach_target.h>

#include "backend/cpu/tile64-inl.hpp"

HWY_BEFORE_NAMESPACE();
#if SLUICE_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")
#endif
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {

void Int8Int8(const Matrix& m, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
              const MatmulOut& out, float* accumulators) {
  matmul_int8_acts<Int8, Decode::offset128>(m, acts, rows, first_tile, last_tile, out, accumulators);
}

void Int8F32(const Matrix& m, const float* acts, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
             const MatmulOut& out, float* accumulators) {
  matmul_f32_acts<Int8, Decode::offset128>(m, acts, rows, first_tile, last_tile, out, accumulators);
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::backend::cpu {
HWY_EXPORT(Int8Int8);
HWY_EXPORT(Int8F32);

void matmul_int8_int8(const Matrix& matrix, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile,
                      uint32_t last_tile, const MatmulOut& out, float* accumulators) {
  HWY_DYNAMIC_DISPATCH(Int8Int8)(matrix, acts, rows, first_tile, last_tile, out, accumulators);
}
void matmul_int8_f32(const Matrix& matrix, const float* spread64, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
                     const MatmulOut& out, float* accumulators) {
  HWY_DYNAMIC_DISPATCH(Int8F32)(matrix, spread64, rows, first_tile, last_tile, out, accumulators);
}
}  // namespace sluice::backend::cpu
#endif
