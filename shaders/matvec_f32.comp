// SPDX-License-Identifier: Apache-2.0
// out = W x for FP32 weights, plain rows [N][K] (matvec.glsl has the frame). The scheme exists to keep an FP32 source
// exactly; it is not tuned.
#version 450
#include "matvec.glsl"

void main() {
  const Place place = place_of();
  float low[kRows], high[kRows];
  for (uint m = 0; m < kRows; ++m) low[m] = high[m] = 0;

  Floats weights = Floats(uvec2(args.values));
  Floats x = Floats(uvec2(args.x));
  // Rows past the last one repeat it; their sums are not written.
  const uint row_low = min(place.tile_row * 16 + place.g, args.outputs - 1);
  const uint row_high = min(place.tile_row * 16 + place.g + 8, args.outputs - 1);
  for (uint k = 4 * place.slice + place.t; k < args.columns; k += 4 * place.slices) {
    const float w_low = weights.at[row_low * args.columns + k], w_high = weights.at[row_high * args.columns + k];
    [[unroll]] for (uint m = 0; m < kRows; ++m) {
      const float x_k = x.at[min(place.first_row + m, args.rows - 1) * x_stride() + x_place(k)];
      low[m] = fma(w_low, x_k, low[m]);
      high[m] = fma(w_high, x_k, high[m]);
    }
  }
  finish(place, low, high);
}
