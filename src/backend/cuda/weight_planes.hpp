// SPDX-License-Identifier: Apache-2.0
// A weight of the container as the matmul kernels take it: its format, and the bytes of its planes (docs/container.md).
#pragma once

#include <cstdint>

#include "base/units.hpp"
#include "cuda/matmul.hpp"
#include "storage/manifest.hpp"

namespace sluice::backend::cuda {

inline sluice::cuda::WeightFormat format_of(storage::Scheme scheme) {
  using sluice::cuda::WeightFormat;
  switch (scheme) {
    case storage::Scheme::int4: return WeightFormat::int4;
    case storage::Scheme::int8: return WeightFormat::int8;
    case storage::Scheme::f16: return WeightFormat::f16;
    case storage::Scheme::bf16: return WeightFormat::bf16;
    case storage::Scheme::f32: return WeightFormat::f32;
  }
  return WeightFormat::f32;
}

inline uint64_t value_bytes(storage::Scheme scheme, uint32_t rows, uint32_t cols) {
  const uint64_t tiles = ceil_div(rows, 16);
  switch (scheme) {
    case storage::Scheme::int4: return tiles * ceil_div(cols, 64) * 512;
    case storage::Scheme::int8: return tiles * ceil_div(cols, 64) * 1024;
    case storage::Scheme::f16:
    case storage::Scheme::bf16: return tiles * ceil_div(cols, 16) * 512;
    case storage::Scheme::f32: return uint64_t{rows} * cols * sizeof(float);
  }
  return 0;
}

// Entries of `scales`, `zeros` and `bias`, each; 0 without groups.
inline uint64_t parameter_count(uint32_t rows, uint32_t cols, uint32_t group_elems) {
  return group_elems == 0 ? 0 : ceil_div(rows, 16) * ceil_div(cols, group_elems) * 16;
}

}  // namespace sluice::backend::cuda
