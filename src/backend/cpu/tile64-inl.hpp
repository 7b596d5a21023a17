// SPDX-License-Identifier: Apache-2.0
// tile16x64 (int4 and int8) times activation rows, for one Highway target. Included once per target.
//
// Both schemes are unpacked to the same form, 16 vectors of 64 unsigned bytes:
//
//   w[k]      rows 0-7 of the tile    32-bit lane 2g + h holds four columns of row g in group half h:
//   w[8 + k]  rows 8-15               byte b is column tile_column(8k + 4h + b)
//
// So a lane adds up one row and one group of 32 over the eight steps k, the activations of a step are one 64-bit
// broadcast, and the scales of the tile are one vector per eight rows. At the end output g is lane 2g + lane 2g + 1.
// With VNNI a step is vpdpbusd (unsigned weights, signed activations); without it, 16-bit products.
//
// Bytes per tile: 512 (int4) or 1024 (int8) of values + 32 per group of scales; 1024 multiply-adds per activation row.

#if defined(SLUICE_CPU_TILE64_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_CPU_TILE64_INL
#undef SLUICE_CPU_TILE64_INL
#else
#define SLUICE_CPU_TILE64_INL
#endif

#include <hwy/highway.h>

#include <cstring>

#include "backend/cpu/kernels.hpp"
#include "storage/tile.hpp"

#undef SLUICE_VNNI
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
#define SLUICE_VNNI 1
#else
#define SLUICE_VNNI 0
#endif

HWY_BEFORE_NAMESPACE();
#if SLUICE_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")  // Highway 1.0.3 tests for it at run time and leaves it out here
#endif
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// How q becomes a value: (q - Offset) * s, (q - z) * s, q * s + b.
enum class Decode { offset8, offset128, zeros, bias };

struct Int4 {
  static constexpr size_t kTileBytes = 512;
  static constexpr Decode kDecode = Decode::offset8;
};
struct Int8 {
  static constexpr size_t kTileBytes = 1024;
  static constexpr Decode kDecode = Decode::offset128;
};

// Scales of a tile column, by lane 2g + h; `extra` holds zeros or biases.
struct alignas(64) TileScales {
  float lo[16], hi[16], extra_lo[16], extra_hi[16];
};

HWY_INLINE uint64_t groups_of(const Matrix& m) { return (m.cols + m.group_elems - 1) / m.group_elems; }

#if SLUICE_VNNI

HWY_INLINE __m512i dot4(__m512i sum, __m512i weights, __m512i acts) {
#if HWY_COMPILER_GCC_ACTUAL
  return _mm512_dpbusd_epi32(sum, weights, acts);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(acts));
  return sum;
#endif
}

HWY_INLINE __m512i broadcast_pair(const void* pair) {
  long long bits;
  std::memcpy(&bits, pair, 8);
  return _mm512_set1_epi64(bits);
}

// Last two of the transposition's levels, the same for both schemes. In: for each gB, gC (i = gB + 2 gC) a vector with
// lanes (t1 t0 gA h). Out: for each t a vector with lanes (gC gB gA h).
HWY_INLINE void transpose_blocks(const __m512i (&in)[4], __m512i* out, int step) {
  const __m512i x0 = _mm512_shuffle_i32x4(in[0], in[1], 0x88), x1 = _mm512_shuffle_i32x4(in[0], in[1], 0xdd);
  const __m512i y0 = _mm512_shuffle_i32x4(in[2], in[3], 0x88), y1 = _mm512_shuffle_i32x4(in[2], in[3], 0xdd);
  out[0 * step] = _mm512_shuffle_i32x4(x0, y0, 0x88);
  out[1 * step] = _mm512_shuffle_i32x4(x1, y1, 0x88);
  out[2 * step] = _mm512_shuffle_i32x4(x0, y0, 0xdd);
  out[3 * step] = _mm512_shuffle_i32x4(x1, y1, 0xdd);
}

// A 64-byte load is row g in the low nibbles and row g + 8 in the high ones, lanes 4t + j.
HWY_INLINE void unpack(Int4, const uint8_t* tile, __m512i (&w)[16]) {
  const __m512i mask = _mm512_set1_epi8(0x0f);
  __m512i even[4], odd[4], packed[8];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_loadu_ps(tile + 128 * i), b = _mm512_loadu_ps(tile + 128 * i + 64);
    even[i] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
    odd[i] = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
  }
  transpose_blocks(even, packed, 2);
  transpose_blocks(odd, packed + 1, 2);
  for (int k = 0; k < 8; ++k) {
    w[k] = _mm512_and_si512(packed[k], mask);
    w[8 + k] = _mm512_and_si512(_mm512_srli_epi16(packed[k], 4), mask);
  }
}

// A 64-byte load is half h of rows g and g + 8 alternating by byte; q ^ 0x80 = q + 128 makes it unsigned.
HWY_INLINE void unpack(Int8, const uint8_t* tile, __m512i (&w)[16]) {
  const __m512i by_row = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i upper[8];  // rows 8-15, taken up after rows 0-7 are through: both at once would not fit the registers
  for (int r = 0; r < 2; ++r) {
    __m512i even[4], odd[4];
    for (int i = 0; i < 4; ++i) {
      __m512i pair[2];
      for (int a = 0; a < 2; ++a) {
        const int g = 2 * i + a;
        if (r == 0) {
          const __m512i x = _mm512_shuffle_epi8(_mm512_loadu_si512(tile + 64 * g), by_row);
          const __m512i y = _mm512_shuffle_epi8(_mm512_loadu_si512(tile + 512 + 64 * g), by_row);
          pair[a] = _mm512_unpacklo_epi32(x, y);
          upper[g] = _mm512_unpackhi_epi32(x, y);
        } else {
          pair[a] = upper[g];
        }
        pair[a] = _mm512_xor_si512(pair[a], flip);
      }
      even[i] = _mm512_unpacklo_epi64(pair[0], pair[1]);
      odd[i] = _mm512_unpackhi_epi64(pair[0], pair[1]);
    }
    transpose_blocks(even, w + 8 * r, 2);
    transpose_blocks(odd, w + 8 * r + 1, 2);
  }
}

template <class Format>
HWY_INLINE void unpack_bytes(Format format, const uint8_t* tile, uint8_t* bytes) {
  __m512i w[16];
  unpack(format, tile, w);
  for (int k = 0; k < 16; ++k) _mm512_store_si512(bytes + 64 * k, w[k]);
}

#else  // !SLUICE_VNNI

HWY_INLINE void unpack_bytes(Int4, const uint8_t* tile, uint8_t* bytes) {
  for (uint32_t g = 0; g < 8; ++g) {
    for (uint32_t t = 0; t < 4; ++t) {
      for (uint32_t j = 0; j < 4; ++j) {
        uint32_t word;
        std::memcpy(&word, tile + 16 * (4 * g + t) + 4 * j, 4);
        const uint32_t low = word & 0x0f0f0f0fu, high = (word >> 4) & 0x0f0f0f0fu;
        uint8_t* lane = bytes + 64 * (2 * t + (j & 1)) + 4 * (2 * g + (j >> 1));
        std::memcpy(lane, &low, 4);
        std::memcpy(lane + 8 * 64, &high, 4);
      }
    }
  }
}

HWY_INLINE void unpack_bytes(Int8, const uint8_t* tile, uint8_t* bytes) {
  for (uint32_t h = 0; h < 2; ++h) {
    for (uint32_t g = 0; g < 8; ++g) {
      for (uint32_t t = 0; t < 4; ++t) {
        const uint8_t* lane = tile + 512 * h + 16 * (4 * g + t);
        for (uint32_t i = 0; i < 16; ++i) {
          const uint32_t k = 2 * t + i / 8, r = i & 1, b = i % 8 / 2;
          bytes[64 * (8 * r + k) + 4 * (2 * g + h) + b] = static_cast<uint8_t>(lane[i] ^ 0x80);
        }
      }
    }
  }
}

#endif  // SLUICE_VNNI

#if SLUICE_VNNI

// TileScales in registers.
struct VectorScales {
  __m512 lo, hi, extra_lo, extra_hi;
};

// Where the parameters of a tile column's two groups lie: 16 of each half, one after the other where groups are 32 wide
// (the last column may have one only), the same 16 twice where they are wider.
struct GroupSpan {
  uint64_t at;        // index of the first
  __mmask32 present;  // which of the 32 from there to load
  __m512i order;      // index in the load of each lane: 2g + h of `lo` for 16 lanes, then of `hi`
};

HWY_INLINE GroupSpan group_span(const Matrix& m, uint64_t groups, uint32_t row_tile, uint32_t tile_col) {
  const __m512i lane = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4,
                                        4, 3, 3, 2, 2, 1, 1, 0, 0);
  const uint64_t row_at = row_tile * groups;
  if (m.group_elems == 32) {
    const bool both = 2 * uint64_t{tile_col} + 1 < groups;
    return {(row_at + 2 * uint64_t{tile_col}) * 16, both ? 0xffffffffu : 0xffffu,
            _mm512_add_epi16(lane, _mm512_set1_epi32(16 << 16))};
  }
  return {(row_at + (tile_col * kTileCols) / m.group_elems) * 16, 0xffffu, lane};
}

HWY_INLINE void load_halves(const uint16_t* plane, const GroupSpan& span, __m512& lo, __m512& hi) {
  const __m512i both = _mm512_permutexvar_epi16(span.order, _mm512_maskz_loadu_epi16(span.present, plane + span.at));
  lo = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
  hi = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}

template <Decode decode>
HWY_INLINE VectorScales vector_scales(const Matrix& m, uint64_t groups, uint32_t row_tile, uint32_t tile_col) {
  const GroupSpan span = group_span(m, groups, row_tile, tile_col);
  VectorScales out{};
  load_halves(m.scales, span, out.lo, out.hi);
  if constexpr (decode == Decode::bias) load_halves(m.bias, span, out.extra_lo, out.extra_hi);
  if constexpr (decode == Decode::zeros) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(span.present, m.zeros + span.at));
    const __m512i both = _mm512_permutexvar_epi16(span.order, wide);
    out.extra_lo = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)));
    out.extra_hi = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)));
  }
  return out;
}

template <Decode decode>
HWY_INLINE void load_scales(const Matrix& m, uint32_t row_tile, uint32_t tile_col, TileScales& out) {
  const VectorScales scales = vector_scales<decode>(m, groups_of(m), row_tile, tile_col);
  _mm512_store_ps(out.lo, scales.lo);
  _mm512_store_ps(out.hi, scales.hi);
  if constexpr (decode == Decode::zeros || decode == Decode::bias) {
    _mm512_store_ps(out.extra_lo, scales.extra_lo);
    _mm512_store_ps(out.extra_hi, scales.extra_hi);
  }
}

#else  // !SLUICE_VNNI

// 16 FP16 values to FP32.
HWY_INLINE void halves_to_floats(const uint16_t* in, float* out) {
  const hn::CappedTag<float, 16> d32;
  const hn::Rebind<hwy::float16_t, decltype(d32)> d16;
  const size_t lanes = hn::Lanes(d32);
  for (size_t i = 0; i < 16; i += lanes) {
    hn::StoreU(hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(in) + i)), d32, out + i);
  }
}

template <Decode decode>
HWY_INLINE void load_scales(const Matrix& m, uint32_t row_tile, uint32_t tile_col, TileScales& out) {
  const uint64_t groups = groups_of(m);
  alignas(64) float scale[2][16];
  alignas(64) float extra[2][16];
  for (uint32_t h = 0; h < 2; ++h) {
    const uint32_t col = tile_col * kTileCols + h * 32;
    if (col >= m.cols) {
      std::memset(scale[h], 0, sizeof scale[h]);
      std::memset(extra[h], 0, sizeof extra[h]);
      continue;
    }
    const uint64_t at = (row_tile * groups + col / m.group_elems) * 16;
    halves_to_floats(m.scales + at, scale[h]);
    if constexpr (decode == Decode::bias) halves_to_floats(m.bias + at, extra[h]);
    if constexpr (decode == Decode::zeros) {
      for (int i = 0; i < 16; ++i) extra[h][i] = m.zeros[at + static_cast<uint64_t>(i)];
    }
  }
  for (int g = 0; g < 8; ++g) {
    for (int h = 0; h < 2; ++h) {
      out.lo[2 * g + h] = scale[h][g];
      out.hi[2 * g + h] = scale[h][g + 8];
      if constexpr (decode == Decode::zeros || decode == Decode::bias) {
        out.extra_lo[2 * g + h] = extra[h][g];
        out.extra_hi[2 * g + h] = extra[h][g + 8];
      }
    }
  }
}

#endif  // SLUICE_VNNI

// Sums of one activation row, lanes 2g + h, to the 16 outputs of a row tile.
inline HWY_NOINLINE void finish_row(const float* acc, const Matrix& m, uint32_t row_tile, uint32_t row, const MatmulOut& out) {
  const uint32_t first = row_tile * kTileRows;
  const uint32_t count = m.rows - first < kTileRows ? m.rows - first : kTileRows;
  float* to = out.out + row * out.stride + first;
#if SLUICE_VNNI
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 lo = _mm512_load_ps(acc), hi = _mm512_load_ps(acc + 16);
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  __m512 sum = _mm512_add_ps(_mm512_permutex2var_ps(lo, even, hi), _mm512_permutex2var_ps(lo, odd, hi));
  sum = _mm512_mul_ps(sum, _mm512_set1_ps(m.scale));
  if (out.vector != nullptr) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out.vector + first));
  if (out.accumulate) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
  _mm512_mask_storeu_ps(to, mask, sum);
#else
  for (uint32_t i = 0; i < count; ++i) {
    float sum = (acc[2 * i] + acc[2 * i + 1]) * m.scale;
    if (out.vector != nullptr) sum += out.vector[first + i];
    to[i] = out.accumulate ? to[i] + sum : sum;
  }
#endif
}

// ---------------------------------------------------------------------------------------------- INT8 activations

#if SLUICE_VNNI

// acc[2r], acc[2r+1] += tile * acts[r] for MR rows.
template <Decode decode, int MR>
HWY_INLINE void multiply(const __m512i (&w)[16], const VectorScales& scales, const QuantizedBlock* acts, __m512* acc) {
  __m512i lo[MR], hi[MR];
  for (int r = 0; r < MR; ++r) {
    __m512i start = _mm512_setzero_si512();
    if constexpr (decode == Decode::offset8) start = broadcast_pair(acts[r].neg8_sum);
    if constexpr (decode == Decode::offset128) start = _mm512_slli_epi32(broadcast_pair(acts[r].neg8_sum), 4);
    lo[r] = start;
    hi[r] = start;
  }
  for (int k = 0; k < 8; ++k) {
    for (int r = 0; r < MR; ++r) {
      const __m512i x = broadcast_pair(acts[r].q + 8 * k);
      lo[r] = dot4(lo[r], w[k], x);
      hi[r] = dot4(hi[r], w[8 + k], x);
    }
  }
  for (int r = 0; r < MR; ++r) {
    const __m512 act_scale = _mm512_castsi512_ps(broadcast_pair(acts[r].scale));
    __m512 sum_lo = _mm512_cvtepi32_ps(lo[r]), sum_hi = _mm512_cvtepi32_ps(hi[r]);
    if constexpr (decode == Decode::zeros) {  // exact: below 2^24
      const __m512 sum = _mm512_castsi512_ps(broadcast_pair(acts[r].sum));
      sum_lo = _mm512_fnmadd_ps(scales.extra_lo, sum, sum_lo);
      sum_hi = _mm512_fnmadd_ps(scales.extra_hi, sum, sum_hi);
    }
    acc[2 * r] = _mm512_fmadd_ps(sum_lo, _mm512_mul_ps(scales.lo, act_scale), acc[2 * r]);
    acc[2 * r + 1] = _mm512_fmadd_ps(sum_hi, _mm512_mul_ps(scales.hi, act_scale), acc[2 * r + 1]);
    if constexpr (decode == Decode::bias) {
      const __m512 sum = _mm512_mul_ps(_mm512_castsi512_ps(broadcast_pair(acts[r].sum)), act_scale);
      acc[2 * r] = _mm512_fmadd_ps(scales.extra_lo, sum, acc[2 * r]);
      acc[2 * r + 1] = _mm512_fmadd_ps(scales.extra_hi, sum, acc[2 * r + 1]);
    }
  }
}

template <Decode decode, int MR>
HWY_INLINE void multiply_in_memory(const __m512i (&w)[16], const VectorScales& scales, const QuantizedBlock* acts,
                                   float* accumulators) {
  __m512 acc[2 * MR];
  for (int i = 0; i < 2 * MR; ++i) acc[i] = _mm512_load_ps(accumulators + 16 * i);
  multiply<decode, MR>(w, scales, acts, acc);
  for (int i = 0; i < 2 * MR; ++i) _mm512_store_ps(accumulators + 16 * i, acc[i]);
}

template <class Format, Decode decode>
HWY_NOINLINE void one_row(const Matrix& m, const QuantizedBlock* acts, uint32_t first_tile, uint32_t last_tile,
                          const MatmulOut& out) {
  const uint32_t tile_cols = (m.cols + kTileCols - 1) / kTileCols;
  const uint64_t groups = groups_of(m);
  for (uint32_t row_tile = first_tile; row_tile < last_tile; ++row_tile) {
    const uint8_t* tile = m.values + uint64_t{row_tile} * tile_cols * Format::kTileBytes;
    __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (uint32_t c = 0; c < tile_cols; ++c, tile += Format::kTileBytes) {
      __m512i w[16];
      const VectorScales scales = vector_scales<decode>(m, groups, row_tile, c);
      unpack(Format{}, tile, w);
      multiply<decode, 1>(w, scales, acts + c, acc);
    }
    alignas(64) float sums[32];
    _mm512_store_ps(sums, acc[0]);
    _mm512_store_ps(sums + 16, acc[1]);
    finish_row(sums, m, row_tile, 0, out);
  }
}

template <class Format, Decode decode>
HWY_NOINLINE void many_rows(const Matrix& m, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile,
                            uint32_t last_tile, const MatmulOut& out, float* accumulators) {
  const uint32_t tile_cols = (m.cols + kTileCols - 1) / kTileCols;
  const uint64_t groups = groups_of(m);
  for (uint32_t row_tile = first_tile; row_tile < last_tile; ++row_tile) {
    const uint8_t* tile = m.values + uint64_t{row_tile} * tile_cols * Format::kTileBytes;
    std::memset(accumulators, 0, rows * 32 * sizeof(float));
    for (uint32_t c = 0; c < tile_cols; ++c, tile += Format::kTileBytes) {
      __m512i w[16];
      const VectorScales scales = vector_scales<decode>(m, groups, row_tile, c);
      unpack(Format{}, tile, w);
      const QuantizedBlock* block = acts + size_t{c} * rows;
      uint32_t r = 0;
      for (; r + 4 <= rows; r += 4) multiply_in_memory<decode, 4>(w, scales, block + r, accumulators + 32 * r);
      for (; r < rows; ++r) multiply_in_memory<decode, 1>(w, scales, block + r, accumulators + 32 * r);
    }
    for (uint32_t r = 0; r < rows; ++r) finish_row(accumulators + 32 * r, m, row_tile, r, out);
  }
}

template <class Format, Decode decode>
HWY_INLINE void matmul_int8_acts(const Matrix& m, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile,
                                 uint32_t last_tile, const MatmulOut& out, float* accumulators) {
  if (rows == 1) return one_row<Format, decode>(m, acts, first_tile, last_tile, out);
  many_rows<Format, decode>(m, acts, rows, first_tile, last_tile, out, accumulators);
}

#else  // !SLUICE_VNNI

// Sums of u8 * s8 over the eight steps, lanes 2g + h, for one group of eight rows.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2

template <class Format>
HWY_INLINE void dot_rows(const uint8_t* bytes, const int8_t* q, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int part = 0; part < 2; ++part) {
    __m256i sum = _mm256_setzero_si256(), pairs = _mm256_setzero_si256();
    for (int k = 0; k < 8; ++k) {
      long long bits;
      std::memcpy(&bits, q + 8 * k, 8);
      const __m256i x = _mm256_set1_epi64x(bits);
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 64 * k + 32 * part));
      if constexpr (Format::kTileBytes == Int4::kTileBytes) {  // all eight steps fit: 8 * 2 * 15 * 127 = 30480
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, x));
      } else {  // 2 * 127 * 127 fits, so the top bit is taken apart: 8 * 2 * 127 of it
        const __m256i low = _mm256_and_si256(w, _mm256_set1_epi8(127));
        const __m256i top = _mm256_and_si256(_mm256_srli_epi16(w, 7), _mm256_set1_epi8(1));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(top, x));
      }
    }
    const int weight = Format::kTileBytes == Int4::kTileBytes ? 1 : 128;
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(weight)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * part), sum);
  }
}

#elif HWY_TARGET == HWY_SCALAR

template <class Format>
HWY_INLINE void dot_rows(const uint8_t* bytes, const int8_t* q, int32_t* sums) {
  for (int lane = 0; lane < 16; ++lane) {
    sums[lane] = 0;
    for (int k = 0; k < 8; ++k) {
      for (int b = 0; b < 4; ++b) sums[lane] += bytes[64 * k + 4 * lane + b] * q[8 * k + 4 * (lane & 1) + b];
    }
  }
}

#else

template <class Format>
HWY_INLINE void dot_rows(const uint8_t* bytes, const int8_t* q, int32_t* sums) {
  const hn::ScalableTag<int32_t> d32;
  const hn::Repartition<int16_t, decltype(d32)> d16;
  const hn::Rebind<uint8_t, decltype(d16)> du8;
  alignas(64) int16_t acts[64];
  for (int i = 0; i < 64; ++i) acts[i] = q[i];
  const size_t lanes = hn::Lanes(d16);
  alignas(64) int32_t pairs[32];
  for (size_t at = 0; at < 64; at += lanes) {
    auto sum = hn::Zero(d32);
    for (size_t k = 0; k < 8; ++k) {
      const auto w = hn::PromoteTo(d16, hn::LoadU(du8, bytes + 64 * k + at));
      const auto product = hn::BitCast(d32, hn::Mul(w, hn::LoadDup128(d16, acts + 8 * k)));  // at most 255 * 127
      sum = hn::Add(sum, hn::Add(hn::ShiftRight<16>(product), hn::ShiftRight<16>(hn::ShiftLeft<16>(product))));
    }
    hn::StoreU(sum, d32, pairs + at / 2);
  }
  for (int i = 0; i < 16; ++i) sums[i] = pairs[2 * i] + pairs[2 * i + 1];
}

#endif

// What a block of activations contributes to each of the 16 lanes.
struct ActLanes {
  int32_t start[16];
  float scale[16], sum[16];
};

template <Decode decode>
HWY_INLINE void spread_block(const QuantizedBlock& x, ActLanes& out) {
  for (int i = 0; i < 16; ++i) {
    const int h = i & 1;
    out.start[i] = decode == Decode::offset8 ? x.neg8_sum[h] : decode == Decode::offset128 ? 16 * x.neg8_sum[h] : 0;
    out.scale[i] = x.scale[h];
    out.sum[i] = x.sum[h];
  }
}

template <class Format, Decode decode>
HWY_INLINE void matmul_int8_acts(const Matrix& m, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile,
                                 uint32_t last_tile, const MatmulOut& out, float* accumulators) {
  const uint32_t tile_cols = (m.cols + kTileCols - 1) / kTileCols;
  alignas(64) uint8_t bytes[1024];
  for (uint32_t row_tile = first_tile; row_tile < last_tile; ++row_tile) {
    const uint8_t* tile = m.values + uint64_t{row_tile} * tile_cols * Format::kTileBytes;
    std::memset(accumulators, 0, rows * 32 * sizeof(float));
    for (uint32_t c = 0; c < tile_cols; ++c, tile += Format::kTileBytes) {
      TileScales scales;
      load_scales<decode>(m, row_tile, c, scales);
      unpack_bytes(Format{}, tile, bytes);
      for (uint32_t r = 0; r < rows; ++r) {
        const QuantizedBlock& x = acts[size_t{c} * rows + r];
        ActLanes lanes;
        spread_block<decode>(x, lanes);
        for (int half = 0; half < 2; ++half) {
          int32_t sums[16];
          dot_rows<Format>(bytes + 512 * half, x.q, sums);
          const float* scale = half == 0 ? scales.lo : scales.hi;
          const float* extra = half == 0 ? scales.extra_lo : scales.extra_hi;
          float* acc = accumulators + 32 * r + 16 * half;
          for (int i = 0; i < 16; ++i) {  // elementwise, for the compiler to vectorize
            auto value = static_cast<float>(sums[i] + lanes.start[i]);
            if constexpr (decode == Decode::zeros) value -= extra[i] * lanes.sum[i];
            acc[i] += value * (scale[i] * lanes.scale[i]);
            if constexpr (decode == Decode::bias) acc[i] += extra[i] * (lanes.sum[i] * lanes.scale[i]);
          }
        }
      }
    }
    for (uint32_t r = 0; r < rows; ++r) finish_row(accumulators + 32 * r, m, row_tile, r, out);
  }
}

#endif  // SLUICE_VNNI

// ---------------------------------------------------------------------------------------------- FP32 activations

// The tile as FP32, [k][b][rows 0-7, rows 8-15][lane 2g + h].
template <Decode decode>
HWY_INLINE void dequantize(const uint8_t* bytes, const TileScales& scales, float* out) {
  const hn::CappedTag<float, 16> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  const hn::RebindToSigned<decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  const auto offset = hn::Set(d, decode == Decode::offset8 ? 8.0f : 128.0f);
  for (size_t k = 0; k < 8; ++k) {
    for (size_t half = 0; half < 2; ++half) {
      const float* scale_at = half == 0 ? scales.lo : scales.hi;
      const float* extra_at = half == 0 ? scales.extra_lo : scales.extra_hi;
      for (size_t i = 0; i < 16; i += lanes) {
        auto word = hn::LoadU(du, reinterpret_cast<const uint32_t*>(bytes + 64 * (8 * half + k)) + i);
        const auto scale = hn::Load(d, scale_at + i);
        for (size_t b = 0; b < 4; ++b) {
          const auto q = hn::ConvertTo(d, hn::BitCast(di, hn::And(word, hn::Set(du, 0xffu))));
          word = hn::ShiftRight<8>(word);
          float* to = out + ((4 * k + b) * 2 + half) * 16 + i;
          if constexpr (decode == Decode::zeros) {
            hn::Store(hn::Mul(hn::Sub(q, hn::Load(d, extra_at + i)), scale), d, to);
          } else if constexpr (decode == Decode::bias) {
            hn::Store(hn::MulAdd(q, scale, hn::Load(d, extra_at + i)), d, to);
          } else {
            hn::Store(hn::Mul(hn::Sub(q, offset), scale), d, to);
          }
        }
      }
    }
  }
}

// accumulators += tile * acts for MR rows; `acts` has 128 floats a row.
template <int MR>
HWY_INLINE void multiply_f32(const float* weights, const float* acts, float* accumulators) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  for (size_t i = 0; i < 16; i += lanes) {
    decltype(hn::Zero(d)) lo[MR], hi[MR];
    for (size_t r = 0; r < MR; ++r) {
      lo[r] = hn::Load(d, accumulators + 32 * r + i);
      hi[r] = hn::Load(d, accumulators + 32 * r + 16 + i);
    }
    for (size_t s = 0; s < 32; ++s) {
      const auto w_lo = hn::Load(d, weights + 32 * s + i);
      const auto w_hi = hn::Load(d, weights + 32 * s + 16 + i);
      for (size_t r = 0; r < MR; ++r) {
#if HWY_TARGET == HWY_SCALAR
        const auto x = hn::Load(d, acts + 128 * r + 4 * s + i % 4);
#else
        const auto x = hn::LoadDup128(d, acts + 128 * r + 4 * s);
#endif
        lo[r] = hn::MulAdd(w_lo, x, lo[r]);
        hi[r] = hn::MulAdd(w_hi, x, hi[r]);
      }
    }
    for (size_t r = 0; r < MR; ++r) {
      hn::Store(lo[r], d, accumulators + 32 * r + i);
      hn::Store(hi[r], d, accumulators + 32 * r + 16 + i);
    }
  }
}

template <class Format, Decode decode>
HWY_NOINLINE void matmul_f32_acts(const Matrix& m, const float* acts, uint32_t rows, uint32_t first_tile,
                                  uint32_t last_tile, const MatmulOut& out, float* accumulators) {
  const uint32_t tile_cols = (m.cols + kTileCols - 1) / kTileCols;
  alignas(64) uint8_t bytes[1024];
  alignas(64) float weights[1024];
  for (uint32_t row_tile = first_tile; row_tile < last_tile; ++row_tile) {
    const uint8_t* tile = m.values + uint64_t{row_tile} * tile_cols * Format::kTileBytes;
    std::memset(accumulators, 0, rows * 32 * sizeof(float));
    for (uint32_t c = 0; c < tile_cols; ++c, tile += Format::kTileBytes) {
      TileScales scales;
      load_scales<decode>(m, row_tile, c, scales);
      unpack_bytes(Format{}, tile, bytes);
      dequantize<decode>(bytes, scales, weights);
      const float* block = acts + size_t{c} * rows * 128;
      uint32_t r = 0;
      for (; r + 4 <= rows; r += 4) multiply_f32<4>(weights, block + 128 * r, accumulators + 32 * r);
      for (; r < rows; ++r) multiply_f32<1>(weights, block + 128 * r, accumulators + 32 * r);
    }
    for (uint32_t r = 0; r < rows; ++r) finish_row(accumulators + 32 * r, m, row_tile, r, out);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
