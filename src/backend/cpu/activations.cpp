// SPDX-License-Identifier: Apache-2.0
// Activation rows into the forms that the matmul kernels read (kernels.hpp): quantized by 32, or spread so that one
// 128-bit broadcast meets the lanes of a tile.
//
//   argument   shape                         type             layout
//   in         [rows][stride], cols used     FP32             row-major
//   out        [ceil(cols/64)][rows]         QuantizedBlock   88 B, order of tile_column()
//              [ceil(cols/64)][rows][128]    FP32             spread64
//              [ceil(cols/16)][rows][32]     FP32             spread16
#include "backend/cpu/simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/activations.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "backend/cpu/kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

// Largest magnitude of 32 values as bits: bits of magnitudes order like integers, and what is not finite is largest.
HWY_INLINE int32_t largest_bits(const float* x) {
  const hn::CappedTag<float, 16> d;
  const hn::RebindToSigned<decltype(d)> di;
  auto largest = hn::Zero(di);
  for (size_t i = 0; i < 32; i += hn::Lanes(d)) {
    largest = hn::Max(largest, hn::And(hn::BitCast(di, hn::LoadU(d, x + i)), hn::Set(di, 0x7fffffff)));
  }
  return hn::GetLane(hn::MaxOfLanes(di, largest));
}

// 32 values times `inverse`, rounded to nearest even; returns their sum.
HWY_INLINE int32_t round_32(const float* x, float inverse, int8_t* q) {
  const hn::CappedTag<float, 16> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<int8_t, decltype(d)> d8;
  auto sum = hn::Zero(di);
  for (size_t i = 0; i < 32; i += hn::Lanes(d)) {
    const auto rounded = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), hn::Set(d, inverse)));
    sum = hn::Add(sum, rounded);
    hn::StoreU(hn::DemoteTo(d8, rounded), d8, q + i);
  }
  return hn::GetLane(hn::SumOfLanes(di, sum));
}

HWY_INLINE void quantize_block(const float* x, QuantizedBlock& out) {
  alignas(64) int8_t q[64];
  for (uint32_t h = 0; h < 2; ++h) {
    const int32_t bits = largest_bits(x + 32 * h);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    int32_t sum = 0;
    if (bits >= 0x7f800000 || largest < 1e-30f) {  // 1e-30: 127 / largest stays finite
      std::memset(q + 32 * h, 0, 32);
      out.scale[h] = bits >= 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    } else {
      sum = round_32(x + 32 * h, 127.0f / largest, q + 32 * h);
      out.scale[h] = largest / 127.0f;
    }
    out.neg8_sum[h] = -8 * sum;
    out.sum[h] = static_cast<float>(sum);
  }
#if HWY_TARGET == HWY_SCALAR
  for (uint32_t p = 0; p < 64; ++p) out.q[p] = q[tile_column(p)];
#else
  // tile_column() in two steps: bytes {0,8,1,9} + 2t of each 16 columns to word t, then word (j, t) to its place.
  const hn::FixedTag<int8_t, 16> d;
  alignas(16) static constexpr int8_t kOrder[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  const auto order = hn::Load(d, kOrder);
  for (uint32_t j = 0; j < 4; ++j) {
    alignas(16) int8_t words[16];
    hn::Store(hn::TableLookupBytes(hn::Load(d, q + 16 * j), order), d, words);
    for (uint32_t t = 0; t < 4; ++t) std::memcpy(out.q + 4 * (4 * t + 2 * (j & 1) + (j >> 1)), words + 4 * t, 4);
  }
#endif
}

// Columns [begin, begin + Width) of a row: in place where they all exist, else copied and filled up with zeros.
template <uint32_t Width>
HWY_INLINE const float* padded_columns(const float* row, uint32_t begin, uint32_t cols, float* buffer) {
  if (begin + Width <= cols) return row + begin;
  std::memset(buffer, 0, Width * sizeof(float));
  std::memcpy(buffer, row + begin, (cols - begin) * sizeof(float));
  return buffer;
}

}  // namespace

void QuantizeRows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last,
                  QuantizedBlock* out) {
  alignas(64) float buffer[64];
  for (uint32_t r = first; r < last; ++r) {
    for (uint32_t begin = 0; begin < cols; begin += 64) {
      quantize_block(padded_columns<64>(in + r * stride, begin, cols, buffer), out[size_t{begin / 64} * rows + r]);
    }
  }
}

void Spread64Rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last,
                  float* out) {
  alignas(64) float buffer[64];
  for (uint32_t r = first; r < last; ++r) {
    for (uint32_t begin = 0; begin < cols; begin += 64) {
      const float* x = padded_columns<64>(in + r * stride, begin, cols, buffer);
      float* to = out + (size_t{begin / 64} * rows + r) * 128;
      for (uint32_t s = 0; s < 32; ++s) {
        const float pair[2] = {x[tile_column(8 * (s / 4) + s % 4)], x[tile_column(8 * (s / 4) + 4 + s % 4)]};
        std::memcpy(to + 4 * s, pair, sizeof pair);
        std::memcpy(to + 4 * s + 2, pair, sizeof pair);
      }
    }
  }
}

void Spread16Rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last,
                  float* out) {
  alignas(64) float buffer[16];
  for (uint32_t r = first; r < last; ++r) {
    for (uint32_t begin = 0; begin < cols; begin += 16) {
      const float* x = padded_columns<16>(in + r * stride, begin, cols, buffer);
      float* to = out + (size_t{begin / 16} * rows + r) * 32;
      for (uint32_t t = 0; t < 4; ++t) {
        for (uint32_t half = 0; half < 2; ++half) {
          std::memcpy(to + 8 * t + 4 * half, x + 2 * t + 8 * half, 8);
          std::memcpy(to + 8 * t + 4 * half + 2, x + 2 * t + 8 * half, 8);
        }
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::backend::cpu {
HWY_EXPORT(QuantizeRows);
HWY_EXPORT(Spread64Rows);
HWY_EXPORT(Spread16Rows);

void quantize_rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last,
                   QuantizedBlock* out) {
  HWY_DYNAMIC_DISPATCH(QuantizeRows)(in, stride, cols, rows, first, last, out);
}
void spread64_rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last,
                   float* out) {
  HWY_DYNAMIC_DISPATCH(Spread64Rows)(in, stride, cols, rows, first, last, out);
}
void spread16_rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last,
                   float* out) {
  HWY_DYNAMIC_DISPATCH(Spread16Rows)(in, stride, cols, rows, first, last, out);
}
}  // namespace sluice::backend::cpu
#endif
