// SPDX-License-Identifier: Apache-2.0
// out = W x for INT8 weights in tile16x64 (matvec.glsl has the frame).
//
//   argument   shape                                type
//   values     [N/16][K/64][2 halves][32 lanes][4]  u32, 4 bytes each: two words of 8 values of columns 32h + 16w
//                byte 0 4 2 6   row g,     columns 2t, +1, +8, +9
//                byte 1 5 3 7   row g + 8, the same
//   scales     [N/16][groups][16]                   FP16; value q s
//   x          [rows][K padded to 64]               FP32, in the order of arguments.h
#version 450
#include "matvec.glsl"

vec4 signed_bytes(uint first, uint second, uint shift) {
  return vec4(bitfieldExtract(int(first), int(shift), 8), bitfieldExtract(int(second), int(shift), 8),
              bitfieldExtract(int(first), int(shift) + 16, 8), bitfieldExtract(int(second), int(shift) + 16, 8));
}

void main() {
  const Place place = place_of();
  const uint tiles = (args.columns + 63) / 64;
  float low[kRows], high[kRows];
  for (uint m = 0; m < kRows; ++m) low[m] = high[m] = 0;

  for (uint half_tile = place.slice; half_tile < 2 * tiles; half_tile += place.slices) {
    const uvec4 words = args.values.at[(place.tile_row * tiles * 2 + half_tile) * 32 + place.lane];
    const uint group = min(half_tile * 32 / args.group_columns, args.groups - 1);
    const uint parameter = (place.tile_row * args.groups + group) * 16 + place.g;
    const vec2 scale = vec2(half_at(args.scales, parameter), half_at(args.scales, parameter + 8));
    float sum_low[kRows], sum_high[kRows];
    for (uint m = 0; m < kRows; ++m) sum_low[m] = sum_high[m] = 0;
    [[unroll]] for (uint j = 0; j < 2; ++j) {
      const vec4 w_low = signed_bytes(words[2 * j], words[2 * j + 1], 0);
      const vec4 w_high = signed_bytes(words[2 * j], words[2 * j + 1], 8);
      [[unroll]] for (uint m = 0; m < kRows; ++m) {
        const vec4 x = x_at(place, m, half_tile * 2 + j);
        sum_low[m] = dot4(w_low, x, sum_low[m]);
        sum_high[m] = dot4(w_high, x, sum_high[m]);
      }
    }
    [[unroll]] for (uint m = 0; m < kRows; ++m) {
      low[m] = fma(sum_low[m], scale.x, low[m]);
      high[m] = fma(sum_high[m], scale.y, high[m]);
    }
  }
  finish(place, low, high);
}
