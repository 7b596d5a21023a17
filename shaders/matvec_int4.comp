// SPDX-License-Identifier: Apache-2.0
// out = W x for INT4 weights in tile16x64 and 1 to kRows rows of X at a time (matvec.glsl has the frame).
//
//   argument   shape                          type
//   values     [N/16][K/64][32 lanes][4]      u32, 8 nibbles each: word j of lane 4g+t
//                nibble 0 4 2 6   row g,     columns 16j + 2t, +1, +8, +9
//                nibble 1 5 3 7   row g + 8, the same
//   scales     [N/16][groups][16]             FP16
//   offsets    [N/16][groups][16]             kKind 1: u8 zeros, value (q - z) s; kKind 2: FP16 bias, value q s + b
//   x          [rows][K padded to 64]         FP32, in the order of arguments.h
//
// kKind 0: value (q - 8) s. Groups of 32, 64 or any multiple of 64; a group's sum is taken in FP32 and multiplied by
// its scale. Bytes per call: values + scales once for every kRows rows.
#version 450
#include "matvec.glsl"

layout(constant_id = 2) const uint kKind = 0;        // 0 symmetric, 1 zeros, 2 bias
layout(constant_id = 3) const uint kSpan = 64;       // columns with one scale in a tile: 32 or 64

void main() {
  const Place place = place_of();
  const uint tiles = (args.columns + 63) / 64;
  float low[kRows], high[kRows];
  for (uint m = 0; m < kRows; ++m) low[m] = high[m] = 0;

  for (uint tile = place.slice; tile < tiles; tile += place.slices) {
    const uvec4 words = args.values.at[(place.tile_row * tiles + tile) * 32 + place.lane];
    for (uint part = 0; part < 64 / kSpan; ++part) {
      // The padding of K may reach past the last group; its activations are zero.
      const uint group = min((tile * 64 + part * kSpan) / args.group_columns, args.groups - 1);
      const uint parameter = (place.tile_row * args.groups + group) * 16 + place.g;
      const vec2 scale = vec2(half_at(args.scales, parameter), half_at(args.scales, parameter + 8));
      vec2 offset = vec2(8);
      if (kKind == 1) offset = vec2(byte_at(args.offsets, parameter), byte_at(args.offsets, parameter + 8));
      if (kKind == 2) offset = vec2(0);

      float sum_low[kRows], sum_high[kRows], sum_x[kRows];
      for (uint m = 0; m < kRows; ++m) sum_low[m] = sum_high[m] = sum_x[m] = 0;
      [[unroll]] for (uint k = 0; k < kSpan / 16; ++k) {
        const uint j = part * (kSpan / 16) + k;
        const uint word = words[j];
        const vec4 w_low = vec4(word & 15, (word >> 16) & 15, (word >> 8) & 15, (word >> 24) & 15) - offset.x;
        const vec4 w_high = vec4((word >> 4) & 15, (word >> 20) & 15, (word >> 12) & 15, word >> 28) - offset.y;
        [[unroll]] for (uint m = 0; m < kRows; ++m) {
          const vec4 x = x_at(place, m, tile * 4 + j);
          sum_low[m] = dot4(w_low, x, sum_low[m]);
          sum_high[m] = dot4(w_high, x, sum_high[m]);
          if (kKind == 2) sum_x[m] += (x.x + x.y) + (x.z + x.w);
        }
      }
      vec2 bias = vec2(0);
      if (kKind == 2) bias = vec2(half_at(args.offsets, parameter), half_at(args.offsets, parameter + 8));
      [[unroll]] for (uint m = 0; m < kRows; ++m) {
        low[m] = fma(sum_low[m], scale.x, low[m]);
        high[m] = fma(sum_high[m], scale.y, high[m]);
        if (kKind == 2) {
          low[m] = fma(sum_x[m], bias.x, low[m]);
          high[m] = fma(sum_x[m], bias.y, high[m]);
        }
      }
    }
  }
  finish(place, low, high);
}
