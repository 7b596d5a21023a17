// SPDX-License-Identifier: Apache-2.0
// F16 and BF16 weights (tile16x16) times FP32 activations.
//
//   argument   shape                              type          layout
//   values     [ceil(N/16)][ceil(K/16)] tiles     f16 / bf16    512 B, storage/tile.hpp
//   acts       [ceil(K/16)][M][32]                FP32          spread16 (kernels.hpp)
//   out        [M][N]                             FP32
//
// A tile is eight runs of 64 B, one per g; the 32 elements of run g and the 32 floats of an activation row meet lane by
// lane:
//
//   element 8t + 4*half + 2*r + pair    is    row g + 8r, column 2t + 8*half + pair
//
// so output (g, r) has 16 of the 32 products, folded by pairs of t into 16 lanes: {t & 1, half, r, pair}. Bytes per
// tile: 512; 256 multiply-adds per activation row.
#include "backend/cpu/simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/matmul_f16.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "backend/cpu/kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

struct F16 {
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const uint16_t* p) {
    const hn::Rebind<hwy::float16_t, D> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
  }
};
struct Bf16 {
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const uint16_t* p) {
    const hn::Rebind<uint16_t, D> d16;
    const hn::RebindToUnsigned<D> du;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, p))));
  }
};

// 16 accumulator lanes of one (row of acts, g) to outputs g and g + 8.
HWY_NOINLINE void finish_pair(const float* lanes, const Matrix& m, uint32_t row_tile, uint32_t g, uint32_t row,
                            const MatmulOut& out) {
  for (uint32_t r = 0; r < 2; ++r) {
    const uint32_t n = row_tile * kTileRows + g + 8 * r;
    if (n >= m.rows) return;
    float sum = 0;
    for (uint32_t part = 0; part < 4; ++part) sum += lanes[4 * part + 2 * r] + lanes[4 * part + 2 * r + 1];
    sum *= m.scale;
    if (out.vector != nullptr) sum += out.vector[n];
    float& to = out.out[row * out.stride + n];
    to = out.accumulate ? to + sum : sum;
  }
}

// Rows [row, row + MR) of the activations times runs [first_g, first_g + G) of a row tile.
template <class Format, size_t G, size_t MR>
HWY_INLINE void multiply(const Matrix& m, const float* acts, uint32_t rows, uint32_t row_tile, uint32_t first_g,
                         uint32_t row, const MatmulOut& out) {
  const hn::CappedTag<float, 16> d;
  constexpr size_t kLanes = hn::MaxLanes(hn::CappedTag<float, 16>());
  constexpr size_t kParts = 16 / kLanes;
  const uint32_t tile_cols = (m.cols + 15) / 16;
  const auto* tile = reinterpret_cast<const uint16_t*>(m.values) + uint64_t{row_tile} * tile_cols * 256;
  hn::Vec<decltype(d)> acc[MR][G][kParts];
  for (size_t r = 0; r < MR; ++r) {
    for (size_t g = 0; g < G; ++g) {
      for (size_t i = 0; i < kParts; ++i) acc[r][g][i] = hn::Zero(d);
    }
  }
  for (uint32_t c = 0; c < tile_cols; ++c, tile += 256) {
    const float* x = acts + (size_t{c} * rows + row) * 32;
    for (size_t fold = 0; fold < 2; ++fold) {
      for (size_t i = 0; i < kParts; ++i) {
        const size_t at = 16 * fold + i * kLanes;
        hn::Vec<decltype(d)> a[MR];
        for (size_t r = 0; r < MR; ++r) a[r] = hn::LoadU(d, x + 32 * r + at);
        for (size_t g = 0; g < G; ++g) {
          const auto w = Format::load(d, tile + 32 * (first_g + g) + at);
          for (size_t r = 0; r < MR; ++r) acc[r][g][i] = hn::MulAdd(w, a[r], acc[r][g][i]);
        }
      }
    }
  }
  for (size_t r = 0; r < MR; ++r) {
    for (size_t g = 0; g < G; ++g) {
      alignas(64) float lanes[16];
      for (size_t i = 0; i < kParts; ++i) hn::Store(acc[r][g][i], d, lanes + i * kLanes);
      finish_pair(lanes, m, row_tile, static_cast<uint32_t>(first_g + g), static_cast<uint32_t>(row + r), out);
    }
  }
}

template <class Format>
HWY_NOINLINE void matmul(const Matrix& m, const float* acts, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
                         const MatmulOut& out) {
  // Accumulators fill 24 of 32 registers of 64 bytes, or 12 of 16 smaller ones. A row gets the same sums either way.
  constexpr size_t kLanes = hn::MaxLanes(hn::CappedTag<float, 16>());
  constexpr uint32_t kRuns = kLanes >= 16 ? 8 : kLanes >= 8 ? 2 : 1;
  for (uint32_t row_tile = first_tile; row_tile < last_tile; ++row_tile) {
    for (uint32_t g = 0; g < 8; g += kRuns) {
      uint32_t r = 0;
      for (; r + 3 <= rows; r += 3) multiply<Format, kRuns, 3>(m, acts, rows, row_tile, g, r, out);
      for (; r + 2 <= rows; r += 2) multiply<Format, kRuns, 2>(m, acts, rows, row_tile, g, r, out);
      for (; r < rows; ++r) multiply<Format, kRuns, 1>(m, acts, rows, row_tile, g, r, out);
    }
  }
}

}  // namespace

void HalfF32(const Matrix& m, const float* acts, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
             const MatmulOut& out) {
  if (m.scheme == storage::Scheme::bf16) return matmul<Bf16>(m, acts, rows, first_tile, last_tile, out);
  matmul<F16>(m, acts, rows, first_tile, last_tile, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::backend::cpu {
HWY_EXPORT(HalfF32);

void matmul_f16_f32(const Matrix& matrix, const float* spread16, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
                    const MatmulOut& out) {
  HWY_DYNAMIC_DISPATCH(HalfF32)(matrix, spread16, rows, first_tile, last_tile, out);
}
}  // namespace sluice::backend::cpu
#endif
