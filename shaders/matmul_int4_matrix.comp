// SPDX-License-Identifier: Apache-2.0
// out = W x for INT4 weights and many rows of X, by matrix instructions (matrix_int4.glsl). Arguments as in
// matvec_int4.comp, with the half form of X.
//
// Grid: x = ceil(N / (32 * subgroups)), y = ceil(rows / (8 * kRowTiles)). A subgroup takes two tiles of W (32 outputs)
// and kRowTiles times 8 rows of X through all of K. B operands come straight from memory, one 16-byte load of each
// invocation for 32 columns of 8 rows; the subgroups of a workgroup read the same ones at about the same time.
#version 450
#include "matrix_int4.glsl"

layout(constant_id = 1) const uint kRowTiles = 8;

void main() {
  const uint lane = gl_SubgroupInvocationID, g = lane / 4, t = lane % 4;
  const uint tiles = (args.columns + 63) / 64, tile_rows = (args.outputs + 15) / 16;
  const uint first_tile_row = (gl_WorkGroupID.x * (gl_WorkGroupSize.x / 32) + gl_SubgroupID) * 2;
  const uint first_rows = gl_WorkGroupID.y * kRowTiles;
  const uint last_rows = (args.rows + 7) / 8 - 1;
  if (first_tile_row >= tile_rows) return;
  const MatrixA ones = MatrixA(float16_t(1));

  float total[2][kRowTiles][4];
  for (uint w = 0; w < 2; ++w) {
    for (uint m = 0; m < kRowTiles; ++m) total[w][m] = float[4](0, 0, 0, 0);
  }
  for (uint tile = 0; tile < tiles; ++tile) {
    uvec4 words[2];
    [[unroll]] for (uint w = 0; w < 2; ++w) {
      // Past the last tile of W it is repeated; its sums are not written.
      words[w] = args.values.at[(min(first_tile_row + w, tile_rows - 1) * tiles + tile) * 32 + lane];
    }
    [[unroll]] for (uint span = 0; span < 64 / kSpan; ++span) {
      const Parameters p[2] = Parameters[2](
          parameters_at(first_tile_row, tile * 64 + span * kSpan, g),
          parameters_at(min(first_tile_row + 1, tile_rows - 1), tile * 64 + span * kSpan, g));
      MatrixC part[2][kRowTiles], x_sum[kRowTiles];
      for (uint m = 0; m < kRowTiles; ++m) part[0][m] = part[1][m] = x_sum[m] = MatrixC(0.0);
      [[unroll]] for (uint h = 0; h < kSpan / 32; ++h) {
        const uint j = span * (kSpan / 16) + 2 * h;
        MatrixA a[2][2];
        [[unroll]] for (uint w = 0; w < 2; ++w) {
          a[w][0] = weights_of(words[w][j], p[w].offset);
          a[w][1] = weights_of(words[w][j + 1], p[w].offset);
        }
        [[unroll]] for (uint m = 0; m < kRowTiles; ++m) {
          const uint rows = min(first_rows + m, last_rows);
          const uvec4 x = args.x_half.at[((rows * tiles + tile) * 2 + j / 2) * 32 + lane];
          const MatrixB b0 = activations_of(x.x, x.y), b1 = activations_of(x.z, x.w);
          [[unroll]] for (uint w = 0; w < 2; ++w) {
            part[w][m] = coopMatMulAddNV(a[w][0], b0, part[w][m]);
            part[w][m] = coopMatMulAddNV(a[w][1], b1, part[w][m]);
          }
          if (kKind == 2) x_sum[m] = coopMatMulAddNV(ones, b1, coopMatMulAddNV(ones, b0, x_sum[m]));
        }
      }
      [[unroll]] for (uint m = 0; m < kRowTiles; ++m) {
        const uint at = (min(first_rows + m, last_rows) * tiles + tile) * 8 + 2 * t;
        const vec2 x_scale = vec2(args.x_scale.at[at], args.x_scale.at[at + 1]);
        [[unroll]] for (uint w = 0; w < 2; ++w) add_scaled(total[w][m], part[w][m], x_sum[m], p[w], x_scale);
      }
    }
  }
  [[unroll]] for (uint m = 0; m < kRowTiles; ++m) {
    [[unroll]] for (uint w = 0; w < 2; ++w) {
      [[unroll]] for (uint i = 0; i < 4; ++i) {
        write_output((first_rows + m) * 8 + 2 * t + i % 2, (first_tile_row + w) * 16 + g + i / 2 * 8, total[w][m][i]);
      }
    }
  }
}
