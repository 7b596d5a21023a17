// SPDX-License-Identifier: Apache-2.0
// The CPU backend's kernels: plain pointers in, compiled for every Highway target, dispatched at run time.
//
// Determinism: a row of activations gets the same bits whatever other rows share the call and however the row tiles are
// split over threads. Integer dot products are exact; each FP32 accumulator belongs to one (row, output) and walks
// the columns in order. Where plain a * b + c is written, the compiler may fuse it or not: such code stands once, in a
// function that is not inlined, for calls with one row and with many.
#pragma once

#include <cstddef>
#include <cstdint>

#include "storage/manifest.hpp"

namespace sluice::backend::cpu {

inline constexpr uint32_t kTileRows = 16;
inline constexpr uint32_t kTileCols = 64;      // of tile16x64
// Activation rows per call of a matmul kernel at most: a tile is unpacked once for them, and their activations of one
// tile column (128 * 88 B) stay in L1 and L2 while a row tile is walked.
inline constexpr uint32_t kChunkRows = 128;
// The same for FP32 forms, which are ten times as large.
inline constexpr uint32_t kFloatChunkRows = 32;
inline constexpr uint32_t kMaxHeadDim = 256;

// One weight matrix in memory. `scales`, `bias`: FP16 [row tiles][groups][16]; `zeros`: u8, the same shape. `perm` is for
// whoever prepares the activations; kernels do not look at it.
struct Matrix {
  storage::Scheme scheme = storage::Scheme::f32;
  uint32_t rows = 0;                // outputs N
  uint32_t cols = 0;                // inputs K
  uint32_t group_elems = 0;
  float scale = 1.0f;               // multiplies every result
  const uint8_t* values = nullptr;
  const uint16_t* scales = nullptr;
  const uint8_t* zeros = nullptr;   // or null
  const uint16_t* bias = nullptr;   // or null
  const uint32_t* perm = nullptr;   // [cols], every entry below cols; or null
};

// Where results go: out[row * stride + n] (+)= result + vector[n].
struct MatmulOut {
  float* out = nullptr;
  size_t stride = 0;
  const float* vector = nullptr;    // [N] or null
  bool accumulate = false;
};

// 64 activations of one row, quantized in two groups of 32: x = q * scale. The order is that of the unpacked weights:
// step k = 2t + (j & 1), half h = j >> 1 (the group of 32), byte b: q[8k + 4h + b] is column 16j + 2t + {0,8,1,9}[b].
struct QuantizedBlock {
  int8_t q[64];
  float scale[2];                   // max|x| / 127; NaN if any x is not finite
  int32_t neg8_sum[2];              // -8 * sum of q of the half
  float sum[2];                     // sum of q of the half
};
static_assert(sizeof(QuantizedBlock) == 88);

// Column of the tile at position p of QuantizedBlock::q.
constexpr uint32_t tile_column(uint32_t p) {
  const uint32_t k = p / 8, h = p / 4 % 2, b = p % 4;
  return 16 * (2 * h + (k & 1)) + 2 * (k >> 1) + (b >> 1) + 8 * (b & 1);
}

// The forms activations take before a matmul. `rows` is that of the call (<= kChunkRows); all begin with the block of
// columns, then the row: form[block][row].
//   quantized  QuantizedBlock per 64 columns                                       int8 and int4 weights
//   spread64   128 floats per 64 columns: {x(h=0), x(h=1)} twice for each (k, b)    the same with FP32 activations
//   spread16   32 floats per 16 columns, order (t, column half, twice, pair)       f16 and bf16 weights
// Columns past `cols` count as zero. Handles rows [first, last).
void quantize_rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last,
                   QuantizedBlock* out);
void spread64_rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last, float* out);
void spread16_rows(const float* in, size_t stride, uint32_t cols, uint32_t rows, uint32_t first, uint32_t last, float* out);

// Floats of accumulators that a matmul kernel needs per thread, 64-byte aligned.
inline constexpr size_t kAccumulatorFloats = size_t{kChunkRows} * 32;

// Row tiles [first_tile, last_tile) of `matrix` times `rows` activation rows. tile16x64 or tile16x16 by scheme; `f32`
// matrices are row-major and take the activations as they are (in, stride).
void matmul_int4_int8(const Matrix& matrix, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile,
                      uint32_t last_tile, const MatmulOut& out, float* accumulators);
void matmul_int4_f32(const Matrix& matrix, const float* spread64, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
                     const MatmulOut& out, float* accumulators);
void matmul_int8_int8(const Matrix& matrix, const QuantizedBlock* acts, uint32_t rows, uint32_t first_tile,
                      uint32_t last_tile, const MatmulOut& out, float* accumulators);
void matmul_int8_f32(const Matrix& matrix, const float* spread64, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
                     const MatmulOut& out, float* accumulators);
void matmul_f16_f32(const Matrix& matrix, const float* spread16, uint32_t rows, uint32_t first_tile, uint32_t last_tile,
                    const MatmulOut& out);
void matmul_f32_f32(const Matrix& matrix, const float* in, size_t in_stride, uint32_t rows, uint32_t first_tile,
                    uint32_t last_tile, const MatmulOut& out);

// out[i] = in[i] / sqrt(mean(in^2) + eps) * weight[i] (weight may be null). `in` may be `out`.
void rms_norm_row(const float* in, const float* weight, uint32_t width, float eps, float* out);

// Turns the pairs (i, i + rotary_dims/2) of one head in place; cos and sin have rotary_dims/2 values.
void rope_head(float* head, const float* cos, const float* sin, uint32_t rotary_dims);

// gate[i] = silu(gate[i]) * up[i].
void swiglu(float* gate, const float* up, size_t count);

// FP32 to FP16, finite values beyond 65504 saturate. `out_stride` in elements.
void store_half(const float* in, uint32_t count, uint16_t* out, size_t out_stride);

// KV cache of one session, layer and KV head. A block holds 64 positions: K transposed [head_dim][64], so that scores
// of 64 positions are lanes of one vector; V as [64][head_dim].
struct KvHead {
  const uint16_t* k = nullptr;      // of physical block 0
  const uint16_t* v = nullptr;
  size_t block_stride = 0;          // elements from a physical block to the next
  const uint32_t* blocks = nullptr; // block table: physical block of positions [64b, 64b + 64)
};

// One query: head_dim floats in, head_dim floats out, sees positions 0..position.
struct Query {
  const float* q = nullptr;
  float* out = nullptr;
  uint32_t position = 0;
};

// softmax(q K^T * scale) V for up to kQueryGroup queries that share a KV head.
inline constexpr uint32_t kQueryGroup = 4;
void attend(const Query* queries, uint32_t count, const KvHead& kv, uint32_t head_dim, float scale);

// "AVX3_DL", "AVX2": what dispatch picks on this machine.
const char* simd_target();

}  // namespace sluice::backend::cpu
