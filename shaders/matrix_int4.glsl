// SPDX-License-Identifier: Apache-2.0
// INT4 weights as operands of matrix instructions: the tile in the container is the A operand of a 16x16 by 16x8
// product as NVIDIA's mma.sync.m16n8k16 lays it over a subgroup of 32, and the half form of X is the B operand, so an
// invocation unpacks its own elements and nothing moves between them.
//
//   A (16x16, weights)       element 0, 1: row g, columns 2t, 2t+1       4, 5: row g, columns 2t+8, 2t+9
//                            element 2, 3: row g + 8, the same           6, 7: row g + 8, the same
//   B (16x8, activations)    element 0, 1: column g, rows 2t, 2t+1       2, 3: column g, rows 2t+8, 2t+9
//   C (16x8, sums, FP32)     element 0, 1: row g, columns 2t, 2t+1       2, 3: row g + 8, the same
//
// GL_NV_cooperative_matrix leaves this order to the driver: kernels.hpp says how it is checked before these shaders are
// used.
#extension GL_NV_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "buffers.glsl"

layout(local_size_x_id = 0) in;
layout(push_constant) uniform Arguments { MatvecArguments args; };
layout(constant_id = 2) const uint kKind = 0;        // 0 symmetric, 1 zeros, 2 bias
layout(constant_id = 3) const uint kSpan = 64;       // columns with one scale in a tile: 32 or 64

#define MatrixA fcoopmatNV<16, gl_ScopeSubgroup, 16, 16>
#define MatrixB fcoopmatNV<16, gl_ScopeSubgroup, 16, 8>
#define MatrixC fcoopmatNV<32, gl_ScopeSubgroup, 16, 8>

f16vec2 halves(uint word) { return unpackFloat2x16(word); }

// Scales, offsets and biases of rows g and g + 8 for the columns of a tile from `column` on.
struct Parameters {
  vec2 scale;
  f16vec2 offset;
  vec2 bias;
};

Parameters parameters_at(uint tile_row, uint column, uint g) {
  // The padding of K may reach past the last group; its activations are zero.
  const uint group = min(column / args.group_columns, args.groups - 1);
  const uint at = (tile_row * args.groups + group) * 16 + g;
  Parameters p;
  p.scale = vec2(half_at(args.scales, at), half_at(args.scales, at + 8));
  p.offset = f16vec2(8);
  p.bias = vec2(0);
  if (kKind == 1) p.offset = f16vec2(byte_at(args.offsets, at), byte_at(args.offsets, at + 8));
  if (kKind == 2) {
    p.offset = f16vec2(0);
    p.bias = vec2(half_at(args.offsets, at), half_at(args.offsets, at + 8));
  }
  return p;
}

// A word of 8 nibbles: in FP16, 0x6400 | q is 1024 + q, and 0x6400 | 16 q is 1024 + 16 q. All results are exact.
MatrixA weights_of(uint word, f16vec2 offset) {
  const f16vec2 low = f16vec2(1024) + offset.xx, high = f16vec2(64) + offset.yy;
  const f16vec2 a0 = halves((word & 0x000f000fu) | 0x64006400u) - low;
  const f16vec2 a1 = halves((word & 0x00f000f0u) | 0x64006400u) * f16vec2(0.0625) - high;
  word >>= 8;
  const f16vec2 a2 = halves((word & 0x000f000fu) | 0x64006400u) - low;
  const f16vec2 a3 = halves((word & 0x00f000f0u) | 0x64006400u) * f16vec2(0.0625) - high;
  MatrixA a;
  a[0] = a0.x; a[1] = a0.y;
  a[2] = a1.x; a[3] = a1.y;
  a[4] = a2.x; a[5] = a2.y;
  a[6] = a3.x; a[7] = a3.y;
  return a;
}

MatrixB activations_of(uint first, uint second) {
  const f16vec2 b0 = halves(first), b1 = halves(second);
  MatrixB b;
  b[0] = b0.x; b[1] = b0.y;
  b[2] = b1.x; b[3] = b1.y;
  return b;
}

void add_scaled(inout float total[4], MatrixC part, MatrixC x_sum, Parameters p, vec2 x_scale) {
  const vec2 low = p.scale.x * x_scale, high = p.scale.y * x_scale;
  total[0] = fma(part[0], low.x, total[0]);
  total[1] = fma(part[1], low.y, total[1]);
  total[2] = fma(part[2], high.x, total[2]);
  total[3] = fma(part[3], high.y, total[3]);
  if (kKind == 2) {
    const vec2 bias_low = p.bias.x * x_scale, bias_high = p.bias.y * x_scale;
    total[0] = fma(x_sum[0], bias_low.x, total[0]);
    total[1] = fma(x_sum[1], bias_low.y, total[1]);
    total[2] = fma(x_sum[2], bias_high.x, total[2]);
    total[3] = fma(x_sum[3], bias_high.y, total[3]);
  }
}

void write_output(uint row, uint n, float sum) {
  if (n >= args.outputs || row >= args.rows) return;
  precise float result = sum * args.scale;
  if (args.has_vector != 0) result += args.vector.at[n];
  const uint at = row * args.outputs + n;
  if (args.accumulate != 0) result += args.out_rows.at[at];
  args.out_rows.at[at] = result;
}
