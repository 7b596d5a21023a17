// SPDX-License-Identifier: Apache-2.0
// The push constants of every shader: one declaration for GLSL and C++. Addresses are of device buffers; which type
// lies there is in buffers.glsl. At most 128 bytes each, what every Vulkan device offers.
//
// X, an activation that a matmul reads: FP32 [rows][x_stride], x_stride = columns rounded up to 64, the padding zero.
// The columns of a block of 16 stand in the order 0 1 8 9  2 3 10 11  4 5 12 13  6 7 14 15, so that the four columns
// of a weight word that belong to lane t of a tile (storage/tile.hpp) are one vec4: number 4 * (column / 16) + t of
// the row.
//
// X may have a half form beside it, for devices that multiply FP16 matrices: numbers of X divided by a power of two of
// their row and 64 columns (1 unless FP16 does not hold them), rows padded to 8:
//   x_half    FP16 [ceil(rows/8)][x_stride/32][lane][2 blocks of 16 columns][4]   lane = 4 * (row % 8) + t
//   x_scale   FP32 [ceil(rows/8)][x_stride/64][8 rows]
// All other activations are FP32, row-major, without padding.
#ifndef SLUICE_SHADERS_ARGUMENTS_H
#define SLUICE_SHADERS_ARGUMENTS_H

#ifdef __cplusplus
#include <cstdint>
namespace sluice::shaders {
using uint = uint32_t;
#define SLUICE_ADDRESS(type) uint64_t
#else
#define SLUICE_ADDRESS(type) type
#endif

// out[r][n] = scale * sum_k W[n][k] x[r][k]  (+ vector[n])  (+ out[r][n])
struct MatvecArguments {
  SLUICE_ADDRESS(Words4) values;      // as in the container
  SLUICE_ADDRESS(Words) scales;       // FP16 [ceil(N/16)][groups][16]
  SLUICE_ADDRESS(Words) offsets;      // zeros (u8) or bias (FP16), the same shape
  SLUICE_ADDRESS(Floats4) x;          // X
  SLUICE_ADDRESS(Floats) vector;      // [N]
  SLUICE_ADDRESS(Floats) out_rows;    // [rows][N]
  SLUICE_ADDRESS(Words4) x_half;      // half form of X; 0: there is none
  SLUICE_ADDRESS(Floats) x_scale;
  uint outputs;                       // N
  uint columns;                       // K
  uint groups;                        // ceil(K / group)
  uint group_columns;
  uint rows;
  uint has_vector;
  uint accumulate;
  float scale;
};

// The half form of X.
struct HalveArguments {
  SLUICE_ADDRESS(Floats) x;           // X
  SLUICE_ADDRESS(Words) x_half;
  SLUICE_ADDRESS(Floats) x_scale;
  uint blocks;                        // x_stride / 64
};

// out = X of in / sqrt(mean(in^2) + eps) * weight
struct RmsNormArguments {
  SLUICE_ADDRESS(Floats) in_rows;     // [rows][width]
  SLUICE_ADDRESS(Floats) weight;      // [width]
  SLUICE_ADDRESS(Floats) x;           // X
  uint width;
  uint has_weight;
  float eps;
};

// q and k of a row: RMSNorm of each head where there are weights, then RoPE; k and v go to the KV cache.
struct RopeArguments {
  SLUICE_ADDRESS(Floats) q;           // [rows][heads][head_dim], in place
  SLUICE_ADDRESS(Floats) k;           // [rows][kv_heads][head_dim]
  SLUICE_ADDRESS(Floats) v;           // ...
  SLUICE_ADDRESS(Floats) q_norm;      // [head_dim]
  SLUICE_ADDRESS(Floats) k_norm;      // [head_dim]
  SLUICE_ADDRESS(Floats) angles;      // [rows][pairs]{cos, sin}
  SLUICE_ADDRESS(Words) table;        // [3][max_rows]: sessions, positions, selected; then the block table
  SLUICE_ADDRESS(Words) cache;
  uint max_rows;
  uint heads;
  uint kv_heads;
  uint pairs;                         // rotary_dims / 2
  uint layer;
  uint layers;
  uint blocks_per_session;
  uint norms;                         // bit 0: q_norm, bit 1: k_norm
  float eps;
};

// Heads of one KV head against positions 0..position of their session, cut into chunks.
struct AttentionArguments {
  SLUICE_ADDRESS(Floats) q;           // [rows][heads][head_dim]
  SLUICE_ADDRESS(Floats) attended;    // X; where the whole past is one chunk
  SLUICE_ADDRESS(Floats) partial_out; // [rows][heads][chunks][head_dim]: sums of weighted V, not yet divided
  SLUICE_ADDRESS(Floats) partial_sum; // [rows][heads][chunks]{largest score, sum of weights}
  SLUICE_ADDRESS(Words) table;
  SLUICE_ADDRESS(Words) cache;
  uint max_rows;
  uint heads;
  uint kv_heads;
  uint layer;
  uint layers;
  uint blocks_per_session;
  uint x_stride;
  uint chunk_positions;
  uint chunks;                        // stride of the partial results; 0: one chunk, straight to `attended`
  float scale;                        // 1 / sqrt(head_dim)
};

// attended = the partial results of AttentionArguments put together.
struct AttentionMergeArguments {
  SLUICE_ADDRESS(Floats) partial_out;
  SLUICE_ADDRESS(Floats) partial_sum;
  SLUICE_ADDRESS(Floats) attended;
  SLUICE_ADDRESS(Words) table;
  uint max_rows;
  uint heads;
  uint head_dim;
  uint x_stride;
  uint chunk_positions;
  uint chunks;
};

// x = X of silu(gate) * up
struct SwigluArguments {
  SLUICE_ADDRESS(Floats) gate;        // [rows][width]
  SLUICE_ADDRESS(Floats) up;          // [rows][width]
  SLUICE_ADDRESS(Floats) x;           // X
  uint width;
};

// Rows selected[0], selected[1], ... (ascending) move to rows 0, 1, ...
struct SelectRowsArguments {
  SLUICE_ADDRESS(Floats) rows;        // [rows][width]
  SLUICE_ADDRESS(Words) table;
  uint max_rows;
  uint selected;
  uint width;
};

// gathered = x with its columns in another order: column k is column perm[k] of x.
struct GatherColumnsArguments {
  SLUICE_ADDRESS(Floats) x;           // X
  SLUICE_ADDRESS(Words) perm;         // [width]; entries beyond the width count as the last column
  SLUICE_ADDRESS(Floats) gathered;    // X
  uint width;
};

// Reads `count` times 16 bytes.
struct MemoryReadArguments {
  SLUICE_ADDRESS(Words4) data;
  SLUICE_ADDRESS(Words) never;        // written only if the sum of all were one certain number
  uint count;
};

#undef SLUICE_ADDRESS
#ifdef __cplusplus
}  // namespace sluice::shaders
#endif
#endif
