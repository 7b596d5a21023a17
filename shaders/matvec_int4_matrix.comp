// SPDX-License-Identifier: Apache-2.0
// out = W x for INT4 weights and up to 8 rows of X, by matrix instructions (matrix_int4.glsl): 1 row costs what 8 do.
// Arguments as in matvec_int4.comp, with the half form of X.
//
// Grid: x = ceil(N / 16). A workgroup takes 16 outputs; its subgroups take every slices-th tile of K, four at a time
// so that four 16-byte loads of each invocation are in flight, and are added up in their order. Sums are FP32.
#version 450
#include "matrix_int4.glsl"

const uint kTiles = 4;   // loaded at once

shared float partial[4 * gl_WorkGroupSize.x];

void main() {
  const uint lane = gl_SubgroupInvocationID, slice = gl_SubgroupID, slices = gl_WorkGroupSize.x / 32;
  const uint g = lane / 4, t = lane % 4, tile_row = gl_WorkGroupID.x;
  const uint tiles = (args.columns + 63) / 64;
  float total[4] = float[4](0, 0, 0, 0);
  MatrixA ones = MatrixA(float16_t(1));

  for (uint base = slice; base < tiles; base += kTiles * slices) {
    uvec4 words[kTiles];
    [[unroll]] for (uint i = 0; i < kTiles; ++i) {
      words[i] = args.values.at[(tile_row * tiles + min(base + i * slices, tiles - 1)) * 32 + lane];
    }
    [[unroll]] for (uint i = 0; i < kTiles; ++i) {
      const uint tile = base + i * slices;
      if (tile >= tiles) break;   // the same for the whole subgroup
      const uvec4 x[2] = uvec4[2](args.x_half.at[tile * 64 + lane], args.x_half.at[tile * 64 + 32 + lane]);
      const vec2 x_scale = vec2(args.x_scale.at[tile * 8 + 2 * t], args.x_scale.at[tile * 8 + 2 * t + 1]);
      [[unroll]] for (uint span = 0; span < 64 / kSpan; ++span) {
        const Parameters p = parameters_at(tile_row, tile * 64 + span * kSpan, g);
        MatrixC part = MatrixC(0.0), x_sum = MatrixC(0.0);
        [[unroll]] for (uint k = 0; k < kSpan / 16; ++k) {
          const uint j = span * (kSpan / 16) + k;
          const MatrixB b = activations_of(x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1]);
          part = coopMatMulAddNV(weights_of(words[i][j], p.offset), b, part);
          if (kKind == 2) x_sum = coopMatMulAddNV(ones, b, x_sum);
        }
        add_scaled(total, part, x_sum, p, x_scale);
      }
    }
  }

  [[unroll]] for (uint i = 0; i < 4; ++i) partial[gl_LocalInvocationIndex * 4 + i] = total[i];
  barrier();
  for (uint i = gl_LocalInvocationIndex; i < 128; i += gl_WorkGroupSize.x) {
    const uint n = i % 16, row = i / 16;
    const uint first = (4 * (n % 8) + row / 2) * 4 + n / 8 * 2 + row % 2;
    float sum = 0;
    for (uint s = 0; s < slices; ++s) sum += partial[s * 128 + first];
    write_output(row, tile_row * 16 + n, sum);
  }
}
