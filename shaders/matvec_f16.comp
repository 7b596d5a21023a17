// SPDX-License-Identifier: Apache-2.0
// out = W x for FP16 and BF16 weights in tile16x16 (matvec.glsl has the frame).
//
//   argument   shape                          type
//   values     [N/16][K/16][32 lanes][4]      u32 of two numbers each
//                word 0   row g,     columns 2t, 2t+1        word 2   row g,     columns 2t+8, 2t+9
//                word 1   row g + 8, the same                word 3   row g + 8, the same
//   x          [rows][K padded to 64]         FP32, in the order of arguments.h
#version 450
#include "matvec.glsl"

layout(constant_id = 2) const uint kBfloat = 0;      // 1: BF16

vec2 unpack(uint word) {
  if (kBfloat != 0) return vec2(uintBitsToFloat(word << 16), uintBitsToFloat(word & 0xffff0000u));
  return unpackHalf2x16(word);
}

void main() {
  const Place place = place_of();
  const uint tiles = (args.columns + 15) / 16;
  float low[kRows], high[kRows];
  for (uint m = 0; m < kRows; ++m) low[m] = high[m] = 0;

  for (uint tile = place.slice; tile < tiles; tile += place.slices) {
    const uvec4 words = args.values.at[(place.tile_row * tiles + tile) * 32 + place.lane];
    const vec4 w_low = vec4(unpack(words.x), unpack(words.z));
    const vec4 w_high = vec4(unpack(words.y), unpack(words.w));
    [[unroll]] for (uint m = 0; m < kRows; ++m) {
      const vec4 x = x_at(place, m, tile);
      low[m] = dot4(w_low, x, low[m]);
      high[m] = dot4(w_high, x, high[m]);
    }
  }
  finish(place, low, high);
}
